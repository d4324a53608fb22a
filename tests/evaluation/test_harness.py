"""The harness's requests against tests/reference.py's equations, and its local tasks against our own scores."""

import csv
import glob
import json
import os
import socket
import types

import numpy as np
import pytest
from lab import CONTEXT, of_sequences

from memoryllm_jax.common import report
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.evaluation.page import of_tasks
from memoryllm_jax.inference.sampling import Sampling


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'memoryllm_jax[eval]'")

    from memoryllm_jax.evaluation import harness

    return harness


@pytest.fixture(scope="module")
def flex(lab):
    """The engine of flex-3, which several tests read."""
    with lab.model("flex-3") as model:
        yield model


@pytest.fixture
def without_listing(harness, monkeypatch):
    """Leaves out the harness's own tasks, which take ten seconds to list."""
    manager = harness.TaskManager
    monkeypatch.setattr(harness, "TaskManager", lambda **more: manager(**more | {"include_defaults": False}))


def requests(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("", {}, pair, 0) for pair in arguments]


def test_likelihoods_of_requests_are_those_of_the_equations(flex, harness):
    long = "The module defines functions that work on objects of a class and on its attributes. " * 3
    pairs = [("The list of", " names"), ("def f(x): ", "return x"), ("", "class A"), (long, " end of it"), ("A", "B")]
    encode, bos = flex.tokenizer.encode, [flex.tokenizer.bos_id]
    adapter = harness.MemoryLLM(flex)
    found = adapter.loglikelihood(requests(*pairs))
    contexts = [bos + encode(text.rstrip()) for text, _ in pairs]
    wholes = [bos + encode(a + b) for a, b in pairs]
    assert len(wholes[3]) > CONTEXT + 1  # loses its beginning
    sequences = [whole[-CONTEXT - 1 :] for whole in wholes]
    for (total, greedy), (p, g), a, b in zip(found, of_sequences(flex, sequences), contexts, wholes, strict=True):
        assert b[: len(a)] == a
        assert total == pytest.approx(p[len(a) - len(b) :].sum(), abs=1e-4)
        assert greedy == g[len(a) - len(b) :].all()
    with pytest.raises(UserError, match="expected a context and a continuation of 1 to 32 tokens, found 2 and"):
        adapter.loglikelihood(requests(("A", long)))


def test_rolling_likelihood_counts_each_token_of_a_text_once(flex, harness):
    text = "The module defines functions that work on objects of a class and on its attributes. " * 6
    encode, bos = flex.tokenizer.encode, [flex.tokenizer.bos_id]
    adapter = harness.MemoryLLM(flex)
    ids = bos + encode(text)
    starts = range(0, len(ids), CONTEXT)
    windows = [(bos + ids)[s : s + CONTEXT + 1] for s in starts]
    added = CONTEXT + 1 - len(windows[-1])  # the last window is filled with context from before it
    windows[-1] = (bos + ids)[-CONTEXT - 1 :]
    total = sum(p.sum() for p, _ in of_sequences(flex, windows[:-1]))
    total += of_sequences(flex, windows[-1:])[0][0][added:].sum()
    assert adapter.loglikelihood_rolling(requests(("A list.",), (text,)))[1] == pytest.approx(total, abs=1e-3)


def test_generated_texts_end_at_stop_strings_and_lengths(lab, harness):
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


def test_local_tasks_run_without_a_network(lab, harness, without_listing, tmp_path, monkeypatch):
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


def test_bad_tasks_and_data_are_refused_before_the_model_is_used(harness, without_listing, tmp_path):
    model = types.SimpleNamespace(tokenizer=None, context=CONTEXT)
    with pytest.raises(ArgumentError, match=r"tasks: .*found .lambda_local.; did you mean .*lambada_local"):
        harness.Tasks(["lambda_local"])
    with pytest.raises(ArgumentError, match="task_path: expected a folder with task files, found none at nowhere"):
        harness.Tasks(["lambada_local"], path="nowhere")
    with pytest.raises(ArgumentError, match="task_data: expected the folder that holds"):
        harness.Tasks(["lambada_local"]).run(model, {})
    (tmp_path / "piqa.jsonl").write_text('{"goal": "x"}\n')
    with pytest.raises(UserError, match=r"piqa.jsonl: line 1: expected a field sol1, found none"):
        harness.Tasks(["piqa_local"], data=str(tmp_path)).run(model, {})
