"""The pictures of a comparison: the answers, losses against tokens, splits, and what a fitted law says."""

import math
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np

from memoryllm_jax.common import plots
from memoryllm_jax.experiments import answers as answers_lib
from memoryllm_jax.experiments import fits
from memoryllm_jax.experiments.answers import Answer, Answers, Crossing
from memoryllm_jax.experiments.protocol import Contrast
from memoryllm_jax.experiments.results import Cell, Results

_WIDTH, _HEIGHT = 3.2, 2.7  # inches of one panel
_COLUMNS = 3  # of panels
_LEGEND = 1.5  # inches beside the panels
_DIFFERENCE = "difference, bits per byte"
_ASIDE = 1.05  # factor between sizes at one place of a logarithmic axis, so that their bars do not cover each other


def name_of(contrast: Contrast) -> str:
    """What a contrast subtracts, such as "memory less base"."""
    return f"{contrast.a} less {contrast.b or 'itself with permuted rows'}"


def answers_by_text(results: Results, answers: Answers, contrasts: Sequence[Contrast]):
    """Differences against the text that was read, a panel for each of the contrasts. Returns: the figure."""
    figure, panels = _panels(contrasts)
    first, *others = panels.values()
    for ax in others:  # so that the eye may go from panel to panel
        ax.sharex(first)
    series = list(dict.fromkeys(answer.cell[:2] for answer in answers.answers if answer.contrast in contrasts))
    aside = _aside(size for size, _ in series)
    for contrast, ax in panels.items():
        for number, (size, vocabulary) in enumerate(series):
            row = [answer for cell, answer in answers.of(contrast).items() if cell[:2] == (size, vocabulary)]
            x = [results.megabytes(answer.cell) * aside[size] for answer in row]
            _draw_answers(ax, x, row, number, f"{size}, {vocabulary} ids")
        _label_answers(ax, contrast, "MB of text that was read")
    _finish(figure, panels.values())
    return figure


def answers_by_vocabulary(results: Results, answers: Answers):
    """Differences against the number of token ids, a panel for each contrast. Returns: the figure; None if empty."""
    chosen = {c: answers_lib.at_equal_text(results, answers.of(c)) for c in answers.contrasts()}
    chosen = {contrast: of_size for contrast, of_size in chosen.items() if of_size}
    if not chosen:
        return None
    figure, panels = _panels(list(chosen))
    aside = _aside(size for of_size in chosen.values() for size in of_size)
    for contrast, ax in panels.items():
        texts = []
        for size, row in chosen[contrast].items():
            x = [results.texts[answer.cell.vocabulary].vocab_size * aside[size] for answer in row]
            _draw_answers(ax, x, row, list(aside).index(size), f"size {size}")
            texts += [results.megabytes(answer.cell) for answer in row]
        _label_answers(ax, contrast, f"token ids, after {min(texts):.3g} to {max(texts):.3g} MB of text")
        _label_ids(ax, results)
    _finish(figure, panels.values())
    return figure


def crossings(results: Results, found: Sequence[Crossing]):
    """The text after which base is ahead against the number of token ids, a panel for each variant.

    An arrow begins at the longest run (up) or at the shortest (down), beyond which the crossing lies.
    """
    variants = list(dict.fromkeys(crossing.variant for crossing in found))
    aside = _aside(crossing.size for crossing in found)
    figure, panels = _panels(variants)
    for variant, ax in panels.items():
        for crossing in found:
            if crossing.variant == variant:
                style = plots.style_of(list(aside).index(crossing.size)) | {"linestyle": "none"}
                _draw_crossing(ax, results, crossing, aside[crossing.size], style)
        plots.log_scale(ax, "x")
        _label_ids(ax, results)
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.set_ylim(low / 1.4, high * 1.4)  # with room for the arrows
        plots.log_scale(ax)
        ax.set_title(f"base overtakes {variant}", fontsize=9)
        ax.set(xlabel="token ids", ylabel="MB of text")
    _finish(figure, panels.values())
    return figure


def curves(results: Results, variants: Sequence[str]):
    """Held-out loss against tokens, a panel for each size and vocabulary. Returns: the figure."""
    pairs = list(dict.fromkeys(cell[:2] for variant in variants for cell in results.cells(variant)))
    figure, panels = _panels(pairs)
    for (size, vocabulary), ax in panels.items():
        for number, variant in enumerate(variants):
            cells = [cell for cell in results.cells(variant) if cell[:2] == (size, vocabulary)]
            if cells:
                losses = [[results.loss(run) for run in results.seeds(variant, cell).values()] for cell in cells]
                mean, low, high = ([f(of_seeds) for of_seeds in losses] for f in (np.mean, min, max))
                x = [cell.tokens / 1e6 for cell in cells]
                plots.with_bars(ax, x, mean, low, high, variant, **plots.style_of(number) | {"linewidth": 1})
        plots.log_scale(ax, "x")
        plots.log_scale(ax)
        per_token = results.texts[vocabulary].bytes_per_token
        ax.set_title(f"size {size}, {vocabulary} ids, {per_token:.3g} bytes a token", fontsize=9)
        ax.set(xlabel="tokens, millions", ylabel="bits per byte")
    _finish(figure, panels.values())
    return figure


def shares(found: dict[Cell, list[tuple[float, float]]]):
    """Loss against beta, a line for each cell.

    Args:
      found: {cell: its (beta, bits per byte)}.
    """
    figure, ax = plots.new_figure()
    for number, (cell, points) in enumerate(found.items()):
        label = f"{cell.vocabulary} ids, size {cell.size}, {cell.tokens / 1e6:.3g} M tokens"
        ax.plot(*zip(*points), label=label, **plots.style_of(number))
    ax.set(xlabel="beta: 0 is memory, 8 is base", ylabel="bits per byte")
    plots.legend(ax)
    return figure


def split(results: Results, contrasts: Sequence[Contrast], cell: Cell):
    """Differences of the loss in a cell by group of targets, a panel for each split, in nats a token."""
    text = results.texts[cell.vocabulary]
    figure, axes = plots.new_grid(2, (len(text.splits) + 1) // 2, 9.0 + _LEGEND, 7.0)
    for by, ax in zip(text.splits, axes.flat):
        groups = text.groups(by)
        for place, contrast in enumerate(contrasts):
            aside = 0.6 * (place / max(len(contrasts) - 1, 1) - 0.5)
            differences = [results.difference(contrast.a, contrast.b, cell, group) for group in groups]
            shown = [difference.estimate.interval for difference in differences]
            style = plots.style_of(place) | {"markersize": 3, "linestyle": "none"}
            plots.with_bars(ax, np.arange(len(groups)) + aside, *zip(*shown), name_of(contrast), **style)
        ax.axhline(0, color="0.3", linewidth=0.8)
        ax.set_xticks(range(len(groups)), [group.label for group in groups], rotation=25, ha="right", fontsize=8)
        ax.set_title(by.label, fontsize=9)
        ax.set_ylabel("difference, nats a token")
    _finish(figure, axes.flat)
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


def _panels(names: Sequence):
    """A figure, and its panels {name: axes}."""
    columns = min(len(names), _COLUMNS)
    rows = math.ceil(len(names) / columns)
    width, height = _WIDTH * columns + _LEGEND, _HEIGHT * rows + 0.4
    figure, axes = plots.new_grid(rows, columns, max(width, 6.0), max(height, 3.4))
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    return figure, dict(zip(names, axes.flat))


def _draw_answers(ax, x: Sequence[float], row: Sequence[Answer], number: int, label: str) -> None:
    """Draws the intervals of a series. Filled markers are findings."""
    if not row:
        return
    style = plots.style_of(number) | {"linewidth": 1}
    plots.with_bars(ax, x, *zip(*(answer.difference for answer in row)), label, **style, markerfacecolor="white")
    found = [(at, answer.difference.value) for at, answer in zip(x, row) if answer.finds]
    if found:
        ax.plot(*zip(*found), **style | {"linestyle": "none"})


def _label_answers(ax, contrast: Contrast, xlabel: str) -> None:
    ax.axhline(0, color="0.3", linewidth=0.8)
    plots.log_scale(ax, "x")
    ax.set_title("\n".join((*textwrap.wrap(contrast.question, 34), name_of(contrast))), fontsize=9)
    ax.set_xlabel(xlabel, fontsize=8)
    ax.set_ylabel(_DIFFERENCE, fontsize=8)


def _aside(sizes: Iterable[str]) -> dict[str, float]:
    """{size: factor of its places on a logarithmic axis}, so that sizes stand side by side around each place."""
    names = list(dict.fromkeys(sizes))
    return {name: _ASIDE ** (number - (len(names) - 1) / 2) for number, name in enumerate(names)}


def _draw_crossing(ax, results: Results, crossing: Crossing, aside: float, style: dict) -> None:
    """Draws a crossing in MB of text, cut at the longest and the shortest run."""
    text = results.texts[crossing.vocabulary]
    scale = text.bytes_per_token / 1e6
    ids, ends = text.vocab_size * aside, (crossing.first * scale, crossing.last * scale)
    value, low, high = (min(max(tokens * scale, ends[0]), ends[1]) for tokens in crossing.tokens)
    plots.with_bars(ax, [ids], [value], [low], [high], f"size {crossing.size}", **style)
    arrow = {"arrowstyle": "->", "color": style["color"]}
    if crossing.tokens.low == 0:
        ax.annotate("", (ids, ends[0] / 1.4), (ids, ends[0]), arrowprops=arrow)
    if crossing.tokens.high == math.inf:
        ax.annotate("", (ids, ends[1] * 1.4), (ids, ends[1]), arrowprops=arrow)


def _label_ids(ax, results: Results) -> None:
    """Puts ticks at the vocabularies, and no others."""
    ids = [text.vocab_size for text in results.texts.values()]
    ax.set_xticks(ids, [f"{number:,}" for number in ids])
    ax.set_xticks([], minor=True)


def _finish(figure, axes: Iterable) -> None:
    """Adds one legend for all panels, outside of them, with every series that one of them has."""
    handles = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
