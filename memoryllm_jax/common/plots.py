"""Figures in one style. matplotlib is optional, so it is imported when the first figure is made."""

from collections.abc import Sequence

import numpy as np

from memoryllm_jax.common import errors

_PERCENT = ", %"  # ends the labels of axes that show percent
_CHANCE = ", chance"  # ends the names of series that show what chance alone would give


def new_figure(width: float = 7.0, height: float = 3.6, columns: int = 1):
    """Makes a figure. Returns: (figure, its axes), with an array of axes if there are several columns.

    Args:
      width, height: size in inches.
      columns: axes side by side.
    Raises: UserError if matplotlib is not installed.
    """
    # Not pyplot, which keeps every figure in memory and may look for a display.
    matplotlib = errors.require("matplotlib.figure", "analyze", "pictures")
    figure = matplotlib.Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return figure, axes


def check_available() -> None:
    """Raises: UserError if matplotlib is not installed. Called before long work whose result is drawn."""
    errors.require("matplotlib.figure", "analyze", "pictures")


def legend(ax, **options) -> None:
    """Adds a legend outside the axes, on the right, where it covers no data."""
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), **options)


def style_of(number: int) -> dict:
    """Colour, marker and line style of the series with a number, so that series differ in black and white too."""
    return {
        "color": f"C{number % 10}",
        "marker": "osv^Dx*+"[number % 8],
        "markersize": 4,
        "linestyle": ("-", "--")[number // 8 % 2],  # the second eight have the same markers on dashed lines
    }


def shade(share: float):
    """A colour from dark (0) to light (1), for series that have an order, such as layers."""
    from matplotlib import colormaps

    return colormaps["viridis"](share)


def log_scale(ax, which: str = "y") -> None:
    """Makes the x or y axis logarithmic, with plain numbers at its ticks. Call it when the data is drawn."""
    from matplotlib import ticker

    ax.set(**{f"{which}scale": "log"})
    low, high = getattr(ax, f"get_{which}lim")()
    # matplotlib's own ticks are powers of ten, of which an axis that spans less than a decade may have none.
    decades = np.log10(high / low)
    if decades < 1.5:
        digits = (1, 1.5, 2, 3, 4, 5, 6, 8)
    elif decades < 4:
        digits = (1, 2, 5)
    else:
        digits = (1,)
    _plain_ticks(getattr(ax, f"{which}axis"), ticker.LogLocator(subs=digits, numticks=14))


def change_scale(ax) -> None:
    """Scales a y axis of changes in percent: linear from -1% to 1%, and logarithmic on both sides beyond."""
    from matplotlib import ticker

    ax.set_yscale("symlog", linthresh=1)
    locator = ticker.SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5))
    locator.numticks = 12
    _plain_ticks(ax.yaxis, locator, "{x:g}%")


def _plain_ticks(axis, locator, text: str = "{x:g}") -> None:
    """Labels the locator's ticks with plain numbers, and no others."""
    from matplotlib import ticker

    axis.set_major_locator(locator)
    axis.set_major_formatter(ticker.StrMethodFormatter(text))
    axis.set_minor_formatter(ticker.NullFormatter())


def label_y(ax, label: str) -> None:
    """Labels the y axis. A label that ends in ", %" puts the % at the ticks."""
    if label.endswith(_PERCENT):
        ax.yaxis.set_major_formatter("{x:g}%")
    ax.set_ylabel(label.removesuffix(_PERCENT))


def drawable(text: str) -> bool:
    """Whether matplotlib's font has all characters of a text. It draws boxes in place of those that it lacks."""
    from matplotlib import font_manager

    glyphs = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    return all(ord(c) in glyphs for c in text)


def by_layer(series: dict[str, Sequence[float]], ylabel: str, log: bool = False, layers: Sequence[int] | None = None):
    """Draws one line for each series over the layers. Returns: the figure.

    Args:
      series: values by name, shares in percent. "NAME, chance" is drawn as NAME is, but dotted.
      ylabel: label of the y axis; one that ends in ", %" puts the % at the ticks.
      log: whether the y axis is logarithmic.
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
        log_scale(ax)
    elif not any(value < 0 for values in series.values() for value in values):
        # The axis begins at 0, because heights of lines would otherwise exaggerate small differences.
        ax.update_datalim([(0, 0)], updatex=False)
        ax.autoscale_view()
        ax.set_ylim(bottom=0)
    if len(series) > 1:
        legend(ax)
    return figure


def stacked_by_layer(series: dict[str, Sequence[float]], ylabel: str):
    """Draws one bar for each layer, in which the values of the series are stacked. Returns: the figure."""
    figure, ax = new_figure()
    bottom = 0.0
    for name, values in series.items():
        ax.bar(range(len(values)), values, bottom=bottom, label=name)
        bottom = bottom + np.array(values)
    _label(ax, ylabel)
    legend(ax)
    return figure


def _label(ax, ylabel) -> None:
    """Labels the axes of a figure over layers."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("layer")
    label_y(ax, ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
