"""Figures in one style. matplotlib is optional, and imported when the first figure is made."""

from collections.abc import Sequence

import numpy as np

from memoryllm_jax.common import errors

_CHANCE = ", chance"


def new_figure(width: float = 7.0, height: float = 3.6, columns: int = 1):
    """A figure and its axes: a list of them if there are several columns.

    Args:
      width, height: in inches.
    Raises: UserError without matplotlib.
    """
    matplotlib = errors.require("matplotlib.figure", "analyze", "pictures")
    figure = matplotlib.Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return figure, axes


def legend(ax, **options) -> None:
    """A legend outside the axes, on the right, where it covers no data."""
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), **options)


def style_of(number: int) -> dict:
    """Colour, marker and line style of the number-th series, which differ in black and white too."""
    return {
        "color": f"C{number % 10}",
        "marker": "osv^Dx*+"[number % 8],
        "markersize": 4,
        "linestyle": ("-", "--")[number // 8 % 2],
    }


def shade(share: float):
    """A colour from dark (0) to light (1), for series that have an order, such as layers."""
    from matplotlib import colormaps

    return colormaps["viridis"](share)


def log_scale(ax) -> None:
    """A logarithmic y axis with plain numbers at its ticks, even if it spans less than a decade."""
    from matplotlib import ticker

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8), numticks=14))
    ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())


def drawable(text: str) -> bool:
    """Whether matplotlib's font has all characters of the text; it draws boxes for those that it lacks."""
    from matplotlib import font_manager

    glyphs = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    return all(ord(c) in glyphs for c in text)


def by_layer(series: dict[str, Sequence[float]], ylabel: str, log: bool = False, layers: Sequence[int] | None = None):
    """A figure with one line for each series over the layers. Shares are best given in percent.

    Args:
      series: values by name. "NAME, chance" is drawn as NAME is, but dotted.
      log: logarithmic y axis.
      layers: numbers of the layers; by default from 0.
    """
    figure, ax = new_figure()
    names = list(dict.fromkeys(name.removesuffix(_CHANCE) for name in series))
    for name, values in series.items():
        style = style_of(names.index(name.removesuffix(_CHANCE)))
        if name.endswith(_CHANCE):
            style["linestyle"] = ":"
        ax.plot(range(len(values)) if layers is None else layers, values, **style, label=name)
    _label(ax, ylabel)
    if log:
        ax.set_yscale("log")
    elif not any(value < 0 for values in series.values() for value in values):
        # The axis begins at 0, so that lengths compare as the values do.
        ax.update_datalim([(0, 0)], updatex=False)
        ax.autoscale_view()
        ax.set_ylim(bottom=0)
    if len(series) > 1:
        legend(ax)
    return figure


def stacked_by_layer(series: dict[str, Sequence[float]], ylabel: str):
    """A figure with one bar for each layer, in which the values of the series are stacked."""
    figure, ax = new_figure()
    bottom = 0.0
    for name, values in series.items():
        ax.bar(range(len(values)), values, bottom=bottom, label=name)
        bottom = bottom + np.array(values)
    _label(ax, ylabel)
    legend(ax)
    return figure


def _label(ax, ylabel) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("layer")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
