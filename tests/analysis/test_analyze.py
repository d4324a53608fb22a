"""Analyses on models built by hand, where the answer is known, and against NumPy on a random model."""

import csv
import functools
import json
import os
import re
import runpy
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from memoryllm_jax import analyze
from memoryllm_jax.analysis import (
    agreement,
    annotate,
    clusters,
    corpus,
    key_values,
    neighbours,
    residual,
    token_classes,
    vocabulary,
)
from memoryllm_jax.checkpoint import store
from memoryllm_jax.common import plots, report
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.training import loop

LENGTH = 16  # of windows
FIRES, HEARD, DENIED, SPOKEN, TWIN = 60, 61, 62, 63, 64  # token ids


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Sizes that divide nothing, so that every loop has several rounds and an incomplete last one."""
    monkeypatch.setattr(vocabulary, "CHUNK", 100)
    monkeypatch.setattr(key_values, "_LOGITS", 512 * 7)
    monkeypatch.setattr(corpus, "_BATCH", 3 * LENGTH)
    monkeypatch.setattr(neighbours, "_QUERIES", 300)


@pytest.fixture
def make_model(make_config, tmp_path):
    """make_model("base", change) -> workdir of a checkpoint: small random weights, `change`d as NumPy arrays."""

    def make(architecture, change=lambda params: None, name=""):
        config = make_config(architecture, **{"data.verify": False})
        dataset = Dataset(config.data.path)
        config = loop.complete(config, dataset)
        mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        shapes, draw = (
            transformer.abstract_params(transformer.LanguageModel(config.model), mesh),
            np.random.default_rng(0),
        )
        params = jax.tree.map(lambda s: (0.3 * draw.standard_normal(s.shape)).astype(np.float32), shapes)
        change(params)
        params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, shapes)
        workdir = str(tmp_path / (name or architecture))
        checkpoints = store.Checkpoints(workdir)
        checkpoints.save(0, {"params": params}, store.describe(config, dataset, dataset.tokenizer()))
        checkpoints.wait()
        checkpoints.close()
        return workdir

    return make


@functools.cache
def opened(workdir, *_, **__):
    """A checkpoint takes seconds to read, so that all commands of a test share one."""
    return key_values.Inside(workdir)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("values", workdir, **options) -> the results in its JSON."""
    monkeypatch.setattr(analyze, "Inside", opened)

    def call(command, workdir, **options):
        output = str(tmp_path / "out")
        analyze.analyze(command, workdir, output, **options)
        with open(f"{output}/{command}.json") as file:
            return json.load(file)["results"]

    return call


def quiet(params):
    """Attention and FFNs that add nothing, norms of one, an output embedding of unit rows."""
    for group in ("layers", "memory"):
        for path, x in jax.tree_util.tree_leaves_with_path(params.get(group, {})):
            x[:] = 1 if path[-1].key == "scale" else 0
    params["final_norm"]["scale"][:] = 1
    params["head"][:] = unit(params["head"])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def one_token_keys(params, group):
    """In layer 1, key 3 fires on FIRES alone and its value says HEARD; key 4 likewise, but with c < 0 and -DENIED."""
    quiet(params)
    params["embedding"][:, 0] = 0
    params["embedding"][FIRES] = 4 * np.eye(32)[0]
    params["embedding"][TWIN] = 2 * params["embedding"][TWIN + 1]
    ffn, head = params[group]["ffn"], params["head"]
    ffn["gate"][:, 0, 3:5] = 1
    ffn["up"][:, 0, 3], ffn["up"][:, 0, 4] = 1, -0.5
    ffn["down"][:, 3], ffn["down"][:, 4] = head[HEARD], -head[DENIED]
    ffn["up"][0] = 0
    ffn["gate"][:, 1:, 5:], ffn["up"][:, 1:, 5:] = 0.1, np.random.default_rng(1).normal(size=ffn["up"][:, 1:, 5:].shape)
    ffn["down"][:, 5:] = 1e-3 * np.random.default_rng(2).normal(size=ffn["down"][:, 5:].shape)


def test_a_key_that_fires_on_one_token(make_model, run, tmp_path):
    workdir = make_model("memory", lambda params: one_token_keys(params, "memory"))
    c = 32**0.5 / (1 + np.exp(-(32**0.5))) * 32**0.5  # q = sqrt(D) e_0, up to the norm's epsilon

    found = run("coefficients", workdir, token=[f"#{FIRES}"], top=2)
    assert found["keys"][1] == [[3, 4]]
    np.testing.assert_allclose(found["coefficients"][1], [[c, -c / 2]], rtol=1e-4)
    np.testing.assert_allclose(found["shares"][1], [[2 / 3, 1 / 3]], rtol=1e-4)
    with open(tmp_path / "out/coefficients-keys.csv", newline="") as file:
        lines = list(csv.reader(file))
    for key, sign, token in ((3, "1", HEARD), (4, "-1", DENIED)):
        line = next(x for x in lines if x[:2] == ["1", str(key)])
        assert line[2:4] == [sign, str(FIRES)]
        assert line[6].split()[0] == str(token)
    page = open(tmp_path / "out/coefficients.html").read()
    shown = json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', page)[1])
    assert shown["tokens"][str(FIRES)]["keys"][1] == [3, 4]
    assert shown["keys"]["1:4"][0] == -1 and shown["keys"]["1:4"][3][0] == DENIED
    head = np.asarray(opened(workdir).head)
    assert shown["tokens"][str(FIRES)]["says"][1][0] == HEARD
    norm = np.linalg.norm(c * head[HEARD] + c / 2 * head[DENIED])
    assert shown["tokens"][str(FIRES)]["norm"][1] == pytest.approx(norm, rel=1e-2)

    keys = run("triggers", workdir, key=["1:3", "1:4"], top=3)["keys"]["1"]
    assert keys["labels_Kt"] == [[FIRES, -1, -1], [FIRES, -1, -1]] and keys["sign_K"] == [1, -1]
    found = run("outliers", workdir, ratio="50,1")
    assert found["layers"][2] == {"layer": 1, "M": 50, "mean": 1 / 512, "largest": 1, "tokens_without": 511 / 512}
    assert found["keys"][10][:3] == [1, 3, 1]
    near = run("neighbours", workdir, token=[f"#{TWIN}", "#9", "#8", "#7"], top=2)
    assert near["neighbours"][-1][0][0] == TWIN + 1 and near["cosine"][-1][0][0] == pytest.approx(1, abs=1e-5)


def test_prefixes_of_a_key_that_fires_on_one_token(make_model, run, data_path, tmp_path):
    options = {"data": data_path, "length": LENGTH, "limit": 1 << 11}
    text = corpus.Corpus(opened(make_model("base", name="any")), data_path, "train", LENGTH, 1 << 11)
    tokens = np.concatenate([text.prefix(label) for label in range(LENGTH - 1, text.positions, LENGTH)])
    counts = np.bincount(tokens, minlength=512)
    counts[tokens[1:][tokens[1:] == tokens[:-1]]] = 0  # doubled, it would still fire without the last
    fires = int(counts.argmax())
    triggers = np.flatnonzero(tokens == fires)
    follows = int(tokens[triggers[0] + 1])
    assert triggers[0] % LENGTH < LENGTH - 1  # so that what follows is of the same window

    def change(params):
        one_token_keys(params, "layers")
        params["embedding"][[FIRES, fires]] = params["embedding"][[fires, FIRES]]
        params["layers"]["ffn"]["down"][0] = 0
        params["layers"]["ffn"]["down"][1, 3], params["layers"]["ffn"]["down"][1, 4] = np.outer(
            [1, -1], params["head"][follows]
        )

    workdir = make_model("base", change)
    keys = run("triggers", workdir, key=["1:3", "1:4"], top=5, **options)["keys"]["1"]
    assert keys["labels_Kt"] == [triggers[:5].tolist()] * 2
    with open(tmp_path / "out/triggers-triggers.csv", newline="") as file:
        shown = next(csv.DictReader(file))
    texts = opened(workdir).texts
    assert shown["prefix"].endswith(texts[fires]) and shown["next"] == texts[follows]
    mean = run("mutate", workdir, key=["1:3"], top=60, **options)["mean_percent"]
    changes = np.genfromtxt(tmp_path / "out/mutate-prefixes.csv", delimiter=",", names=True)
    assert np.abs(changes["first"]).max() < 1e-5 and np.abs(changes["last"] + 1).max() < 1e-5
    assert mean["random"] == [pytest.approx(100 * changes["random"].mean(), abs=0.01)]
    fired = np.abs(changes["random"]) < 1e-5
    assert (fired | (np.abs(changes["random"] + 1) < 1e-5)).all() and 0 < fired.sum() < len(fired)

    found = run("agreement", workdir, predictive=3, top=20, **options)
    with open(tmp_path / "out/agreement-keys.csv") as file:
        ranks = {tuple(line.split(",")[:2]): line.split(",")[5:] for line in file}
    assert ranks["1", "3"] == ranks["1", "4"] == [str(follows), "1\n"]
    assert int(ranks["1", "5"][1]) > 1
    after = sum(text.next(label) == follows for label in triggers[:20])
    assert sorted(row[:2] + row[4:] for row in found["predictive"]["values"])[:2] == [
        [1, 3, after, 20],
        [1, 4, after, 20],
    ]


def test_the_chance_of_agreement_is_with_other_keys():
    for size in (1, 2, 9):
        other = agreement.others(np.random.default_rng(0), np.arange(size))
        assert sorted(other) == list(range(size)) and (size == 1 or (other != np.arange(size)).all())


def test_what_follows_a_token_in_the_training_text(make_model, data_path):
    train = Dataset(data_path).train
    tokens = train.read(0, train.tokens)
    page = types.SimpleNamespace(facts={})
    following = agreement._following(opened(make_model("memory")), page, None, data_path)
    common = np.bincount(tokens).argmax()
    assert following(common) == np.bincount(tokens[1:][tokens[:-1] == common]).argmax()
    unseen = np.setdiff1d(np.arange(512), tokens)
    assert len(unseen) and {following(token) for token in unseen} == {-1}


def test_a_layer_that_overrides_the_residual(make_model, run, data_path):
    """Layer 0 says SPOKEN whatever it reads; layer 1 adds HEARD and DENIED, whose sum says TWIN; all say TWIN + 1."""

    def change(params):
        quiet(params)
        params["embedding"][:, 1] = 1
        head, ffn = params["head"], params["memory"]["ffn"]
        both = head[HEARD] + head[DENIED]
        head[TWIN] = unit(both)
        head[TWIN + 1] = unit(head[SPOKEN] + head[TWIN])
        ffn["gate"][:, 1, :2], ffn["up"][:, 1, 0], ffn["up"][1, 1, 1] = 10, 10, -10
        ffn["down"][0, 0] = head[SPOKEN]
        ffn["down"][1, :2] = np.stack([head[HEARD], -head[DENIED]]) / np.linalg.norm(both)

    options = {"data": data_path, "length": LENGTH, "limit": 1 << 11, "examples": 200}
    workdir = make_model("memory", change)
    percent = run("residual", workdir, **options)["percent"]
    assert percent["FFN"] == [pytest.approx(100, abs=2), 0] and percent["composition"] == [pytest.approx(0, abs=2), 100]
    assert percent["settled"] == [pytest.approx(0, abs=2), 0]
    head = np.asarray(opened(workdir).head)
    logits = 32**0.5 * head @ head[SPOKEN]
    expected = 100 * np.exp(logits[TWIN + 1]) / np.exp(logits).sum()
    assert percent["probability"][1] == pytest.approx(expected, rel=0.02)
    rows = run("compose", workdir, **options)["percent_by_layer"]
    assert [row["composed"] for row in rows] == [0, 100]
    assert rows[0]["short prefixes of the rest"] == pytest.approx(100 * 4 / LENGTH, abs=12)
    assert rows[1]["short prefixes of the rest"] is None


def test_active_memories_hold_the_mass():
    c_NF = np.zeros((2, 88), np.float32)
    c_NF[0, 5:15], c_NF[1, 7] = -3, 1
    norms = np.ones(88, np.float32)
    assert residual.active_count(c_NF, norms, 0.85).tolist() == [9, 1]
    norms[5] = 1000  # one memory adds nearly all
    assert residual.active_count(c_NF, norms, 0.85).tolist() == [1, 1]
    c_NF = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3000)), jnp.bfloat16)
    found = residual.active_count(c_NF, jnp.ones(3000, jnp.bfloat16), 0.9)
    assert found.tolist() == residual.active_count(c_NF.astype(jnp.float32), np.ones(3000, np.float32), 0.9).tolist()


def test_stop_words_are_known_by_their_text():
    assert residual.stop_words(["␣the", "The", "␣cat", ",", "an"]).tolist() == [True, True, False, False, True]


def test_proxies_of_triggers():
    embed = lambda ids: np.array([1.0, sum(ids) - 6])  # noqa: E731
    shared, overlap, cosine = annotate.measures([[1, 2, 3], [9, 2, 3], [2, 2, 3]], embed, None)
    assert shared == 1 and overlap == pytest.approx((3 / 7 + 3 / 6 + 3 / 6) / 3)
    pairs = [1 / 65**0.5, 1 / 2**0.5, (1 + 8) / 130**0.5]
    assert cosine == pytest.approx(np.mean(pairs))
    shared, overlap, _ = annotate.measures([[0], [1], [2]], embed, ["ab", "AB", ","])
    assert shared == pytest.approx(1 / 3) and overlap == pytest.approx(1 / 3)
    assert annotate.measures([[5]], embed, None)[0] == 1 and np.isnan(annotate.measures([[5]], embed, None)[2])


def test_clustering_coefficient_and_purity():
    cliques = np.array([[j for j in range(5 * (i // 5), 5 * (i // 5) + 5) if j != i] for i in range(10)])
    assert clusters.clustering_coefficient(cliques) == (1, pytest.approx(4 / 9))
    ring = np.stack([np.arange(9) - 1, np.arange(1, 10)], 1) % 9
    assert clusters.clustering_coefficient(ring)[0] == 0
    # A triangle 0 1 2 with 3 hanging on 2, whose three neighbours are joined in one of three pairs.
    assert clusters.clustering_coefficient(np.array([[1], [2], [0], [2]]))[0] == pytest.approx((1 + 1 + 1 / 3 + 0) / 4)
    assert token_classes.purity(np.array([0, 0, 0, 1, 1]), np.array(list("aabcc"))) == pytest.approx(4 / 5)
    kinds = [token_classes.kind(7, text) for text in ("#7", "␣", "␣,", "12", "␣The", "ing", "да")]
    assert kinds == list(token_classes.KINDS)
    assert token_classes.kind(7, ";\\n\\t") == "punctuation" and token_classes.script("\\tж") == "CYRILLIC"


@pytest.mark.parametrize("architecture", ["base", "memory", "flex-3"])
def test_a_trained_model_against_numpy(lab, make_model, run, data_path, architecture, tmp_path):
    def change(params):
        """One value is made so small that the final norm's epsilon would hide what it says."""
        trained = opened(lab.workdir(architecture)).params
        stacked = {
            k: jax.tree.map(lambda *a: np.stack(a), *v) if isinstance(v, list) else v for k, v in trained.items()
        }
        jax.tree.map(np.copyto, params, stacked)
        for group in ("layers", "memory"):
            if "ffn" in params.get(group, {}):
                params[group]["ffn"]["down"][1, 5] *= 1e-4

    workdir = make_model(architecture, change)
    subject = opened(workdir)
    m, p = subject.config, jax.tree.map(np.asarray, subject.params)
    text = corpus.Corpus(subject, data_path, "train", LENGTH, 7 * LENGTH)
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    c_of = lambda q, ffn: silu(q @ ffn["gate"]) * (q @ ffn["up"])  # noqa: E731
    norm = lambda x, scale: np.asarray(reference.norm(x, scale, m))  # noqa: E731

    def forward(tokens_BT):
        """(queries, residual, output) of each layer, positions in a row."""
        queries, residuals, outputs = [{} for _ in range(m.layers)], [], []
        x = x0 = p["embedding"][tokens_BT]
        for layer in range(m.layers):
            at = p["layers"][layer]
            r = x + np.asarray(reference.attention(norm(x, at["attention_norm"]["scale"]), at["attention"], m))
            y = 0
            if m.compute_dim:
                source = r if m.compute_input == "after_attention" else x
                queries[layer]["compute"] = norm(source, at["ffn_norm"]["scale"]).reshape(-1, m.dim)
                y = y + (c_of(queries[layer]["compute"], at["ffn"]) @ at["ffn"]["down"]).reshape(x.shape)
            if m.memory_dim:
                mem = p["memory"][layer]
                queries[layer]["memory"] = norm(x0, mem["norm"]["scale"]).reshape(-1, m.dim)
                y = y + (c_of(queries[layer]["memory"], mem["ffn"]) @ mem["ffn"]["down"]).reshape(x.shape)
            x = r + y
            residuals.append(r.reshape(-1, m.dim))
            outputs.append(x.reshape(-1, m.dim))
        return queries, residuals, outputs

    windows = np.concatenate([t for t, *_ in text])[:7]
    queries, residuals, outputs = forward(windows)
    says = lambda x: np.asarray(norm(x, p["final_norm"]["scale"]) @ p["head"].T)  # noqa: E731
    stacked = {k: jax.tree.map(lambda *a: jnp.stack(a), *p[k]) for k in ("layers", "memory") if k in p}
    np.testing.assert_allclose(
        says(outputs[-1]).reshape(*windows.shape, -1), reference.logits(p | stacked, windows, m), rtol=1e-4, atol=1e-4
    )

    seen = [[] for _ in range(m.layers)]
    for tokens_BT, _, real in text:
        for layer, state in enumerate(corpus.states(subject, tokens_BT)):
            seen[layer].append(jax.tree.map(lambda a, real=real: np.asarray(a)[real], state))
    for layer in range(m.layers):
        state = jax.tree.map(lambda *parts: np.concatenate(parts), *seen[layer])
        np.testing.assert_allclose(state.residual_ND, residuals[layer], rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(state.output_ND, outputs[layer], rtol=2e-4, atol=2e-4)
        for name, q in queries[layer].items():
            np.testing.assert_allclose(state.queries[name], q, rtol=2e-4, atol=2e-4)

    kind = "compute" if m.compute_dim else "memory"
    options = {"data": data_path, "length": LENGTH, "limit": 7 * LENGTH}
    result = run("triggers", workdir, ffn=kind, keys=4, top=6, **options)
    found = result["keys"]["1"]
    group = p["layers" if kind == "compute" else "memory"][1]
    asked = norm(p["embedding"], group["norm"]["scale"]) if kind == "memory" else queries[1]["compute"]
    c_NK = c_of(asked, group["ffn"])[:, found["key"]]
    sign = np.sign(c_NK[np.abs(c_NK).argmax(0), np.arange(4)])
    assert found["sign_K"] == sign.tolist()
    expected = -np.sort(-(c_NK * sign).T, axis=1)[:, :6]
    np.testing.assert_allclose(np.array(found["c_Kt"]) * sign[:, None], expected, rtol=1e-3)
    assert result["selectivity"]["trigger 6"][1] == pytest.approx((expected[:, 5] / expected[:, 0]).mean(), rel=1e-3)
    assert all(
        np.isclose(c_NK[row, k], c, rtol=1e-3)
        for k in range(4)
        for row, c in zip(*(found[n][k] for n in ("labels_Kt", "c_Kt")))
    )

    if kind == "compute":
        key = found["key"][2]
        run("mutate", workdir, key=[f"1:{key}"], top=4, **options)
        changes = np.genfromtxt(tmp_path / "out/mutate-prefixes.csv", delimiter=",", names=True)
        ranks = changes["rank"].astype(int) - 1
        for change, label, c in zip(changes, np.take(found["labels_Kt"][2], ranks), np.take(found["c_Kt"][2], ranks)):
            prefix = windows[label // LENGTH, : label % LENGTH + 1]
            for name, rest in (("first", prefix[1:]), ("last", prefix[:-1])):
                q = forward(rest[None])[0][1]["compute"][-1]
                assert change[name] == pytest.approx(c_of(q, group["ffn"])[key] / c - 1, rel=1e-3, abs=1e-3)
        assert len(changes) >= 3

    shares = run("active", workdir, ffn=kind, mass=0.7, examples=7 * LENGTH, split="train", **options)["percent_active"]
    size = -np.sort(-np.abs(c_of(asked, group["ffn"])) * np.linalg.norm(group["ffn"]["down"], axis=1))
    fewest = (size.cumsum(1) < 0.7 * size.sum(1, keepdims=True)).sum(1) + 1
    assert shares["mean"][1] == pytest.approx(100 * fewest.mean() / size.shape[1], rel=1e-3)

    peaks = run("values", workdir, ffn=kind, top=3)
    rows = [line.split(",") for line in open(tmp_path / "out/values-values.csv", encoding="utf-8")]
    line = next(row for row in rows if row[:3] == ["1", "5", "-"])
    v = group["ffn"]["down"][5]
    z = says(-v / np.sqrt((v * v).mean()))
    prob = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    assert [int(i) for i in line[3].split()] == np.argsort(-z)[:3].tolist()
    np.testing.assert_allclose([float(x) for x in line[-1].split()], -np.sort(-prob)[:3], rtol=1e-3)
    z = says(unit(group["ffn"]["down"]) * 32**0.5)
    most = np.max([jax.nn.softmax(sign * z).max(1) for sign in (1, -1)], 0)
    assert peaks["max_probability"]["median of keys"][1] == pytest.approx(np.median(most), rel=1e-3)
    assert max(row[3] for row in peaks["peaked"] if row[0] == 1) == pytest.approx(most.max(), rel=1e-3)

    percent = run("residual", workdir, examples=7 * LENGTH, split="train", **options)["percent"]
    last = says(outputs[-1]).argmax(-1)
    for layer in range(m.layers):
        top_r, top_o = says(residuals[layer]).argmax(-1), says(outputs[layer]).argmax(-1)
        y = outputs[layer] - residuals[layer]
        top_y = says(y / np.sqrt((y * y).mean(-1, keepdims=True))).argmax(-1)
        assert percent["settled"][layer] == pytest.approx(100 * (top_r == last).mean())
        assert percent["composition"][layer] == pytest.approx(100 * ((top_o != top_r) & (top_o != top_y)).mean())
        assert percent["agreement"][layer] == pytest.approx(100 * ((top_o == top_r) & (top_o == top_y)).mean())

    rows = run("compose", workdir, examples=7 * LENGTH, split="train", **options)["percent_by_layer"]
    for layer, (q_of, row) in enumerate(zip(queries, rows)):
        y = outputs[layer] - residuals[layer]
        top_y = says(y / np.sqrt((y * y).mean(-1, keepdims=True))).argmax(-1)
        composed = np.ones(len(y), bool)
        for name, q in q_of.items():
            ffn = p["layers" if name == "compute" else "memory"][layer]["ffn"]
            added = np.sign(c_of(q, ffn))[:, :, None] * unit(ffn["down"])
            composed &= (says(32**0.5 * added).argmax(-1) != top_y[:, None]).all(1)
        assert row["composed"] == pytest.approx(100 * composed.mean())
        rest = residual.stop_words(subject.texts)[top_y[~composed]]
        assert row["stop words of the rest"] == (pytest.approx(100 * rest.mean()) if len(rest) else None)


def test_neighbours_clusters_and_outliers_against_numpy(make_model, run, tmp_path):
    workdir = make_model("flex-3")
    subject = key_values.Inside(workdir, whole=False)
    m, p = subject.config, jax.tree.map(np.asarray, subject.params)
    ids = vocabulary.every_id(subject)
    rows, c = [], []
    for mem in p["memory"]:
        q = np.asarray(reference.norm(p["embedding"], mem["norm"]["scale"], m))
        c.append(np.asarray(jax.nn.silu(q @ mem["ffn"]["gate"]) * (q @ mem["ffn"]["up"])))
        rows.append(c[-1] @ mem["ffn"]["down"])
    near = run("neighbours", workdir, tokens=0, top=4)
    for found, x in zip(near["cosine"], [*rows, np.concatenate(rows, 1)]):
        cosine = unit(x) @ unit(x).T
        np.fill_diagonal(cosine, -1)
        np.testing.assert_allclose(found, -np.sort(-cosine, 1)[:, :4], atol=2e-4)
    shared = [len(set(a) & set(b)) / 4 for a, b in zip(near["neighbours"][1], near["neighbours"][-1])]
    assert near["shared_with_all"][1] == pytest.approx(np.mean(shared))
    outliers = run("outliers", workdir, ratio="6,3")["layers"]
    counts = (np.abs(c[1]) > 6 * np.abs(c[1]).mean(1, keepdims=True)).sum(1)
    assert outliers[2]["mean"] == pytest.approx(counts.mean(), abs=0.01)
    with open(tmp_path / "out/outliers-tokens.csv", newline="") as file:
        by_token = [int(line["layer_1"]) for line in csv.DictReader(file)]
    assert (by_token == counts).mean() > 0.99
    labels, fitted = clusters.fit(subject, 1, 6, 0)
    distance = np.linalg.norm(unit(c[1])[:, None] - fitted.cluster_centers_, axis=-1)
    assert (labels == distance.argmin(1)).mean() > 0.999 and len(labels) == len(ids)


def test_clusters_of_tokens_of_two_kinds(make_model, run, tmp_path):
    spaced = np.array([text.startswith("␣") for text in opened(make_model("memory", name="any")).texts])

    def change(params):
        params["embedding"][:] *= 0.1
        params["embedding"][spaced, 0] += 4
        params["embedding"][~spaced, 1] += 4

    workdir = make_model("memory", change)
    row, _ = run("clusters", workdir, clusters=2, picture="pca", sample=50)["layers"]
    assert row["leading space"] == 1 and row["leading space, chance"] < 0.95
    subject = opened(workdir)
    labels, fitted = clusters.fit(subject, 0, 2, 0)
    table = clusters._examples(
        subject, 0, labels, fitted, token_classes.classes(subject.texts)["leading space"], lambda: None
    )
    x = np.asarray(clusters.unit_coefficients(subject, 0, vocabulary.every_id(subject)))
    for layer, cluster, count, kind, share, texts in table:
        own = np.flatnonzero(labels == cluster)
        assert (layer, count, share) == (0, len(own), 100) and kind == ("space" if spaced[own[0]] else "none")
        nearest = own[np.linalg.norm(x[own] - fitted.cluster_centers_[cluster], axis=1).argmin()]
        assert texts[0] == subject.texts[nearest]
    found = run("clustering", workdir, clusters=2, tokens=60, sample=100, neighbours=5)
    assert found["layers"][0]["silhouette"] > 0.3 and found["tokens"] == 60


def test_every_command_leaves_whole_files(make_model, run, data_path, tmp_path):
    workdir = make_model("flex-3")
    small = {"keys": 3, "top": 3, "length": LENGTH, "limit": 200, "examples": 50, "clusters": 5, "picture": "pca"}
    train = Dataset(data_path).train
    counts = np.bincount(train.read(0, train.tokens), minlength=512)
    for command, call in analyze.COMMANDS.items():
        names = call.__code__.co_varnames[2 : call.__code__.co_argcount]
        found = run(command, workdir, **{k: v for k, v in (small | {"data": data_path}).items() if k in names})
        page = open(tmp_path / f"out/{command}.html").read()
        assert page.count("<img") >= 1 and "http" not in page.replace(data_path, "")
        assert "flex-3, 2 layers of width 32" in page and f"{workdir}, step 0" in page
        if command == "annotate":
            assert found["proxies"]["embedding_similarity"] != found["proxies"]["embedding_similarity_at_random"]
        if command in ("coefficients", "neighbours"):
            assert f"the 500 most frequent of {data_path}" in page
            assert found["tokens"] == np.argsort(-counts, kind="stable")[:500].tolist()
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".part")]
    sheet = open(tmp_path / "out/annotate-sheet.csv").read().splitlines()
    assert sheet[0].endswith("prefix,pattern,kind") and len(sheet) == 1 + 2 * 3 * 3


def test_refusals(make_model, run, data_path, tmp_path):
    base, memory = make_model("base"), make_model("memory")
    for command, options, message in (
        ("clusters", {"layers": "0,2"}, "--layers=0,2: expected layers from 0 to 1, found '2'"),
        ("clustering", {"sample": 20}, "--sample: expected more than the 20 clusters, found 20"),
        ("outliers", {"ratio": "5,nan"}, "--ratio: expected numbers above zero such as 5,10,20, found '5,nan'"),
        ("values", {"top": 513}, "--top: expected from 1 to the 512 tokens, found 513"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            run(command, memory, **options)
    for command in ("coefficients", "clusters", "clustering", "outliers", "neighbours"):
        with pytest.raises(UserError, match=f"{command}: expected a memory or flex model, found base"):
            run(command, base)
    with pytest.raises(UserError, match="mutate: expected a base or flex model, found memory"):
        run("mutate", memory, data=data_path)
    for options, message in (
        ({"ffn": "memory"}, "--ffn=memory: expected compute, which base has"),
        ({"length": 8}, "--data: expected a folder"),
        ({"data": data_path, "length": 64}, "--length: expected from 2 to the model's 32 positions, found 64"),
        ({"data": data_path, "length": 8, "key": ["0:9999"]}, "--key=0:9999: expected LAYER:KEY"),
    ):
        with pytest.raises(UserError, match=message):
            run("triggers", base, **options)
    assert not os.path.exists(tmp_path / "out")


def test_help_gives_the_definition():
    line = [sys.executable, "-m", "memoryllm_jax.analyze", "triggers", "--help"]
    shown = subprocess.run(line, capture_output=True, text=True)
    assert shown.returncode == 0 and "Geva et al. 2021, section 3.1" in shown.stdout and "--limit" in shown.stdout


def test_an_unknown_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analyze", "trigers"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(analyze.__file__, run_name="__main__")
    assert re.match("error: expected one of coefficients, .*, found trigers\n", capsys.readouterr().err)


def test_report_escapes_what_it_shows(tmp_path):
    page = report.Report(str(tmp_path), "name", "a <b>", {"data": "<i>"})
    page.table(["x"], [[["</td>"]], [float("nan")]])
    page.raw(report.embedded_json({"text": "</script>"}))
    page.write({"x": np.array([1.0, np.nan])})
    written = open(tmp_path / "name.html").read()
    assert "a &lt;b&gt;" in written and "<i>" not in written and "&lt;/td&gt;" in written and "</script>" not in written
    assert json.load(open(tmp_path / "name.json"))["results"] == {"x": [1.0, None]}
    assert plots.drawable("␣ä") and not plots.drawable("a漢")
