"""Scores of sequences, perplexity and the harness, against tests/reference.py on the checkpoint's own parameters."""

import csv
import glob
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from lab import CONTEXT, with_devices

from memoryllm_jax import config
from memoryllm_jax.common import report
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import dataset
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.evaluation.page import of_tasks
from memoryllm_jax.evaluation.perplexity import Windows
from memoryllm_jax.inference import scoring
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.model import loss, sharding

ARCHITECTURES = ("memory", "flex-3", "base")


def log_softmax(model, ids_BT):
    """[B, T, V] by the equations, in float64."""
    params, _ = model.trained.load(lambda _: True)
    stacked = {k: jax.tree.map(lambda *x: jnp.stack(x), *params[k]) for k in ("layers", "memory") if k in params}
    logits = np.asarray(reference.logits(params | stacked, np.asarray(ids_BT), model.config), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def of_sequences(model, sequences):
    """(log-probability, whether it is likeliest) of each id but the first of each sequence, in one batch."""
    longest = max(map(len, sequences))
    padded = np.stack([np.pad(s, (0, longest - len(s))) for s in sequences])
    p = log_softmax(model, padded[:, :-1])
    targets = padded[:, 1:]
    gathered = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    return [(x[: len(s) - 1], g[: len(s) - 1]) for x, g, s in zip(gathered, p.argmax(-1) == targets, sequences)]


def some_sequences(*lengths):
    return [np.random.default_rng(n).integers(3, 512, n).tolist() for n in lengths]


# Scores


@pytest.mark.parametrize("name", [*ARCHITECTURES, "value-3", "ple-3"])
def test_scores_are_those_of_the_equations(lab, name, monkeypatch):
    monkeypatch.setattr(scoring, "_POSITIONS", 40)  # more than one batch of a length
    sequences = some_sequences(5, 33, 2, 17, 18, 9, 33, 30, 3)
    with lab.model(name) as model:
        greedy_ends = log_softmax(model, [sequences[1][:CONTEXT]])[0].argmax(-1)
        sequences += [[*sequences[1][:n], int(greedy_ends[n - 1])] for n in (7, CONTEXT)]
        expected = of_sequences(model, sequences)
        found = scoring.score(model.decoder, model.rows, sequences, CONTEXT)
    assert sum(greedy.sum() for _, greedy in expected) >= 2
    for scores, (log_probs, greedy) in zip(found, expected, strict=True):
        np.testing.assert_allclose(scores.log_probs_T, log_probs, atol=2e-5)
        np.testing.assert_array_equal(scores.greedy_T, greedy)
        assert scores.log_probs_T.dtype == np.float32


def test_ids_that_pad_the_vocabulary_have_no_share():
    rng = np.random.default_rng(0)
    x, head, targets = rng.normal(size=(2, 7, 4)), rng.normal(size=(10, 4)), rng.integers(0, 8, (2, 7))
    head[8:] *= 9
    logits = x @ head[:8].T
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    with jax.set_mesh(sharding.make_mesh(config.MeshConfig(2, 1, 1), jax.devices()[:2])):
        found = loss.log_probs(*map(jnp.float32, (x, head)), jnp.int32(targets), loss.Options(8, 0.0, 3, "float32"))
    np.testing.assert_allclose(found[0], np.take_along_axis(expected, targets[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(found[1], logits.argmax(-1) == targets)


# Perplexity


def quality(model, path, windows=None, **more):
    windows = windows or Windows(CONTEXT, CONTEXT)
    text = perplexity.prepared_text(path, "validation", model.tokenizer, windows)
    return perplexity.perplexity(model, text, windows, **more)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_perplexity_on_prepared_data_is_the_validation_of_training(lab, name):
    expected = json.load(open(f"{lab.workdir(name)}/result.json"))["validation"]
    ways = (
        [((), 1), ((), 8)] if name == "base" else [((), 8), ((lab.tol(name), "disk", 4096), 1), ((lab.tol(name),), 3)]
    )
    for arguments, devices in ways:
        with lab.model(name, *arguments, devices=devices) as model:
            found = quality(model, lab.data_path)
        assert found["tokens"] == expected["tokens"] and found["windows"] == -(-expected["tokens"] // CONTEXT)
        for key in ("loss", "perplexity", "bits_per_byte"):
            assert found[key] == pytest.approx(expected[key], rel=2e-6), (arguments, devices, key)
        assert found["word_perplexity"] == pytest.approx(np.exp(found["loss"] * found["tokens"] / found["words"]))


def test_text_files_are_what_prepare_would_make_of_them(lab, tmp_path):
    with lab.model("memory") as model:
        stream = dataset.Dataset(lab.data_path).validation
        ids = stream.read(0, stream.tokens)
        texts = [model.tokenizer.decode(d) for d in np.split(ids, np.nonzero(ids == model.tokenizer.bos_id)[0])[1:]]
        (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
        windows = Windows(CONTEXT, CONTEXT)
        text = perplexity.raw_text(str(tmp_path / "*.jsonl"), "body", model.tokenizer, windows)
        found = perplexity.perplexity(model, text, windows)
        assert found == quality(model, lab.data_path)
        assert found["words"] == sum(len(text.split()) for text in texts)
        assert found["bytes"] == sum(len(text.encode()) for text in texts)


def test_windows_with_a_stride_predict_each_token_once_from_at_least_the_rest(lab, tmp_path):
    stride, tokens = 12, 90
    windows = Windows(CONTEXT, stride, max_tokens=tokens)
    with lab.model("flex-3") as model:
        ids = dataset.Dataset(lab.data_path).validation.read(0, tokens + 1)
        first_window = [max(0, -(-(target - CONTEXT) // stride)) for target in range(tokens + 1)]
        starts = [stride * k for k in range(max(first_window) + 1)]
        batch = np.stack(
            [np.pad(part, (0, CONTEXT + 1 - len(part))) for part in (ids[s:][: CONTEXT + 1] for s in starts)]
        )
        p = log_softmax(model, batch[:, :-1])
        nll = [-p[k, target - starts[k] - 1, ids[target]] for target, k in enumerate(first_window) if target]
        found = quality(model, lab.data_path, windows)
        assert found["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
        assert (found["tokens"], found["windows"], len(nll)) == (tokens, len(starts), tokens)

        path = str(tmp_path / "ids.npy")
        found = quality(model, lab.data_path, Windows(CONTEXT, CONTEXT, tokens, whole=True), save_tokens=path)
        trained = np.load(path)
        assert (
            trained.shape == (2, CONTEXT + 1) and trained.dtype == np.int32 and found["tokens"] == trained[:, 1:].size
        )
        np.testing.assert_array_equal(trained.ravel()[: CONTEXT + 1], ids[: CONTEXT + 1])
        p = np.take_along_axis(log_softmax(model, trained[:, :-1]), trained[:, 1:, None], -1)
        assert found["loss"] == pytest.approx(-p.mean(), rel=1e-5)
        parts = [list(part.values()) for part in found["by_context"]]
        bounds = [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]
        for (start, last, nats, count), bound in zip(parts, bounds, strict=True):
            assert (start, last) == bound and count == 2 * (last - start + 1)
            assert nats == pytest.approx(-p[:, start - 1 : last].mean(), rel=1e-5)
        with pytest.raises(UserError, match="expected at least 33 tokens, found 9000"):
            Windows(CONTEXT, CONTEXT, 31, whole=True).cut(9000, "DATA")


def command(*arguments, devices=1, **env):
    arguments = [sys.executable, "-m", "memoryllm_jax.evaluate", *arguments]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=with_devices(devices) | env)


@pytest.mark.slow
def test_the_command_and_its_refusals(lab, tmp_path):
    workdir, out = f"--workdir={lab.workdir('memory')}", tmp_path / "out.json"
    where = (f"--data={lab.data_path}", f"--tol={lab.tol('memory')}", "--rows=host")
    page = tmp_path / "page"
    done = command(workdir, *where, "--stride=16", "--max_tokens=400", f"--output={out}", f"--page={page}", devices=2)
    assert done.returncode == 0, done.stderr
    result = json.load(open(out))
    with lab.model("memory") as model:
        assert result["loss"] == pytest.approx(
            quality(model, lab.data_path, Windows(CONTEXT, 16, 400))["loss"], rel=1e-5
        )
    assert result["model"]["architecture"] == "memory" and result["rows"]["rows"] == "host"
    assert f"{result['bits_per_byte']:.4f} bits per byte" in done.stdout
    assert json.load(open(page / "evaluate.json"))["results"] == result
    names = {"evaluate.html", "evaluate.json", "evaluate-quality.csv", "evaluate-context.csv", "evaluate-context.png"}
    assert set(os.listdir(page)) == names
    assert f"\nloss,{result['loss']!r},nats a token\n" in open(page / "evaluate-quality.csv").read()
    html = open(page / "evaluate.html").read()
    assert html.count(' nats">') == CONTEXT and "data:image/png;base64," in html and "https:" not in html
    for arguments, words in (
        ((), "expected --data=TEXT or --tasks=NAMES, found neither"),
        (("--data=embedded", "--limit=3"), "--limit: expected --tasks too"),
        ((f"--data={lab.data_path}", "--stride=33"), "--stride: expected 1 to 32, the model's context, found 33"),
        ((f"--data={tmp_path}",), "expected a folder that `prepare` finished"),
        (("--data=embedded", "--output=/nowhere/x.json"), "--output=/nowhere/x.json: expected a file in a folder"),
    ):
        refused = command(workdir, *arguments)
        assert refused.returncode == 1 and words in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


# The harness


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'memoryllm_jax[eval]'")

    from memoryllm_jax.evaluation import harness

    return harness


def requests(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("", {}, pair, 0) for pair in arguments]


def test_harness_likelihoods(lab, harness, monkeypatch):
    long = "The module defines functions that work on objects of a class and on its attributes. " * 3
    pairs = [("The list of", " names"), ("def f(x): ", "return x"), ("", "class A"), (long, " end of it"), ("A", "B")]
    with lab.model("flex-3") as model:
        encode, bos = model.tokenizer.encode, [model.tokenizer.bos_id]
        adapter = harness.MemoryLLM(model)
        found = adapter.loglikelihood(requests(*pairs))
        contexts = [bos + encode(text.rstrip()) for text, _ in pairs]
        wholes = [bos + encode(a + b) for a, b in pairs]
        assert len(wholes[3]) > CONTEXT + 1  # loses its beginning
        sequences = [whole[-CONTEXT - 1 :] for whole in wholes]
        for (total, greedy), (p, g), a, b in zip(found, of_sequences(model, sequences), contexts, wholes, strict=True):
            assert b[: len(a)] == a
            assert total == pytest.approx(p[len(a) - len(b) :].sum(), abs=1e-4)
            assert greedy == g[len(a) - len(b) :].all()

        text = long + long
        ids = bos + encode(text)
        starts = range(0, len(ids), CONTEXT)
        windows = [(bos + ids)[s : s + CONTEXT + 1] for s in starts]
        added = CONTEXT + 1 - len(windows[-1])  # the last window is filled with context from before it
        windows[-1] = (bos + ids)[-CONTEXT - 1 :]
        total = sum(p.sum() for p, _ in of_sequences(model, windows[:-1]))
        total += of_sequences(model, windows[-1:])[0][0][added:].sum()
        assert adapter.loglikelihood_rolling(requests(("A list.",), (text,)))[1] == pytest.approx(total, abs=1e-3)
        with pytest.raises(UserError, match="expected a context and a continuation of 1 to 32 tokens, found 2 and"):
            adapter.loglikelihood(requests(("A", long)))


def test_harness_texts_end_at_stop_strings_and_lengths(lab, harness):
    contexts = ["The list of", "def", "A class is an object that holds attributes and methods of its instances and"]
    with lab.model("memory") as model:
        adapter = harness.MemoryLLM(model)

        def texts(contexts, **settings):
            return adapter.generate_until(requests(*((context, settings) for context in contexts)))

        whole = []
        for context in contexts:
            prompt = model.prompt(context)[12 - CONTEXT :]
            steps = model.generate([prompt], 12, Sampling(0), stop_ids=[model.tokenizer.eos_id])
            whole.append(model.tokenizer.decode([token for step in steps for _, token in step]))
        assert texts(contexts, max_gen_toks=12, until=[]) == whole
        stop = whole[0][3:6]
        assert texts(contexts, max_gen_toks=12, until=[stop, "never"]) == [text.split(stop)[0] for text in whole]
        drawn = texts(contexts[:1] * 4, max_gen_toks=12, do_sample=True, temperature=1.0, top_k=50)
        assert len(set(drawn)) == 4
        assert drawn == texts(contexts[:1] * 4, max_gen_toks=12, do_sample=True, temperature=1.0, top_k=50)
        with pytest.raises(UserError, match=r"expected max_gen_toks from 1 to 31, .* found 256"):
            texts(contexts)
        with pytest.raises(UserError, match="found num_beams=4"):
            texts(contexts, max_gen_toks=2, num_beams=4)


def test_local_tasks_run_without_a_network(lab, harness, tmp_path, monkeypatch):
    pairs = [("She gave him a", "book"), ("Call this function with a", "string"), ("The value is", "None")]
    lines = [{"query": query, "answers_text": [answer]} for query, answer in pairs]
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    goods = [{"goal": f"do {n}", "sol1": "a b c" * n, "sol2": "return the value", "label": n % 2} for n in range(1, 5)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in goods))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a network was asked for"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    output = tmp_path / "results" / "all.json"
    output.parent.mkdir()
    with lab.model("flex-3", lab.tol("flex-3")) as model:
        tasks = harness.Tasks(["lambada_local", "piqa_*al"], data=str(tmp_path))
        results = tasks.run(model, {"path": "DIR"}, output=str(output), log_samples=True, bootstrap_iters=10)
        table = tasks.table(results)
        scores = harness.MemoryLLM(model).loglikelihood(requests(*((query, f" {answer}") for query, answer in pairs)))
        choices = [(f"Question: {g['goal']}\nAnswer:", f" {g[name]}") for g in goods for name in ("sol1", "sol2")]
        of_choices = harness.MemoryLLM(model).loglikelihood(requests(*choices))
        page = report.Report(str(tmp_path / "page"), "evaluate", "tasks", {})
        of_tasks(page, results)
        page.write({})
    record = json.load(open(output))
    lambada, piqa = record["results"]["lambada_local"], record["results"]["piqa_local"]
    assert lambada["perplexity,none"] == pytest.approx(np.exp(-np.mean([score for score, _ in scores])))
    assert lambada["acc,none"] == np.mean([greedy for _, greedy in scores])
    p = np.array([score for score, _ in of_choices]).reshape(-1, 2)
    labels, lengths = [g["label"] for g in goods], [[len(g["sol1"]), len(g["sol2"])] for g in goods]
    assert piqa["acc,none"] == np.mean(p.argmax(1) == labels)
    assert piqa["acc_norm,none"] == np.mean((p / lengths).argmax(1) == labels)
    lines_of = {tuple(line[:2]): line[3:] for line in csv.reader(open(tmp_path / "page" / "evaluate-scores.csv"))}
    for metric in ("acc", "acc_norm"):
        written = [float(value) for value in lines_of["piqa_local", metric]]
        assert written == [piqa[f"{metric},none"], piqa[f"{metric}_stderr,none"], 0, len(goods)]
    assert os.path.getsize(tmp_path / "page" / "evaluate-scores.png") > 4000
    assert {"configs", "versions", "n-shot", "config", "n-samples", "task_hashes", "lm_eval_version"} <= set(record)
    assert record["model_name"] == "DIR" and "|lambada_local|" in table and "acc_norm" in table
    samples = glob.glob(str(output.parent / "samples_piqa_local_*.jsonl"))
    assert len(samples) == 1 and len(open(samples[0]).readlines()) == 4 and len(os.listdir(output.parent)) == 3

    with pytest.raises(UserError, match=r"no task 'lambda_local'; did you mean .*lambada_local"):
        harness.Tasks(["lambda_local"])
    (tmp_path / "piqa.jsonl").write_text('{"goal": "x"}\n')
    with lab.model("flex-3") as model:
        with pytest.raises(UserError, match=r"piqa.jsonl: line 1: expected an example of piqa.jsonl, found .*sol1"):
            harness.Tasks(["piqa_local"], data=str(tmp_path)).run(model, {})
        with pytest.raises(UserError, match="--task_data: expected the folder that holds"):
            harness.Tasks(["lambada_local"]).run(model, {})
