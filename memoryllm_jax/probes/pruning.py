"""Base pruned to the active parameters of memory and flex, beside trained memory and flex (MemoryLLM, Figure 11)."""

import dataclasses

import numpy as np

from memoryllm_jax import data, metrics, report
from memoryllm_jax.cli import UserError
from memoryllm_jax.probes import prune
from memoryllm_jax.probes.measure import Measure, Models

_BETAS = (0.0, 1.0, 2.0, 3.0)


def pruning(
    models: Models,
    page: report.Report,
    measure: Measure,
    calibration: str = "",
    windows: int = 128,
    methods: tuple = prune.METHODS,
) -> dict:
    """Base pruned by magnitude, Wanda and SparseGPT against memory and flex (MemoryLLM, Figure 11).

    One model must be base. Its matrices of attention and FFN lose one share of their weights each, so many that those
    left are the active parameters of memory and flex-1, 2, 3 of its shape; and two of every four (2:4), at the usual
    shape flex-2's count. Calibrated on the first --windows windows of the training split of --calibration. All other
    models are points on the same axes.
    """
    for method in methods:
        if method not in prune.METHODS:
            raise UserError(f"--methods: expected some of {', '.join(prune.METHODS)}, found {method}")
    page.facts |= {"calibration": f"{calibration}, {windows} windows"}
    bases = [label for label in models.labels if label.split()[0] == "base"]
    if len(bases) != 1:
        raise UserError(f"--workdir: expected one base among the models, which is what is pruned, found {len(bases)}")
    if not calibration:
        raise UserError("--calibration: expected prepared data of the model's tokenizer, found nothing")
    points = []
    for label, model in models:
        config = model.saved.run
        points.append(_point(label, "", metrics.parameters(config)["active"], measure(model)))
        if label in bases:
            points += _pruned(model, label, measure, _calibration(calibration, windows, model), methods)
    names = list(points[0]["quality"])
    head = ["model", "pruned by", "pattern", "active parameters", *names]
    rows = [[p["model"], p["method"], p["pattern"], p["active"], *p["quality"].values()] for p in points]
    page.table(
        head,
        rows,
        "Pruned base beside whole models; active: attention, FFN-C and norms that are not zero",
        csv="points",
    )
    for name in names:
        page.figure(name.replace(" ", "-"), _draw(points, name), f"{name} against active parameters (Figure 11)")
    return {"points": points}


def _point(model, method, active, quality, pattern=""):
    return {"model": model, "method": method, "pattern": pattern, "active": active, "quality": quality}


def _calibration(path, windows, model) -> np.ndarray:
    shards = model.decoder.shards
    if windows % shards:
        raise UserError(f"--windows: expected a multiple of the {shards} devices, found {windows}")
    stream, length = data.open_for(path, model.tokenizer.digest).train, model.saved.context
    if not 0 < windows * length <= stream.tokens:
        raise UserError(f"--windows: expected 1 to {stream.tokens // length}, as {path} has, found {windows}")
    return stream.read(0, windows * length).reshape(windows, length)


def _pruned(model, label, measure, windows, methods):
    """Points of each method at each count of active parameters."""
    saved, run = model.saved, model.saved.run
    whole, (params, _) = model.decoder, saved.load(lambda _: True)
    counts = metrics.parameters(run)
    matrices = counts["attention"] + counts["ffn_c"]
    for name in ("dim", "ffn_dim"):
        if getattr(run.model, name) % 4:
            raise UserError(
                f"{saved.workdir}: expected model.{name} to be a multiple of 4, found {getattr(run.model, name)}"
            )
    patterns = [prune.Pattern(0.5, 4)]
    for beta in _BETAS:
        flex = metrics.parameters(dataclasses.replace(run, model=dataclasses.replace(run.model, beta=beta)))
        patterns.append(prune.Pattern(1 - (flex["attention"] + flex["ffn_c"]) / matrices))
    out = []
    for pattern in sorted(patterns):
        for method in methods:
            pruned = prune.prune(saved.config, params, saved.mesh, windows, method, pattern)
            model.decoder = whole.changed(layers=pruned["layers"])
            quality = measure(model)
            active = prune.nonzeros(pruned) + counts["norms"]
            out.append(_point(label, method, active, quality, str(pattern)))
            print(f"{label}, {method} {pattern}: {active:,} active, {quality}", flush=True)
    return out


def _draw(points, name):
    figure, axis = report.new_figure()
    kinds = dict.fromkeys((p["method"], ":" in p["pattern"]) for p in points if p["method"])
    methods = list(dict.fromkeys(method for method, _ in kinds))
    for method, groups in sorted(kinds, key=lambda kind: kind[1]):
        chosen = [p for p in points if (p["method"], ":" in p["pattern"]) == (method, groups)]
        chosen = sorted((p["active"] / 1e6, p["quality"][name]) for p in chosen)
        style = report.style_of(methods.index(method))
        style |= {"linestyle": "", "markersize": 9, "fillstyle": "none"} if groups else {}
        axis.plot(*zip(*chosen), **style, label=f"base, {method}{' 2:4' if groups else ''}")
    for p in points:
        if not p["method"]:
            at = p["active"] / 1e6, p["quality"][name]
            axis.plot(*at, "k*", markersize=9)
            axis.annotate(p["model"], at, xytext=(5, 3), textcoords="offset points", fontsize=8)
    if name == "perplexity":
        report.log_scale(axis)
    axis.set(xlabel="active parameters, millions", ylabel=name)
    report.legend(axis)
    return figure
