"""Base with some of its weights at zero, by magnitude, Wanda (Sun et al. 2024), SparseGPT (Frantar and Alistarh 2023).

All matrices of attention and FFN of all layers lose the same share; embeddings, head and norms stay. Layers are pruned
in turn, each on what the pruned ones before it make of the calibration text. I inputs, O outputs of a matrix w_IO.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common import plots, report
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.data import dataset
from memoryllm_jax.evaluation.measure import Measure
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.model import flops, sharding, transformer

METHODS = ("magnitude", "wanda", "sparsegpt")
_DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, as in SparseGPT
_BLOCK = 128  # columns that SparseGPT settles before it corrects the rest
_BATCH = 8  # windows that run at a time, or more on more devices


class Pattern(NamedTuple):
    """sparsity: share of zeros; of every `group` inputs in a row, or, if 0, anywhere in a row or matrix."""

    sparsity: float
    group: int = 0

    @property
    def zeros(self) -> int:
        """In each group."""
        return round(self.sparsity * self.group)

    def __str__(self):
        return f"{self.group - self.zeros}:{self.group}" if self.group else f"{self.sparsity:.1%}"


def prune(config: ModelConfig, params: dict, mesh, windows: np.ndarray, method: str, pattern: Pattern) -> dict:
    """Parameters of base, as `TrainedModel.load` lays them out, with zeros.

    Args:
      windows: int32 [N, T] of calibration text, N a multiple of the mesh's batch shards; magnitude needs none.
    """
    shards = sharding.batch_shards(mesh)
    size = shards * max(1, _BATCH // shards)
    batches = [] if method == "magnitude" else np.split(windows, range(size, len(windows), size))
    x_NTD = [params["embedding"][batch][..., : config.dim].astype(config.dtype) for batch in batches]
    layers = []
    with jax.set_mesh(mesh):
        for layer in params["layers"]:
            grams = None
            for x in x_NTD:
                new = _grams(config, layer, x)
                grams = new if grams is None else jax.tree.map(jnp.add, grams, new)
            layers.append(_prune_layer(layer, grams, method, pattern))
            x_NTD = [_forward(config, layers[-1], x) for x in x_NTD]
    return params | {"layers": layers}


def nonzeros(params: dict) -> int:
    """Weights of the layers' matrices that are not zero."""
    return sum(int(jnp.count_nonzero(w)) for layer in params["layers"] for w, _ in _matrices(layer))


def _apply_layer(config, layer, x_BTD):
    rope = transformer.rope_table(config, jnp.arange(x_BTD.shape[1]))
    return transformer.apply_layer(config, layer, x_BTD, None, None, rope)  # base has no rows


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, layer, x_BTD):
    return _apply_layer(config, layer, x_BTD).x_BTD


@functools.partial(jax.jit, static_argnums=0)
def _grams(config, layer, x_BTD):
    """{name of the input: sum of x x^T, float32 [I, I]} for the inputs of a layer's matrices."""
    out, ffn = _apply_layer(config, layer, x_BTD), layer["ffn"]
    inputs = {
        "qkv": out.attention_input_BTD,
        "out": out.mixed_BTHK,
        "up": out.ffn_input_BTD,
        "down": transformer.swiglu_coefficients(out.ffn_input_BTD, ffn["gate"], ffn["up"]),
    }

    def gram(x):
        x_NI = x.reshape(x_BTD.shape[0] * x_BTD.shape[1], -1).astype(jnp.float32)
        return jnp.matmul(x_NI.T, x_NI, precision="highest")

    return jax.tree.map(gram, inputs)


def _matrices(layer):
    """(w [I, O] of any shape behind I or before O, name of its input's Gram matrix)"""
    attention, ffn = layer["attention"], layer["ffn"]
    return [
        *((attention[name], "qkv") for name in "qkv"),
        (attention["out"], "out"),
        *((ffn[name], "up") for name in ("gate", "up")),
        (ffn["down"], "down"),
    ]


def _prune_layer(layer, grams, method, pattern):
    pruned, factors = [], {}
    if method == "sparsegpt":
        factors = {name: _inverse_factor(gram) for name, gram in grams.items()}
    for w, name in _matrices(layer):
        inputs = w.shape[0] * w.shape[1] if name == "out" else w.shape[0]
        w_IO = w.reshape(inputs, -1)
        gram = None if grams is None else grams[name]
        pruned.append(prune_matrix(w_IO, gram, method, pattern, factors.get(name)).reshape(w.shape))
    q, k, v, out, gate, up, down = pruned
    return layer | {"attention": {"q": q, "k": k, "v": v, "out": out}, "ffn": {"gate": gate, "up": up, "down": down}}


def prune_matrix(w_IO, gram_II, method: str, pattern: Pattern, factor_II=None):
    """w with zeros, and with SparseGPT its other weights corrected.

    Args:
      gram_II: sum of x x^T of its inputs.  factor_II: what SparseGPT makes of that, if it is there already.
    """
    w_OI = w_IO.T.astype(jnp.float32)
    if method == "sparsegpt":
        pruned = _sparsegpt(w_OI, _inverse_factor(gram_II) if factor_II is None else factor_II, pattern)
    else:
        score = jnp.abs(w_OI) if method == "magnitude" else jnp.abs(w_OI) * jnp.sqrt(jnp.diag(gram_II))
        pruned = jnp.where(_weakest(score, pattern, by_row=method == "wanda"), 0, w_OI)
    return pruned.T.astype(w_IO.dtype)


def _weakest(score_OI, pattern, by_row):
    """Mask of what goes: by group of inputs, by row (Wanda compares the inputs of one output), or of the matrix."""
    if pattern.group:
        grouped = score_OI.reshape(score_OI.shape[0], -1, pattern.group)
        return _lowest(grouped, pattern.zeros).reshape(score_OI.shape)
    if by_row:
        return _lowest(score_OI, round(pattern.sparsity * score_OI.shape[1]))
    return _lowest(score_OI.reshape(-1), round(pattern.sparsity * score_OI.size)).reshape(score_OI.shape)


def _lowest(score, count):
    """Mask of the `count` lowest along the last axis."""
    return jnp.argsort(jnp.argsort(score, axis=-1), axis=-1) < count


def _inverse_factor(gram):
    """Upper U with U^T U = (gram + damping)^-1, float32: row i holds how input i's error is made good by later ones."""
    gram = np.asarray(gram, np.float64)
    damping = _DAMPING * gram.diagonal().mean()
    inverse = np.linalg.inv(gram + max(damping, 1e-30) * np.eye(len(gram)))
    return np.linalg.cholesky(inverse).T.astype(np.float32)


@functools.partial(jax.jit, static_argnames="pattern")
def _sparsegpt(w_OI, factor_II, pattern):
    for start in range(0, w_OI.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w_OI.shape[1])
        inside = factor_II[start:stop, start:stop]
        block, errors = _settle(w_OI[:, start:stop], inside, pattern)
        w_OI = w_OI.at[:, start:stop].set(block)
        w_OI = w_OI.at[:, stop:].add(-jnp.matmul(errors, factor_II[start:stop, stop:], precision="highest"))
    return w_OI


def _settle(w_OB, factor_BB, pattern):
    """(a block of columns pruned from left to right, their errors over U_jj)."""
    size, group = w_OB.shape[1], pattern.group
    diagonal = jnp.diag(factor_BB)
    mask = jnp.zeros(w_OB.shape, bool)
    if not group:
        mask = _lowest(jnp.square(w_OB / diagonal).reshape(-1), round(pattern.sparsity * w_OB.size)).reshape(w_OB.shape)

    def column(j, carry):
        w, mask, errors = carry
        if group:
            first = j - j % group
            here = jax.lax.dynamic_slice_in_dim(w, first, group, 1)
            score = jnp.square(here / jax.lax.dynamic_slice_in_dim(diagonal, first, group))
            chosen = jax.lax.dynamic_update_slice_in_dim(mask, _lowest(score, pattern.zeros), first, 1)
            mask = jnp.where(j % group == 0, chosen, mask)
        old = w[:, j]
        kept = jnp.where(mask[:, j], 0, old)
        error = (old - kept) / diagonal[j]
        later = jnp.where(jnp.arange(size) > j, factor_BB[j], 0)
        w = (w - error[:, None] * later).at[:, j].set(kept)
        return w, mask, errors.at[:, j].set(error)

    w, _, errors = jax.lax.fori_loop(0, size, column, (w_OB, mask, jnp.zeros_like(w_OB)))
    return w, errors


_BETAS = (0.0, 1.0, 2.0, 3.0)


def pruning(
    models: Models,
    page: report.Report,
    measure: Measure,
    calibration: str = "",
    windows: int = 128,
    methods: tuple = METHODS,
) -> dict:
    """Base pruned by magnitude, Wanda and SparseGPT against memory and flex (MemoryLLM, Figure 11).

    One model must be base. Its matrices of attention and FFN lose one share of their weights each, so many that those
    left are the active parameters of memory and flex-1, 2, 3 of its shape; and two of every four (2:4), at the usual
    shape flex-2's count. Calibrated on the first --windows windows of the training split of --calibration. All other
    models are points on the same axes.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--methods: expected some of {', '.join(METHODS)}, found {method}")
    page.facts |= {"calibration": f"{calibration}, {windows} windows"}
    bases = [label for label in models.labels if label.split()[0] == "base"]
    if len(bases) != 1:
        raise UserError(f"--workdir: expected one base among the models, which is what is pruned, found {len(bases)}")
    if not calibration:
        raise UserError("--calibration: expected prepared data of the model's tokenizer, found nothing")
    points = []
    for label, model in models:
        config = model.trained.run
        points.append(_point(label, "", flops.parameters(config)["active"], measure(model)))
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
    stream, length = dataset.open_for(path, model.tokenizer.digest).train, model.trained.context
    if not 0 < windows * length <= stream.tokens:
        raise UserError(f"--windows: expected 1 to {stream.tokens // length}, as {path} has, found {windows}")
    return stream.read(0, windows * length).reshape(windows, length)


def _pruned(model, label, measure, windows, methods):
    """Points of each method at each count of active parameters."""
    trained, run = model.trained, model.trained.run
    whole, (params, _) = model.decoder, trained.load(lambda _: True)
    counts = flops.parameters(run)
    matrices = counts["attention"] + counts["ffn_c"]
    for name in ("dim", "ffn_dim"):
        if getattr(run.model, name) % 4:
            raise UserError(
                f"{trained.workdir}: expected model.{name} to be a multiple of 4, found {getattr(run.model, name)}"
            )
    patterns = [Pattern(0.5, 4)]
    for beta in _BETAS:
        flex = flops.parameters(dataclasses.replace(run, model=dataclasses.replace(run.model, beta=beta)))
        patterns.append(Pattern(1 - (flex["attention"] + flex["ffn_c"]) / matrices))
    out = []
    for pattern in sorted(patterns):
        for method in methods:
            pruned = prune(trained.config, params, trained.mesh, windows, method, pattern)
            model.decoder = whole.with_params(layers=pruned["layers"])
            quality = measure(model)
            active = nonzeros(pruned) + counts["norms"]
            out.append(_point(label, method, active, quality, str(pattern)))
            print(f"{label}, {method} {pattern}: {active:,} active, {quality}", flush=True)
    return out


def _draw(points, name):
    figure, axis = plots.new_figure()
    kinds = dict.fromkeys((p["method"], ":" in p["pattern"]) for p in points if p["method"])
    methods = list(dict.fromkeys(method for method, _ in kinds))
    for method, groups in sorted(kinds, key=lambda kind: kind[1]):
        chosen = [p for p in points if (p["method"], ":" in p["pattern"]) == (method, groups)]
        chosen = sorted((p["active"] / 1e6, p["quality"][name]) for p in chosen)
        style = plots.style_of(methods.index(method))
        style |= {"linestyle": "", "markersize": 9, "fillstyle": "none"} if groups else {}
        axis.plot(*zip(*chosen), **style, label=f"base, {method}{' 2:4' if groups else ''}")
    for p in points:
        if not p["method"]:
            at = p["active"] / 1e6, p["quality"][name]
            axis.plot(*at, "k*", markersize=9)
            axis.annotate(p["model"], at, xytext=(5, 3), textcoords="offset points", fontsize=8)
    if name == "perplexity":
        plots.log_scale(axis)
    axis.set(xlabel="active parameters, millions", ylabel=name)
    plots.legend(axis)
    return figure
