"""How much models lean on their FFNs: what is lost when these add less, or nothing in some layers."""

import math

from memoryllm_jax.common import plots, report
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.evaluation.measure import PERPLEXITY, Measure, change, group_means, kinds
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.inference.engine import Contribution

ALPHAS = ("1.0", "0.9", "0.8", "0.7", "0.6", "0.5")


def alpha(models: Models, page: report.Report, measure: Measure, alphas: tuple = ALPHAS) -> dict:
    """What the FFN adds is multiplied by alpha in every layer (MemoryLLM, Table 1 and Figure 7).

    In base alpha is a factor of the FFN, in memory of FFN-M; in flex of either, the other left as it is. Changes are
    relative to alpha 1, in percent. Recall (LAMBADA, SciQ, ARC-Easy) and reasoning (HellaSwag, WinoGrande, BoolQ, PIQA)
    are the paper's groups; their change is the mean over their tasks here.
    """
    values = _numbers(alphas)
    series = {}
    for label, model in models:
        for name, ending in kinds(model, label).items():
            series[name] = {}
            for value in values:
                model.contribute(Contribution(**{f"alpha{ending}": value}))
                series[name][value] = found = measure(model)
                print(f"{name}, alpha {value:g}: {_text(found)}", flush=True)
    metrics = list(next(iter(series.values()))[1.0])
    rows, changes = [], {}
    for name, by_alpha in series.items():
        changes[name] = {}
        for value, found in by_alpha.items():
            relative = {metric: change(found[metric], by_alpha[1.0][metric]) for metric in metrics}
            changes[name][value] = relative | group_means(relative)
            rows.append([name, value, *found.values(), *changes[name][value].values()])
    columns = list(next(iter(changes.values()))[1.0])
    head = ["model", "alpha", *metrics, *(f"{name} change, %" for name in columns)]
    page.table(head, rows, "Quality as the FFN's contribution falls (Table 1); changes against alpha 1", csv="alpha")
    for metric in columns:
        figure, axis = plots.new_figure()
        for number, (name, by_alpha) in enumerate(changes.items()):
            points = [by_alpha[value][metric] for value in values]
            axis.plot(values, points, **plots.style_of(number), label=name)
        axis.invert_xaxis()
        axis.set(xlabel="alpha", ylabel=f"change of {metric}, %")
        if metric == PERPLEXITY:
            axis.set_yscale("symlog", linthresh=1)
        plots.legend(axis)
        page.figure(metric.replace(" ", "-"), figure, f"Change of {metric} against alpha (Figure 7)")
    return {"quality": series, "changes": changes}


def layers(models: Models, page: report.Report, measure: Measure, cumulative: int = 0) -> dict:
    """One layer's FFN adds nothing (MemoryLLM, Figures 4 and 12), for every layer; then several at once.

    In base that is its FFN, in memory its FFN-M, live or looked up; in flex either, the other left as it is. Changes
    are relative to the whole model, in percent. The cumulative part drops, on top of those before, the layer that costs
    least in perplexity, until --cumulative are gone (0: all).
    """
    singles, dropped, whole, together = {}, {}, {}, {}
    if cumulative and not measure.data:
        raise UserError("--cumulative: expected --data too, as layers are chosen by perplexity")
    fewest = min(trained.layers for trained in models.configs)
    if not 0 <= cumulative <= fewest:
        raise UserError(f"--cumulative: expected up to {fewest} layers, as the models have, found {cumulative}")
    for label, model in models:
        for name, ending in kinds(model, label).items():
            field, count = f"drop{ending or '_layers'}", model.config.layers

            def drop(gone, field=field, model=model):
                model.contribute(Contribution(**{field: tuple(gone)}))
                return model

            whole[name] = measure(drop([]))
            print(f"{name}: {_text(whole[name])}", flush=True)
            singles[name] = []
            for layer in range(count):
                singles[name].append(measure(drop([layer])))
                print(f"{name} without layer {layer}: {_text(singles[name][-1])}", flush=True)
            if PERPLEXITY in whole[name]:
                perplexity = [found[PERPLEXITY] for found in singles[name]]
                dropped[name] = greedy(
                    lambda d, drop=drop: measure.perplexity(drop(d)), perplexity, cumulative or count
                )
                order = [layer for layer, _ in dropped[name]]
                print(f"{name}: dropped in the order {', '.join(map(str, order))}", flush=True)
                if measure.tasks:
                    together[name] = [measure(drop(order[:n])) for n in range(1, len(order) + 1)]
    metrics = list(next(iter(whole.values())))
    changes = {
        name: [{m: change(found[m], whole[name][m]) for m in metrics} for found in by_layer]
        for name, by_layer in singles.items()
    }
    head = ["model", "layer dropped", *metrics, *(f"{metric} change, %" for metric in metrics)]
    rows = [[name, "none", *found.values(), *[0.0] * len(metrics)] for name, found in whole.items()]
    for name, by_layer in singles.items():
        for layer, found in enumerate(by_layer):
            rows.append([name, layer, *found.values(), *changes[name][layer].values()])
    page.table(head, rows, "Quality without one layer's FFN", csv="layers")
    for metric in metrics:
        lines = {name: [found[metric] for found in by_layer] for name, by_layer in changes.items()}
        figure = plots.by_layer(lines, f"change of {metric}, %")
        figure.axes[0].set_yscale("symlog", linthresh=1)
        page.figure(
            metric.replace(" ", "-"),
            figure,
            f"Change of {metric} without a layer's FFN (Figures 4 and 12), from 1% logarithmic",
        )
    if dropped:
        _draw_cumulative(page, dropped, whole)
    if together:
        rows = [[name, n, *q.values()] for name, found in together.items() for n, q in enumerate(found, 1)]
        page.table(["model", "layers dropped", *metrics], rows, "Quality as layers' FFNs are dropped one after another")
    return {"whole": whole, "without_layer": singles, "cumulative": dropped, "cumulative_quality": together}


def greedy(cost_without, first: list[float], count: int) -> list[tuple[int, float]]:
    """[(layer, cost)]: on top of those before, the layer whose loss costs least; `first`: costs of single layers."""
    out, left = [], list(range(len(first)))
    while len(out) < count:
        gone = [layer for layer, _ in out]
        costs = {layer: cost_without([*gone, layer]) if gone else first[layer] for layer in left}
        best = min(costs, key=costs.get)
        out.append((best, costs[best]))
        left.remove(best)
    return out


def _draw_cumulative(page, dropped, whole):
    figure, axis = plots.new_figure()
    for number, (name, steps) in enumerate(dropped.items()):
        full = whole[name][PERPLEXITY]
        points = [0.0, *(change(value, full) for _, value in steps)]
        axis.plot(range(len(points)), points, **plots.style_of(number), label=name)
    axis.set(xlabel="layers dropped, least harmful first", ylabel="change of perplexity, %")
    axis.set_yscale("symlog", linthresh=1)
    plots.legend(axis)
    page.figure(
        "cumulative", figure, "Change of perplexity as layers' FFNs are dropped one after another, from 1% logarithmic"
    )
    rows = [[name, n, *step] for name, steps in dropped.items() for n, step in enumerate(steps, 1)]
    with page.csv("cumulative", ["model", "dropped", "layer", "perplexity"]) as write:
        write(rows)


def _numbers(texts) -> list[float]:
    """Raises: UserError."""
    try:
        values = [float(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--alphas: expected numbers such as 1.0,0.5: {error}") from error
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise UserError(f"--alphas: expected numbers of zero or more, found {','.join(texts)}")
    return sorted({1.0, *values}, reverse=True)


def _text(found):
    return ", ".join(f"{metric} {value:.4f}" for metric, value in found.items())
