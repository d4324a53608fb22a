"""Figures in one style. matplotlib is imported when the first figure is made."""

import itertools

import numpy as np

from memoryllm_jax.common.errors import UserError


def new_figure(width: float = 7.0, height: float = 3.6, columns: int = 1):
    """(figure, axes): a list of axes if there are several columns. Raises: UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'memoryllm_jax[analyze]'") from error
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return figure, axes


def legend(axis, **more) -> None:
    """Beside the axis, where it covers nothing."""
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), **more)


def style_of(number: int) -> dict:
    """Colour, marker and line of the number-th series: told apart in print too."""
    line = ("-", "--")[number // 8 % 2]
    return {"color": f"C{number % 10}", "marker": "osv^Dx*+"[number % 8], "markersize": 4, "linestyle": line}


def shade(share: float):
    """A colour from dark (0) to light (1), for what has an order, such as layers."""
    from matplotlib import colormaps

    return colormaps["viridis"](share)


def log_scale(axis) -> None:
    """A logarithmic y axis with plain numbers, however few decades it spans."""
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8), numticks=14))
    axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def drawable(text: str) -> bool:
    """Whether matplotlib's font has all of the text's characters; those that it lacks would be boxes."""
    from matplotlib import font_manager

    glyphs = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    return all(ord(c) in glyphs for c in text)


def by_layer(series: dict[str, list[float]], label: str, log: bool = False, layers: list[int] | None = None):
    """A figure of one line for each series over the layers; a share is best given in percent.

    The series "NAME, chance" is drawn as NAME, dotted.
    """
    from matplotlib.ticker import MaxNLocator

    figure, ax = new_figure()
    subjects = list(dict.fromkeys(name.removesuffix(", chance") for name in series))
    for name, values in series.items():
        at = range(len(values)) if layers is None else layers
        subject = name.removesuffix(", chance")
        style = style_of(subjects.index(subject)) | ({"linestyle": ":"} if name != subject else {})
        ax.plot(at, values, **style, label=name)
    ax.set_xlabel("layer")
    ax.set_ylabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        ax.set_yscale("log")
    elif not any(value < 0 for value in itertools.chain(*series.values())):
        ax.update_datalim([(0, 0)], updatex=False)
        ax.autoscale_view()
        ax.set_ylim(bottom=0)
    if len(series) > 1:
        legend(ax)
    return figure
