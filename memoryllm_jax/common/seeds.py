"""One page of what several seeds of a model have in common: the mean of each number, and its standard deviation.

A measurement writes a page of each seed. Here their tables, charts and results become one page. What differs in its
kind from seed to seed, such as the tokens of a model's strongest keys, stays on the pages of the seeds.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common import report
from memoryllm_jax.common.plots import Chart, Line
from memoryllm_jax.common.report import Figure, Markup, Report, Spread, Table


class Seed(NamedTuple):
    """What is measured of one seed.

    title, facts: of its page, as of `Report`.
    measure: fills a page, and returns the results for its JSON file.
    """

    title: str
    facts: dict[str, str]
    measure: Callable[[Report], object]


def write(output: str, name: str, text: str, seeds: Iterable[Seed], count: int) -> str:
    """Measures each seed. Writes its page, of several seeds into OUTPUT/seed-NUMBER each, and one of all into OUTPUT.

    Args:
      output, name: as of `Report`.
      text: what the pages begin with.
      seeds: taken one after another, so that only one model needs to be open at a time.
      count: their number.
    Returns: one line that says what was written. Raises: UserError.
    """

    def measured(seed: Seed, folder: str) -> tuple[Report, object, str]:
        with Report(folder, name, seed.title, seed.facts) as page:
            page.text(text)
            results = seed.measure(page)
            return page, report.plain(results), page.write(results)

    if count == 1:
        (only,) = seeds
        return measured(only, output)[-1]
    pages, results = [], []
    # Opened first, so that a folder that cannot be written to is refused before the first seed is measured.
    with Report(output, name, name, {}) as whole:
        for number, seed in enumerate(seeds):
            page, found, line = measured(seed, os.path.join(output, f"seed-{number}"))
            print(line, flush=True)
            pages.append(page)
            results.append(found)
        whole.title = pages[0].title
        spread = f"mean ± standard deviation of {count} seeds; each has a page of its own in seed-NUMBER"
        whole.facts = _common_facts([page.facts for page in pages]) | {"spread": spread}
        fill(whole, pages)
        return whole.write(mean(results), sd=deviation(results), seeds=count)


def _common_facts(facts: list[dict[str, str]]) -> dict[str, str]:
    """The facts of all seeds; values that differ from seed to seed follow one another."""
    return {name: "; ".join(dict.fromkeys(one[name] for one in facts if name in one)) for name in facts[0]}


def fill(whole: Report, pages: Sequence[Report]) -> None:
    """Adds to a page what the pages of all seeds have, in the order of the first one."""
    found = [_by_key(page) for page in pages]
    elements = []
    for key, first in found[0].items():
        same = [of_page[key] for of_page in found if key in of_page]
        if len(same) < len(pages):
            continue
        if isinstance(first, Markup):
            elements.append(first)
        elif isinstance(first, Table) and (rows := _rows(same)) is not None:
            elements.append(first._replace(rows=rows))
        elif isinstance(first, Figure) and (chart := _chart([one.figure for one in same])) is not None:
            captions = {one.caption for one in same}
            note = "" if len(captions) == 1 else " (counts of the first seed)"
            elements.append(first._replace(figure=chart, caption=first.caption + note))
    for element, after in zip(elements, [*elements[1:], None]):
        if isinstance(element, Table):
            whole.table(*element)
        elif isinstance(element, Figure):
            whole.figure(element.name, element.figure, element.caption)
        elif not (_is_heading(element) and (after is None or _is_heading(after))):  # nothing of its part is common
            whole.raw(element.html)


def _is_heading(element) -> bool:
    return isinstance(element, Markup) and element.html.startswith("<h2>")


def _by_key(page: Report) -> dict[tuple, Markup | Table | Figure]:
    """The elements of a page by what two seeds call the same: the HTML, a table's head and number, a figure's name."""
    found: dict[tuple, Markup | Table | Figure] = {}
    for element in page.elements:
        if isinstance(element, Markup):
            found["text", element.html] = element
        elif isinstance(element, Table):
            number = sum(1 for key in found if key[:2] == ("table", tuple(element.head)))
            found["table", tuple(element.head), number] = element
        else:
            found["figure", element.name] = element
    return found


def _rows(tables: Sequence[Table]) -> list[list] | None:
    """The rows of all seeds' tables as one; None if they have not the same labels."""
    if len({len(table.rows) for table in tables}) > 1:
        return None
    rows = []
    for of_seeds in zip(*(table.rows for table in tables)):
        cells = [_cell(cell) for cell in zip(*of_seeds)]
        if None in cells:
            return None
        rows.append(cells)
    return rows


def _cell(values: tuple):
    """A cell for all seeds: what is the same, or measured numbers as a `Spread`; None for labels that differ.

    Whole numbers that differ, such as the layer that is dropped first, stand one after another.
    """
    if all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, float | np.floating) for value in values):
        return Spread(float(np.mean(values)), _sd(values))
    if all(isinstance(value, int | np.integer) for value in values):
        return " / ".join(map(str, values))
    return None


def _sd(values) -> float:
    return float(np.std(np.asarray(values, float), ddof=1))


def _chart(charts: Sequence[object]) -> Chart | None:
    """The charts of all seeds as one, with means and error bars; None if they have not the same lines."""
    if not all(isinstance(chart, Chart) for chart in charts):
        return None
    lines = {}
    for name, first in charts[0].lines.items():
        same = [chart.lines[name] for chart in charts if name in chart.lines]
        if len(same) < len(charts) or len({len(line.y) for line in same}) > 1:
            return None
        y_SN = np.array([line.y for line in same], float)
        x_N = np.mean([line.x for line in same], axis=0)
        lines[name] = Line(x_N, y_SN.mean(0), y_SN.std(0, ddof=1), first.style)
    return dataclasses.replace(charts[0], lines=lines)


def mean(results: Sequence[object]):
    """The means of the numbers in trees of JSON. Other leaves stay where all have the same, else all are listed."""
    return _over(results, lambda values: _one_or_all(values, float(np.mean(values))), _one_or_all)


def deviation(results: Sequence[object]):
    """The standard deviations of the numbers in trees of JSON, with null in place of other leaves."""
    return _over(results, _sd, lambda values: None)


def _one_or_all(values: Sequence[object], otherwise: float | None = None):
    """The value that all seeds have, or else `otherwise`, or else the list of all values."""
    if all(value == values[0] for value in values):
        return values[0]
    return list(values) if otherwise is None else otherwise


def _over(trees: Sequence[object], of_numbers: Callable, of_others: Callable):
    """One tree of several, with a function of their floats and one of their other leaves."""
    first = trees[0]
    if all(isinstance(tree, dict) and tree.keys() == first.keys() for tree in trees):
        return {key: _over([tree[key] for tree in trees], of_numbers, of_others) for key in first}
    if all(isinstance(tree, list) and len(tree) == len(first) for tree in trees):
        return [_over(leaves, of_numbers, of_others) for leaves in zip(*trees)]
    if all(isinstance(tree, float) for tree in trees):
        return of_numbers(trees)
    return of_others(trees)
