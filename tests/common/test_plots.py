"""Axes that people can read."""

import pytest

from memoryllm_jax.common import plots


def ticks(ax):
    ax.figure.draw_without_rendering()
    low, high = ax.get_ylim()
    return [t.get_text() for t in ax.get_yticklabels() if low <= t.get_position()[1] <= high]


@pytest.mark.parametrize("values", [[0.719, 0.73, 0.75], [0.02, 0.7, 1.3], [1e-6, 1e-3, 0.5]])
def test_a_logarithmic_axis_has_a_few_plain_numbers(values):
    (ax,) = plots.by_layer({"loss": values}, "loss", "log").draw().axes
    assert 3 <= len(ticks(ax)) <= 12
    # Not matplotlib's own form, such as 7.19032 x 10^-1.
    assert all(float(text.replace("\N{MINUS SIGN}", "-")) > 0 for text in ticks(ax))


def test_percent_stands_at_the_ticks():
    (ax,) = plots.by_layer({"share": [10, 40, 55]}, "share, %").draw().axes
    assert ax.get_ylabel() == "share" and all(text.endswith("%") for text in ticks(ax))
    _, ax = plots.new_figure()
    ax.plot([-3, 0.4, 2500])
    plots.change_scale(ax)
    assert {"\N{MINUS SIGN}1%", "0%", "1%", "1000%"} <= set(ticks(ax))
