"""Probes of trained models against the equations, against direct NumPy, and against files that were really written."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from lab import CONTEXT, with_devices

from memoryllm_jax import probe
from memoryllm_jax.checkpoint import trained
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import flatten
from memoryllm_jax.data import dataset
from memoryllm_jax.evaluation import measure, perplexity
from memoryllm_jax.experiments import curves, pruning
from memoryllm_jax.experiments.compression import StoredRows
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.inference.engine import Contribution
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.model import flops
from memoryllm_jax.tol import build, compress

TOKENS = 400


def nats(model, path):
    windows = perplexity.Windows(CONTEXT, CONTEXT, TOKENS)
    text = perplexity.prepared_text(path, "validation", model.tokenizer, windows)
    return perplexity.perplexity(model, text, windows)["loss"]


def by_equations(model, path, memory_L, compute_L):
    """The same with W_down of each layer's FFN-M and FFN-C times a factor."""
    params, _ = model.trained.load(lambda _: True)
    stacked = {k: jax.tree.map(lambda *x: jnp.stack(x), *params[k]) for k in ("layers", "memory") if k in params}
    for group, factors in (("layers", compute_L), ("memory", memory_L)):
        if "ffn" in stacked.get(group, {}):
            stacked[group]["ffn"]["down"] *= jnp.float32(factors)[:, None, None]
    ids = dataset.Dataset(path).validation.read(0, TOKENS + 1)
    whole = TOKENS // CONTEXT * CONTEXT
    pieces = [ids[:whole].reshape(-1, CONTEXT), ids[whole:-1][None]]
    logits = [reference.logits(params | stacked, x, model.config).reshape(-1, model.config.vocab_size) for x in pieces]
    log_probs = jax.nn.log_softmax(jnp.concatenate(logits))
    return -float(log_probs[jnp.arange(TOKENS), ids[1:]].mean())


@pytest.mark.parametrize(
    "name, contribution, memory, compute",
    [
        ("base", Contribution(alpha=0.5), (1, 1), (0.5, 0.5)),
        ("base", Contribution(alpha=0.7, drop_layers=(1,)), (1, 1), (0.7, 0)),
        ("memory", Contribution(alpha=0.8, drop_layers=(0,)), (0, 0.8), (1, 1)),
        ("flex-3", Contribution(alpha=0.9, drop_compute=(1,)), (0.9, 0.9), (1, 0)),
        ("flex-3", Contribution(alpha_compute=0.6, drop_layers=(1,)), (1, 0), (0.6, 0.6)),
    ],
)
def test_contributions_are_those_of_the_equations_live_and_looked_up(lab, name, contribution, memory, compute):
    for arguments, devices in [((), 2)] + ([] if name == "base" else [((lab.tol(name), "disk", 4096), 1)]):
        with lab.model(name, *arguments, devices=devices) as model:
            before = nats(model, lab.data_path)
            model.contribute(contribution)
            found = nats(model, lab.data_path)
            if not arguments:
                expected = by_equations(model, lab.data_path, memory, compute)
            model.contribute(Contribution())
            assert nats(model, lab.data_path) == before
        assert found == pytest.approx(expected, rel=2e-6) and abs(found - before) > 1e-4


@pytest.mark.parametrize(
    "name, contribution, message",
    [
        ("base", Contribution(alpha_compute=0.5), "--alpha_compute, --drop_compute: expected flex, found base"),
        ("memory", Contribution(drop_compute=(1,)), "--alpha_compute, --drop_compute: expected flex, found memory"),
        ("memory", Contribution(alpha=-1.0), "--alpha: expected a number of zero or more, found -1"),
        ("flex-3", Contribution(drop_layers=(2,)), "--drop_layers: expected layers from 0 to 1, found 2"),
    ],
)
def test_contributions_that_a_model_has_not_are_refused(lab, name, contribution, message):
    with pytest.raises(UserError, match=message):
        contribution.factors(lab.config(name))


# Pruning


def some_matrix(inputs=160, outputs=24, samples=300):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, inputs)) * rng.gamma(1.0, size=inputs) @ rng.normal(size=(inputs, inputs))
    return np.float32(rng.normal(size=(inputs, outputs))), np.float32(x)


def settled_one_by_one(w_OI, gram, zeros_of):
    """SparseGPT as its paper tells it: column after column, with the inverse of what is left of the Hessian."""
    w, gram = w_OI.astype(np.float64), gram.astype(np.float64)
    gram = gram + pruning._DAMPING * gram.diagonal().mean() * np.eye(len(gram))
    for column in range(w.shape[1]):
        inverse = np.linalg.inv(gram[column:, column:])
        gone = zeros_of(w, column)
        error = np.where(gone, w[:, column], 0) / inverse[0, 0]
        w[:, column:] -= error[:, None] * inverse[0]
        w[gone, column] = 0
    return w


def test_masks_are_the_weakest_by_each_method():
    w, x = some_matrix()
    gram, pattern = jnp.asarray(x.T @ x), pruning.Pattern(0.25)
    pruned = np.asarray(pruning.prune_matrix(jnp.asarray(w), gram, "magnitude", pattern))
    assert (np.abs(w[pruned == 0]).max() < np.abs(w[pruned != 0]).min()) and (pruned == 0).mean() == 0.25
    pruned = np.asarray(pruning.prune_matrix(jnp.asarray(w), gram, "wanda", pattern))
    score = np.abs(w) * np.linalg.norm(x, axis=0)[:, None]
    for column in range(w.shape[1]):
        gone = pruned[:, column] == 0
        assert gone.mean() == 0.25 and score[gone, column].max() < score[~gone, column].min()
    for method in pruning.METHODS:
        pruned = np.asarray(pruning.prune_matrix(jnp.asarray(w), gram, method, pruning.Pattern(0.5, 4)))
        assert ((pruned.T.reshape(w.shape[1], -1, 4) == 0).sum(-1) == 2).all()
        if method != "sparsegpt":
            assert (pruned[pruned != 0] == w[pruned != 0]).all()


@pytest.mark.parametrize("pattern", [pruning.Pattern(0.5, 4), pruning.Pattern(0.5)])
def test_sparsegpt_is_the_loop_of_its_paper(pattern):
    """Masks are chosen for every four columns, or for every block of 128; and it pays."""
    w, x = some_matrix()
    gram, chosen, step = x.T @ x, {}, pattern.group or pruning._BLOCK
    diagonal = pruning._inverse_factor(gram).diagonal()

    def zeros_of(w, column):
        first = column - column % step
        if column == first:
            score = np.square(w[:, first : first + step] / diagonal[first : first + step])
            rows = score if pattern.group else score.reshape(1, -1)
            lowest = np.argsort(np.argsort(rows, -1), -1) < round(pattern.sparsity * rows.shape[1])
            chosen[first] = lowest.reshape(score.shape)
        return chosen[first][:, column - first]

    expected = settled_one_by_one(w.T, gram, zeros_of).T
    found = {
        m: np.asarray(pruning.prune_matrix(jnp.asarray(w), jnp.asarray(gram), m, pattern)) for m in pruning.METHODS
    }
    np.testing.assert_allclose(found["sparsegpt"], expected, atol=2e-3)
    lost = {method: np.linalg.norm(x @ (w - pruned)) for method, pruned in found.items()}
    assert lost["sparsegpt"] < 0.8 * min(lost["wanda"], lost["magnitude"])


def test_layers_are_pruned_on_what_the_pruned_ones_before_make(lab):
    with lab.model("base", devices=2) as model:
        config, mesh = model.config, model.trained.mesh
        params, _ = model.trained.load(lambda _: True)
        windows = dataset.Dataset(lab.data_path).train.read(0, 20 * CONTEXT).reshape(20, CONTEXT)
        half = pruning.prune(config, params, mesh, windows, "wanda", pruning.Pattern(0.5))
    assert pruning.nonzeros(half) == sum(w.size for layer in params["layers"] for w, _ in pruning._matrices(layer)) // 2
    stacked = {"layers": jax.tree.map(lambda *x: jnp.stack(x), half["layers"][0], params["layers"][1])}
    seen = []

    def swiglu(x, p):
        seen.append(x.reshape(-1, x.shape[-1]))
        return swiglu_before(x, p)

    swiglu_before, reference.swiglu = reference.swiglu, swiglu
    try:
        reference.logits(params | stacked, windows, config)
    finally:
        reference.swiglu = swiglu_before
    w, ffn = params["layers"][1]["ffn"]["up"], half["layers"][1]["ffn"]["up"]
    score = np.abs(w) * np.linalg.norm(seen[1], axis=0)[:, None]
    gone = np.asarray(ffn) == 0
    assert all(score[g, k].max() <= 1.001 * score[~g, k].min() for k, g in enumerate(gone.T))


# Compression


def test_stored_rows_are_those_of_a_file(lab, tmp_path):
    name = "flex-3"
    setting, path = compress.Options(bits="4"), str(tmp_path / "tol.safetensors")
    compress.precompute(lab.workdir(name), path, setting)
    with lab.model(name, path, "host") as model:
        expected = nats(model, lab.data_path)
    with lab.model(name) as model:
        live = nats(model, lab.data_path)
        source = build.LiveSource(model.trained)
        layout = compress.uniform(source, setting)
        model.rows = StoredRows(source, layout, {}, np.zeros(source.vocab_size, np.int32))
        found = nats(model, lab.data_path)
    assert found == pytest.approx(expected, rel=1e-6) and abs(found - live) > 1e-4


# The commands


@pytest.fixture
def run(lab, tmp_path):
    """run("alpha", ["base"], alphas=("0.5",)) -> (results, page) of a command."""

    def call(command, names, tol="", **arguments):
        models = Models([lab.workdir(name) for name in names], tol)
        probe.probe(command, models, str(tmp_path), **arguments)
        return json.load(open(tmp_path / f"{command}.json"))["results"], (tmp_path / f"{command}.html").read_text()

    return call


@pytest.mark.slow
def test_alpha_and_layers_of_several_models(lab, run):
    text = measure.Measure(lab.data_path, max_tokens=TOKENS)
    found, page = run("alpha", ["memory", "flex-3"], measure=text, alphas=("0.5",))
    assert list(found["quality"]) == ["memory", "flex-3, FFN-M", "flex-3, FFN-C"] and page.count("<img") == 1
    with lab.model("flex-3") as model:
        model.contribute(Contribution(alpha_compute=0.5))
        half = math.exp(nats(model, lab.data_path))
    assert found["quality"]["flex-3, FFN-C"]["0.5"]["perplexity"] == pytest.approx(half, rel=1e-5)
    full = found["quality"]["flex-3, FFN-C"]["1.0"]["perplexity"]
    assert found["changes"]["flex-3, FFN-C"]["0.5"]["perplexity"] == pytest.approx(100 * (half / full - 1), abs=2e-3)

    found, page = run("layers", ["memory"], measure=text)
    one, both = found["cumulative"]["memory"]
    singles = [quality["perplexity"] for quality in found["without_layer"]["memory"]]
    assert one == [int(np.argmin(singles)), min(singles)] and page.count("<img") == 2
    with lab.model("memory") as model:
        model.contribute(Contribution(drop_layers=(0, 1)))
        assert both[1] == pytest.approx(math.exp(nats(model, lab.data_path)), rel=1e-5)
    with pytest.raises(UserError, match="--tol=x: expected one --workdir, found 2"):
        run("alpha", ["base", "memory"], "x", measure=text)


def test_pruned_base_has_the_active_parameters_of_flex(lab, run):
    where = {"measure": measure.Measure(lab.data_path, max_tokens=TOKENS), "calibration": lab.data_path, "windows": 24}
    found, page = run("pruning", ["base", "memory"], methods=("magnitude",), **where)
    whole, *pruned, memory = found["points"]
    assert [p["model"] for p in (whole, memory)] == ["base", "memory"] and page.count("<img") == 1
    counts = {beta: flops.parameters(lab.run(name))["active"] for beta, name in ((0, "memory"), (3, "flex-3"))}
    assert pruned[0]["active"] == pytest.approx(counts[3], abs=8)
    assert pruned[-1]["active"] == counts[0] + 2 * 32 and memory["active"] == counts[0]  # norms that memory lacks stay
    assert [p["pattern"] for p in pruned if ":" in p["pattern"]] == ["2:4"]
    with pytest.raises(UserError, match=r"expected one base among the models.*found 0"):
        run("pruning", ["memory"], **where)


@pytest.mark.slow
def test_compression_and_cost(lab, run):
    text = measure.Measure(lab.data_path, "train", TOKENS)
    choices = {"calibration": lab.data_path, "bits": ("2",), "ranks": ("0.5",)}
    found, page = run("compression", ["memory"], measure=text, **choices)
    sizes = {row["setting"]: row["bytes"] for row in found["settings"]}
    assert sizes["budget of the size of 2 bits"] <= sizes["2 bits"] < sizes["16 bits, rank 0.5"]
    with lab.model("memory") as model:
        rows = [build.LiveSource(model.trained).vectors(jnp.arange(512))[f"ffn.{layer}"] for layer in range(2)]
    for values, x in zip(found["singular_values"], rows):
        expected = np.linalg.svd(np.asarray(x), compute_uv=False)
        np.testing.assert_allclose(values[:20], expected[:20] / expected[0], rtol=1e-3)
    assert page.count("<img") == 2

    found, page = run("cost", ["base", "memory"], data=lab.data_path, steps=4, rounds=2, cache="64KiB")
    base, live, disk = found["sides"]
    with lab.model("memory") as model:
        row = 3 * 32 * 4
        assert isinstance(model.rows, LiveRows) and model.rows.weights_bytes > 512 * 32 * 4
        assert live["decoder, MB"] == disk["decoder, MB"] == model.decoder.weights_bytes / 1e6
        assert live["FFN-M and embedding, MB"] == model.rows.weights_bytes / 1e6
    assert disk["FFN-M and embedding, MB"] == 0 and 0 < disk["rows, MB"] <= 65536 / 1e6 + row
    assert base["time over the first side's"] == 1 and min(side["ms a token"] for side in found["sides"]) > 0


# Comparison of architectures


def test_comparison_reads_what_runs_leave(lab, tmp_path):
    names = ["base", "memory"]
    runs = {name: curves.run_of(lab.workdir(name)) for name in names}
    for name in names:
        end, run = runs[name]["curve"][-1], lab.run(name)
        assert runs[name]["finished"] and end["step"] == 16 and end["tokens"] == 16 * 8 * CONTEXT
        assert end["loss"] == json.load(open(f"{lab.workdir(name)}/result.json"))["validation"]["loss"]
        plain = flops.train_flops(run, end["tokens"], end["tokens"])
        assert end["flops"] == pytest.approx(plain) if name == "base" else end["flops"] < plain
    curves.draw(runs, str(tmp_path), {})
    page, lines = (tmp_path / "comparison.html").read_text(), (tmp_path / "comparison-curves.csv").read_text()
    assert page.count("<img") == 4 and lines.count("\n") == 1 + sum(len(run["curve"]) for run in runs.values())
    assert curves.run_of(str(tmp_path / "none")) is None


@pytest.mark.slow
def test_the_comparison_trains_what_its_options_say(lab, tmp_path):
    sizes = {"steps": 2, "batch_size": 8, "seq_len": 32, "model.dim": 16, "model.layers": 1, "model.heads": 2}
    sizes |= {"data.path": lab.data_path, "eval.batches": 1, "sample.tokens": 0}
    options = [f"--config.{field}={value}" for field, value in sizes.items()] + ["--noconfig.log.tensorboard"]

    def command(*arguments):
        line = [sys.executable, "-m", "memoryllm_jax.compare", f"--workdir={tmp_path}", *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=240, env=with_devices(1))

    done = command("--config=configs/tiny.py", "--architectures=value-0", *options)
    assert done.returncode == 0, done.stderr
    found = flatten(trained.config_of(str(tmp_path / "value-0")))
    assert {field: found[field] for field in sizes} == sizes and not found["log.tensorboard"]
    assert json.load(open(tmp_path / "comparison.json"))["results"]["value-0"]["finished"]
    os.symlink(lab.workdir("memory"), tmp_path / "memory")
    refused = command("--config=configs/tiny.py", "--architectures=value-0,memory", "--report")
    assert refused.returncode == 1 and "memory: steps: expected 2 as in value-0, found 16" in refused.stderr


def test_groups_and_changes():
    assert measure.group_of("lambada_local") == "recall" and measure.group_of("piqa_local") == "reasoning"
    assert measure.group_of("wikitext word_perplexity") is None
    assert measure.group_means({"sciq": -10.0, "arc_easy": -20.0, "piqa": 1.0, "perplexity": 5.0}) == {
        "recall": -15.0,
        "reasoning": 1.0,
    }
    assert measure.change(3.0, 2.0) == 50 and math.isnan(measure.change(1.0, 0.0))
    assert measure.group_means({"lambada_local": math.nan, "sciq": -10.0}) == {"recall": -10.0}
    assert plots.style_of(0) != plots.style_of(8)
