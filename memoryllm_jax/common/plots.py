"""Figures in one style. matplotlib is optional, so it is imported when the first figure is made."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
    figure, axes_RC = new_grid(1, columns, width, height)
    return figure, axes_RC[0, 0] if columns == 1 else axes_RC[0]


def new_grid(rows: int, columns: int, width: float, height: float):
    """Makes a figure with axes in rows and columns.

    Args:
      width, height: size in inches.
    Returns: (figure, array of its axes [rows, columns]). Raises: UserError if matplotlib is not installed.
    """
    # Not pyplot, which keeps every figure in memory and may look for a display.
    matplotlib = errors.require("matplotlib.figure", "analyze", "pictures")
    figure = matplotlib.Figure((width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
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


def with_bars(ax, x, values, low, high, label: str, **style) -> None:
    """Draws a series with a vertical bar from `low` to `high` at each point.

    Args:
      style: as of matplotlib's `plot`, such as `style_of` returns it.
    """
    (line,) = ax.plot(x, values, **style, label=label)
    # Not `errorbar`, which refuses an interval that does not hold the value.
    ax.vlines(x, low, high, color=line.get_color(), linewidth=1)


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


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
      x, y: the points.
      error: half the length of each point's error bar; None: no bars.
      style: matplotlib's options that differ from those of `style_of`.
    """

    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    style: Mapping[str, object] = {}


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure as data, so that the charts of several seeds can become one.

    Attributes:
      lines: by name. "NAME, chance" is drawn as NAME is, but dotted.
      xlabel, ylabel: labels of the axes; a ylabel that ends in ", %" puts the % at the ticks.
      x_scale: linear, log, layers (whole numbers) or falling.
      y_scale: linear, zero (linear from 0 on, unless a value is negative), log, or change (as `change_scale`).
      bottom: lower end of the y axis; None: that of the values.
      is_stacked: whether each line is a part of bars, one for each layer.
    """

    lines: Mapping[str, Line]
    xlabel: str
    ylabel: str
    x_scale: str = "linear"
    y_scale: str = "linear"
    bottom: float | None = None
    is_stacked: bool = False

    def draw(self):
        """Draws the chart. Returns: the figure."""
        figure, ax = new_figure()
        if self.is_stacked:
            below = 0.0
            for name, line in self.lines.items():
                ax.bar(line.x, line.y, bottom=below, label=name)
                below = below + np.array(line.y)
        else:
            self._draw_lines(ax)
        ax.set_xlabel(self.xlabel)
        label_y(ax, self.ylabel)
        self._scale(ax)
        if self.is_stacked or len(self.lines) > 1:
            legend(ax)
        return figure

    def _draw_lines(self, ax) -> None:
        names = list(dict.fromkeys(name.removesuffix(_CHANCE) for name in self.lines))
        for name, line in self.lines.items():
            style = style_of(names.index(name.removesuffix(_CHANCE)))
            if name.endswith(_CHANCE):
                style["linestyle"] = ":"
            style |= {"label": name, "capsize": 2, "elinewidth": 0.8} | dict(line.style)
            ax.errorbar(line.x, line.y, line.error, **style)

    def _scale(self, ax) -> None:
        from matplotlib.ticker import MaxNLocator

        if self.x_scale == "layers":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif self.x_scale == "log":
            log_scale(ax, "x")
        elif self.x_scale == "falling":
            ax.invert_xaxis()
        if self.y_scale == "log":
            log_scale(ax)
        elif self.y_scale == "change":
            change_scale(ax)
        elif self.y_scale == "zero" and not any(value < 0 for line in self.lines.values() for value in line.y):
            # The axis begins at 0, because heights of lines would otherwise exaggerate small differences.
            ax.update_datalim([(0, 0)], updatex=False)
            ax.autoscale_view()
            ax.set_ylim(bottom=0)
        if self.bottom is not None:
            ax.set_ylim(bottom=self.bottom)


def by_layer(
    series: dict[str, Sequence[float]], ylabel: str, y_scale: str = "zero", layers: Sequence[int] | None = None
) -> Chart:
    """A chart with one line for each series over the layers.

    Args:
      series: values by name, shares in percent.
      ylabel, y_scale: as of `Chart`.
      layers: numbers of the layers; by default from 0.
    """
    lines = {name: Line(range(len(y)) if layers is None else layers, y) for name, y in series.items()}
    return Chart(lines, "layer", ylabel, "layers", y_scale)


def stacked_by_layer(series: dict[str, Sequence[float]], ylabel: str) -> Chart:
    """A chart with one bar for each layer, in which the values of the series are stacked."""
    lines = {name: Line(range(len(values)), values) for name, values in series.items()}
    return Chart(lines, "layer", ylabel, "layers", is_stacked=True)
