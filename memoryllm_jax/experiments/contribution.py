"""How much models depend on their FFNs: quality with FFN outputs scaled down, or dropped in some layers."""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, NamedTuple

from memoryllm_jax.common import plots, report
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.evaluation import scores
from memoryllm_jax.evaluation.measure import PERPLEXITY, Measure
from memoryllm_jax.evaluation.scores import Change, Score
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.inference.engine import Contribution, Engine
from memoryllm_jax.model import memories

ALPHAS = ("1.0", "0.9", "0.8", "0.7", "0.6", "0.5")
# The paper's groups of tasks (Table 1), by the beginnings of the tasks' names in the harness. Tasks of
# benchmarks/recall_reasoning.py, and others of one's own, name their group.
GROUPS = {
    "recall": ("lambada", "sciq", "arc_easy", "recall_"),
    "reasoning": ("hellaswag", "winogrande", "boolq", "piqa", "reasoning_"),
}


class Part(NamedTuple):
    """One kind of FFN of a model, which is scaled or dropped while the rest of the model stays as it is.

    name: of its series in tables and pictures.
    alpha: the field of `Contribution` that scales this kind of FFN.
    drop: the field of `Contribution` that drops it in some layers.
    """

    name: str
    alpha: str
    drop: str


def parts(config: ModelConfig, label: str) -> list[Part]:
    """The kinds of FFN that a model has: base its FFN, memory FFN-M, and flex both FFN-M and FFN-C.

    Rows of other token memories take the place of FFN-M.

    Args:
      label: the model's name, which the parts' names begin with.
    Raises: ArgumentError if rows are a part of attention, so that a factor of them would scale something else.
    """
    memory = memories.of(config)
    if config.row_dim and not (memory.adds_rows or memory.gate_weights):
        expected = "expected models that add FFN outputs or rows to the residual stream"
        raise ArgumentError("workdir", f"{expected}, found {label}, whose rows are values of attention")
    if not (config.row_dim and config.compute_dim):
        return [Part(label, "alpha", "drop_layers")]
    memory = "FFN-M" if config.token_memory == "ffn" else "rows"
    return [
        Part(f"{label}, {memory}", "alpha", "drop_layers"),
        Part(f"{label}, FFN-C", "alpha_compute", "drop_compute"),
    ]


# FFNs scaled by alpha


def alpha(
    models: Models,
    page: report.Report,
    *,
    measure: Measure,
    alphas: Annotated[tuple[str, ...], Option("factors of the FFN outputs; 1.0 is always measured too")] = ALPHAS,
) -> dict:
    """FFN outputs are multiplied by alpha in every layer (MemoryLLM, Table 1 and Figure 7).

    In base alpha scales the FFN, in memory FFN-M. In flex it scales either FFN-M or FFN-C, and the other one stays
    whole. Changes are relative to alpha 1, in percent as in the paper, and of accuracies in points too: where chance is
    half of the accuracy, no model can lose more than 50%. Standard errors are over documents of the text and examples
    of the tasks. Recall (LAMBADA, SciQ, ARC-Easy, recall_*) and reasoning (HellaSwag, WinoGrande, BoolQ, PIQA,
    reasoning_*) are the paper's groups of tasks, and those whose names begin so; the change of a group is the mean over
    its tasks that ran.
    """
    values = _alphas(alphas)
    quality: dict[str, dict[float, dict[str, Score]]] = {}
    for label, model in models:
        for part in parts(model.config, label):
            quality[part.name] = {}
            for value in values:
                model.contribute(Contribution(**{part.alpha: value}))
                quality[part.name][value] = found = measure(model)
                print(f"{part.name}, alpha {value:g}: {scores.text(found)}", flush=True)
    page.facts |= scores.facts(found)
    changes = {name: _by_alpha(by_alpha, scores.changes) for name, by_alpha in quality.items()}
    points = {name: _by_alpha(by_alpha, scores.points) for name, by_alpha in quality.items()}
    _alpha_table(page, quality, changes, points)
    for metric in _names(changes):
        figure = _draw_alpha(changes, metric)
        page.figure(metric.replace(" ", "-"), figure, f"Change of {metric} against alpha (Figure 7)")
    for metric in _names(points):
        figure = _draw_alpha(points, metric, "points")
        page.figure(f"{metric.replace(' ', '-')}-points", figure, f"Change of {metric} against alpha, in points")
    return {
        "quality": _each(quality, scores.values),
        "changes": _each(changes, scores.amounts),
        "errors": _each(changes, scores.errors),
        "points": _each(points, scores.amounts),
        "points_errors": _each(points, scores.errors),
    }


def _each(by_series: dict[str, dict], read: Callable) -> dict[str, dict]:
    """What `read` gives for each series and each value of alpha."""
    return {name: {value: read(found) for value, found in series.items()} for name, series in by_series.items()}


def _alphas(texts: Iterable[str]) -> list[float]:
    """The factors as numbers, from large to small, with 1 among them. Raises: ArgumentError."""
    try:
        values = [float(text) for text in texts]
    except ValueError as error:
        raise ArgumentError("alphas", f"expected numbers such as 1.0,0.5: {error}") from error
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ArgumentError("alphas", f"expected numbers of zero or more, found {','.join(texts)}")
    return sorted({1.0, *values}, reverse=True)


def _by_alpha(by_alpha: dict[float, dict[str, Score]], changes_of: Callable) -> dict[float, dict[str, Change]]:
    """Changes against alpha 1, by `changes_of`, of each metric and of each group of tasks."""
    changes = {}
    for value, found in by_alpha.items():
        of_tasks = changes_of(found, by_alpha[1.0])
        changes[value] = of_tasks | group_means(of_tasks)
    return changes


def _names(by_series):
    """The names of the columns, which are the same in all series and for all values of alpha."""
    by_alpha = next(iter(by_series.values()))
    return list(by_alpha[1.0])


def _alpha_table(page, quality, changes, points):
    columns = [*scores.change_columns(_names(changes)), *scores.change_columns(_names(points), "points")]
    head = ["model", "alpha", *_names(quality), *columns]
    rows = []
    for name, by_alpha in quality.items():
        for value, found in by_alpha.items():
            cells = [*scores.change_cells(changes[name][value]), *scores.change_cells(points[name][value])]
            rows.append([name, f"{value:g}", *scores.values(found).values(), *cells])
    page.table(head, rows, "Quality as FFN outputs are scaled down (Table 1); changes against alpha 1", csv="alpha")


def _draw_alpha(changes, metric, unit="%") -> plots.Chart:
    lines = {}
    for name, by_alpha in changes.items():
        of_metric = [found[metric] for found in by_alpha.values()]
        lines[name] = plots.Line(list(by_alpha), *zip(*of_metric))
    # Changes of perplexity may be negative, and reach thousands of percent.
    scale = "change" if metric == PERPLEXITY else "linear"
    return plots.Chart(lines, "alpha", f"change of {metric}, {unit}", "falling", scale)


def group_of(task: str) -> str | None:
    """The group of a task: "recall", "reasoning" or None. A name "TASK METRIC", without accuracy, is in no group."""
    for group, names in GROUPS.items():
        if task.startswith(names) and " " not in task:
            return group
    return None


def group_means(changes: dict[str, Change]) -> dict[str, Change]:
    """Mean change of each group's tasks, without those whose change is NaN, as the whole model's score is 0."""
    means = {}
    for group in GROUPS:
        found = [one for task, one in changes.items() if group_of(task) == group and math.isfinite(one.amount)]
        if found:
            # The tasks' examples are drawn independently.
            error = math.sqrt(sum(one.error**2 for one in found)) / len(found)
            means[group] = Change(sum(one.amount for one in found) / len(found), error)
    return means


# FFNs dropped in some layers


class Drop(NamedTuple):
    """A layer that was dropped in addition to those before it, and the cost of the model without all of them."""

    layer: int
    cost: float


class Dropped(NamedTuple):
    """Quality of a model whose layers lose one kind of FFN.

    whole: quality of the whole model.
    without_layer: quality without each single layer's FFN.
    cumulative: layers dropped one after another, with perplexity as the cost; empty without a text.
    cumulative_quality: quality after each of these drops; empty without tasks.
    """

    whole: dict[str, Score]
    without_layer: list[dict[str, Score]]
    cumulative: list[Drop]
    cumulative_quality: list[dict[str, Score]]


def layers(
    models: Models,
    page: report.Report,
    *,
    measure: Measure,
    cumulative: Annotated[int, Option("layers to drop one after another; 0: all", least=0)] = 0,
) -> dict:
    """The FFN of one layer is dropped, for each layer (MemoryLLM, Figures 4 and 12); then those of several layers.

    In base that is the layer's FFN, in memory its FFN-M, live or looked up. In flex it is either FFN-M or FFN-C, and
    the other one stays. Changes are relative to the whole model, in percent, with standard errors over documents of the
    text and examples of the tasks. The cumulative part then drops one layer after another, each time the one without
    which perplexity rises least, until --cumulative are gone (0: all).
    """
    if cumulative and not measure.text.data:
        raise ArgumentError("cumulative", "expected data too, as layers are chosen by their effect on perplexity")
    fewest = min(config.layers for config in models.configs)
    if cumulative > fewest:
        raise ArgumentError("cumulative", f"expected at most {fewest} layers, as the models have, found {cumulative}")
    series = {}
    for label, model in models:
        for part in parts(model.config, label):
            series[part.name] = _drop_layers(model, part, measure, cumulative or model.config.layers)
    dropped = {name: found.cumulative for name, found in series.items() if found.cumulative}
    together = {name: found.cumulative_quality for name, found in series.items() if found.cumulative_quality}
    page.facts |= scores.facts(next(iter(series.values())).whole)
    changes = {
        name: [scores.changes(one, found.whole) for one in found.without_layer] for name, found in series.items()
    }
    _show_single_layers(page, series, changes)
    if dropped:
        _show_cumulative(page, dropped, {name: series[name].whole[PERPLEXITY].value for name in dropped})
    if together:
        _show_cumulative_quality(page, together)
    return {
        "whole": {name: scores.values(found.whole) for name, found in series.items()},
        "without_layer": {name: [scores.values(one) for one in found.without_layer] for name, found in series.items()},
        "changes": {name: [scores.amounts(one) for one in by_layer] for name, by_layer in changes.items()},
        "errors": {name: [scores.errors(one) for one in by_layer] for name, by_layer in changes.items()},
        "cumulative": dropped,
        "cumulative_quality": {name: [scores.values(one) for one in steps] for name, steps in together.items()},
    }


def _drop_layers(model: Engine, part: Part, measure: Measure, count: int) -> Dropped:
    """Measures without each layer's part, then drops `count` layers one after another."""

    def without(*gone):
        model.contribute(Contribution(**{part.drop: gone}))
        return model

    whole = measure(without())
    print(f"{part.name}: {scores.text(whole)}", flush=True)
    singles = []
    for layer in range(model.config.layers):
        singles.append(measure(without(layer)))
        print(f"{part.name} without layer {layer}: {scores.text(singles[-1])}", flush=True)
    if PERPLEXITY not in whole:
        return Dropped(whole, singles, [], [])
    costs = [found[PERPLEXITY].value for found in singles]
    drops = greedy(lambda gone: measure.perplexity(without(*gone)).value, costs, count)
    order = [drop.layer for drop in drops]
    print(f"{part.name}: dropped in the order {', '.join(map(str, order))}", flush=True)
    together = []
    if measure.tasks.tasks:
        together = [measure(without(*order[: n + 1])) for n in range(len(order))]
    return Dropped(whole, singles, drops, together)


def greedy(cost_without: Callable[[list[int]], float], singles: list[float], count: int) -> list[Drop]:
    """Drops `count` layers one after another, each time the one without which the cost is least.

    Args:
      cost_without: measures the cost without some layers.
      singles: the cost without each single layer, which the caller has measured already.
    """
    drops: list[Drop] = []
    left = list(range(len(singles)))
    while len(drops) < count:
        gone = [drop.layer for drop in drops]
        # All remaining layers are measured again after each drop: their costs depend on which ones are gone.
        costs = {layer: cost_without([*gone, layer]) if gone else singles[layer] for layer in left}
        best = min(costs, key=costs.get)
        drops.append(Drop(best, costs[best]))
        left.remove(best)
    return drops


def _show_single_layers(page, series: dict[str, Dropped], changes: dict[str, list[dict[str, Change]]]):
    metrics = list(next(iter(series.values())).whole)
    rows = []
    for name, found in series.items():
        rows.append(
            [
                name,
                "none",
                *scores.values(found.whole).values(),
                *scores.change_cells(scores.changes(found.whole, found.whole)),
            ]
        )
        for layer, (one, changed) in enumerate(zip(found.without_layer, changes[name])):
            rows.append([name, layer, *scores.values(one).values(), *scores.change_cells(changed)])
    head = ["model", "layer dropped", *metrics, *scores.change_columns(metrics)]
    page.table(head, rows, "Quality without one layer's FFN", csv="layers")
    for metric in metrics:
        lines = {}
        for name, by_layer in changes.items():
            lines[name] = plots.Line(range(len(by_layer)), *zip(*(changed[metric] for changed in by_layer)))
        page.figure(
            metric.replace(" ", "-"),
            plots.Chart(lines, "layer", f"change of {metric}, %", "layers", "change"),
            f"Change of {metric} without a layer's FFN (Figures 4 and 12); logarithmic from 1% on",
        )


def _show_cumulative(page, dropped: dict[str, list[Drop]], whole: dict[str, float]):
    lines = {}
    for name, drops in dropped.items():
        points = [0.0, *(100 * (drop.cost / whole[name] - 1) for drop in drops)]
        lines[name] = plots.Line(range(len(points)), points)
    page.figure(
        "cumulative",
        plots.Chart(lines, "layers dropped, least harmful first", "change of perplexity, %", "layers", "change"),
        "Change of perplexity as layers' FFNs are dropped one after another; logarithmic from 1% on",
    )
    rows = [[name, n, *drop] for name, drops in dropped.items() for n, drop in enumerate(drops, 1)]
    head = ["model", "layers dropped", "last of them", "perplexity"]
    page.table(head, rows, "Layers' FFNs dropped one after another", csv="cumulative")


def _show_cumulative_quality(page, together: dict[str, list[dict[str, Score]]]):
    metrics = list(next(iter(together.values()))[0])
    rows = [
        [name, n, *scores.values(found).values()]
        for name, steps in together.items()
        for n, found in enumerate(steps, 1)
    ]
    page.table(["model", "layers dropped", *metrics], rows, "Quality as layers' FFNs are dropped one after another")
