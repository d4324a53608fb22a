"""The pictures of a comparison: losses and differences against tokens, splits, and what a fitted law says."""

import math
from collections.abc import Sequence

import numpy as np

from memoryllm_jax.common import plots
from memoryllm_jax.experiments import fits
from memoryllm_jax.experiments.intervals import Interval
from memoryllm_jax.experiments.results import Cell, Family, Results

_WIDTH, _HEIGHT = 3.3, 2.7  # inches of one panel
_COLUMNS = 3  # of panels
_LEGEND = 1.5  # inches beside the panels
_DIFFERENCE = "difference, bits per byte"


def curves(results: Results, family: Family):
    """Held-out loss against tokens, a panel for each size and vocabulary. Returns: the figure."""
    figure, panels = _panels(results, family)
    for (size, vocabulary), ax in panels.items():
        for number, variant in enumerate(family.variants):
            points = []
            for cell in _cells(results, family, size, vocabulary):
                runs = results.seeds(family, cell).get(variant, {})
                if runs:
                    points.append((cell.tokens / 1e6, [results.loss(run) for run in runs.values()]))
            if points:
                _draw_seeds(ax, points, number, variant)
        _label(ax, size, vocabulary, "bits per byte")
        plots.log_scale(ax)
    _finish(figure, panels)
    return figure


def differences(results: Results, family: Family):
    """Differences of the loss against tokens with their intervals, a panel for each size and vocabulary."""
    figure, panels = _panels(results, family)
    shown = _shown(results, family)
    for (size, vocabulary), ax in panels.items():
        cells = _cells(results, family, size, vocabulary)
        compared = [(cell.tokens / 1e6, results.compare(family, cell)) for cell in cells]
        for place, variant in enumerate(shown):
            # Side by side, so that their intervals do not cover each other.
            aside = 1.03 ** (place - len(shown) / 2)
            points = [(tokens * aside, interval) for tokens, interval in _points(variant, compared)]
            _draw_intervals(ax, points, family, variant)
        ax.axhline(0, color="0.3", linewidth=0.8)
        _label(ax, size, vocabulary, _DIFFERENCE)
    _finish(figure, panels)
    return figure


def by_vocabulary(results: Results, family: Family, of_size: dict[str, list[Cell]]):
    """Differences of the loss against the number of token ids, a panel for each size.

    Args:
      of_size: {size: its cells, one of each vocabulary}.
    """
    figure, axes = plots.new_grid(1, len(of_size), max(_WIDTH * len(of_size) + _LEGEND, 6.0), 3.4)
    panels = dict(zip(of_size, axes[0]))
    shown = _shown(results, family)
    for (size, cells), ax in zip(of_size.items(), panels.values()):
        compared = [(results.texts[cell.vocabulary].vocab_size, results.compare(family, cell)) for cell in cells]
        for place, variant in enumerate(shown):
            aside = 1.03 ** (place - len(shown) / 2)
            points = [(ids * aside, interval) for ids, interval in _points(variant, compared)]
            _draw_intervals(ax, points, family, variant)
        ax.axhline(0, color="0.3", linewidth=0.8)
        plots.log_scale(ax, "x")
        ax.set_title(f"size {size}, {cells[0].tokens / 1e6:.3g} M tokens", fontsize=9)
        ax.set(xlabel="token ids", ylabel=_DIFFERENCE)
    _finish(figure, panels)
    return figure


def split(results: Results, family: Family, cell: Cell):
    """Differences of the loss in a cell by group of targets, a panel for each split, in nats a token."""
    text, shown = results.texts[cell.vocabulary], _shown(results, family)
    figure, axes = plots.new_grid(2, (len(text.splits) + 1) // 2, 9.0 + _LEGEND, 7.0)
    panels = dict(zip((by.name for by in text.splits), axes.flat))
    for by, ax in zip(text.splits, panels.values()):
        groups = text.groups(by)
        compared = [(at, results.compare(family, cell, group)) for at, group in enumerate(groups)]
        for place, variant in enumerate(shown):
            aside = 0.6 * (place / max(len(shown) - 1, 1) - 0.5)
            points = [(at + aside, interval) for at, interval in _points(variant, compared)]
            _draw_intervals(ax, points, family, variant, linestyle="none")
        ax.axhline(0, color="0.3", linewidth=0.8)
        ax.set_xticks(range(len(groups)), [group.label for group in groups], rotation=25, ha="right", fontsize=8)
        ax.set_title(by.label, fontsize=9)
        ax.set_ylabel("difference, nats a token")
    _finish(figure, panels)
    return figure


def law(points: Sequence[fits.Point], left_out: Sequence[fits.Point], fit: fits.Fit):
    """Losses of runs against those that the law gives: points on the diagonal are where it holds."""
    figure, ax = plots.new_figure(5.5, 3.8)
    for chosen, style, label in ((points, "o", "fitted"), (left_out, "^", "left out")):
        if not chosen:
            continue
        x = [fit.law.loss(*point[:3], point.kind) for point in chosen]
        ax.plot(x, [point.loss for point in chosen], style, markersize=4, fillstyle="none", label=label)
    ends = ax.get_xlim()
    ax.plot(ends, ends, color="0.5", linewidth=0.8)
    plots.log_scale(ax, "x")
    plots.log_scale(ax)
    ax.set(xlabel="bits per byte by the law", ylabel="bits per byte measured")
    plots.legend(ax)
    return figure


def crossings(found: dict[str, list[tuple[float, Interval]]]):
    """Tokens after which base is ahead, against the parameters of base's attention and FFNs.

    Args:
      found: {variant: (parameters, interval of the tokens) of each size}. Crossings at 0 and infinity are
        not drawn.
    """
    figure, ax = plots.new_figure()
    for number, (variant, points) in enumerate(found.items()):
        inside = [(size / 1e6, tokens) for size, tokens in points if 0 < tokens.value < math.inf]
        if inside:
            sizes, intervals = zip(*inside)
            # The axis is logarithmic, so bars that end at 0 or infinity are cut at a factor of 30.
            bars = [[min(max(x, tokens.value / 30), tokens.value * 30) / 1e6 for x in tokens] for tokens in intervals]
            plots.with_bars(ax, sizes, *zip(*bars), variant, **plots.style_of(number))
    if ax.has_data():
        plots.log_scale(ax, "x")
        plots.log_scale(ax)
        plots.legend(ax)
    ax.set(xlabel="parameters of base without embedding and head, millions", ylabel="tokens, millions")
    return figure


def _panels(results: Results, family: Family):
    """A figure, and its panels {(size, vocabulary): axes}, one for each pair that has runs."""
    pairs = list(dict.fromkeys(cell[:2] for cell in results.cells(family)))
    columns = min(len(pairs), _COLUMNS)
    rows = math.ceil(len(pairs) / columns)
    width, height = _WIDTH * columns + _LEGEND, _HEIGHT * rows + 0.4
    figure, axes = plots.new_grid(rows, columns, max(width, 6.0), max(height, 3.4))
    for ax in axes.flat[len(pairs) :]:
        ax.set_axis_off()
    return figure, dict(zip(pairs, axes.flat))


def _shown(results, family):
    """The variants that are compared with another one."""
    return [variant for variant in family.variants if results.against(family, variant)]


def _points(variant, compared):
    """(x, interval of the difference) of a variant, from (x, result of `Results.compare`), where it has one."""
    return [(x, found[variant].difference) for x, found in compared if variant in found and found[variant].difference]


def _cells(results, family, size, vocabulary):
    return [cell for cell in results.cells(family) if cell[:2] == (size, vocabulary)]


def _draw_seeds(ax, points, number, label):
    """A line through the means over seeds, from the lowest to the highest seed at each point."""
    x, losses = zip(*points)
    mean, low, high = ([f(of_seeds) for of_seeds in losses] for f in (np.mean, min, max))
    plots.with_bars(ax, x, mean, low, high, label, linewidth=1, **plots.style_of(number))


def _draw_intervals(ax, points, family, variant, **style):
    """Draws (x, interval) of a variant, in the style that it has in all pictures of the family."""
    if not points:
        return
    x, found = zip(*points)
    style = plots.style_of(family.variants.index(variant)) | {"markersize": 3, "linewidth": 1} | style
    plots.with_bars(ax, x, *zip(*found), variant, **style)


def _label(ax, size, vocabulary, ylabel):
    plots.log_scale(ax, "x")
    ax.set_title(f"size {size}, {vocabulary} ids", fontsize=9)
    ax.set_xlabel("tokens, millions")
    ax.set_ylabel(ylabel)


def _finish(figure, panels):
    """Adds one legend for all panels, outside of them, with every series that one of them has."""
    handles = {}
    for ax in panels.values():
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
