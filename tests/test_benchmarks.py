"""Benchmarks at a small size: gpu.py whole on a CPU, and the errors and tables of quality_by_size.py."""

import gzip
import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lab import with_devices

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import intervals

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_all_parts_of_the_measurements_on_a_gpu_run_on_a_cpu(tmp_path, monkeypatch):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--rehearse", f"--out={tmp_path}/out", f"--work={tmp_path}/work"]
    done = subprocess.run(command, capture_output=True, text=True, env=with_devices(1))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    without_torch = importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None
    skipped = {name for name, part in found["gpu"]["parts"].items() if "skipped" in part}
    assert skipped == ({"peer"} if without_torch else set())
    assert {test["outcome"] for test in found["tests"].values()} == {"passed"}
    base, memory = (found["train"]["results"][side] for side in ("base", "memory"))
    assert memory["speed_over"]["base"]["predicted"] > 1 and base["planned_bytes"] > 12 * base["parameters"]
    if not without_torch:
        assert found["train"]["results"]["llama"]["parameters"] == base["parameters"]
        assert found["peer"]["results"]["llama, batch 2"]["least_bytes"] > 0
    assert found["serve"]["tol_build"]["bytes"] > 600 * 32 * 2 and len(found["serve"]["results"]) == 2
    measured = {row["what"]: row["measured"] for row in found["gpu"]["targets"]}
    assert measured["tests on the device"] == "2 of 2 passed" and measured["MFU of base-1b"] == "not measured"
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert "| memory |" in importlib.import_module("speed_tables").markdown(f"{tmp_path}/out/train.json")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "_GRACE_S", 2)
    monkeypatch.setattr(module, "_LEAST_S", 2)
    monkeypatch.setattr(module, "without_gpu", lambda settings: "")
    return module


HANGS = """
import signal, subprocess, sys, tempfile
tempfile.mkstemp()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(subprocess.Popen(['sleep', '60']).pid, flush=True)
signal.pause()
"""


def test_a_part_that_fails_or_hangs_leaves_its_record_and_the_other_parts(gpu, monkeypatch, tmp_path):
    codes = {"tests": "import no_such_package", "train": HANGS, "serve": "print('measured')"}
    for name, code in codes.items():
        monkeypatch.setitem(gpu.PARTS, name, gpu.Part(("-c", code), limit=4))
    (tmp_path / "serve.json").write_text("{}")
    (tmp_path / "tests.json").write_text('{"a test": {"of": "another version"}}')  # the table cannot be made
    (tmp_path / "gpu.json").write_text('{"parts": {"peer": {"code": 0}}}')
    settings = gpu.Settings(out=str(tmp_path), parts=tuple(codes), work=str(tmp_path / "work"))
    assert gpu.main(settings) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["code"] for name, part in parts.items()} == dict(peer=0, tests=1, train=7, serve=0)
    assert parts["tests"]["last_lines"][-1] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert parts["train"]["end"] == "as its time was over" and parts["serve"]["last_lines"] == ["measured"]
    assert os.listdir(tmp_path / "work") == []  # the temporary files of the part that was ended
    (started,) = parts["train"]["last_lines"]
    end = time.monotonic() + 10
    while is_running(started):
        assert time.monotonic() < end


def test_sigterm_ends_the_part_and_leaves_the_record(gpu, monkeypatch, tmp_path):
    code = "import os, signal; os.kill(os.getppid(), signal.SIGTERM); signal.pause()"
    for name in ("tests", "serve"):
        monkeypatch.setitem(gpu.PARTS, name, gpu.Part(("-c", code), limit=100))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu.main(gpu.Settings(out=str(tmp_path), parts=("tests", "serve"), work=str(tmp_path / "work")))
    finally:
        signal.signal(signal.SIGTERM, before)
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"].values()
    assert part["end"] == "as it was interrupted" and part["code"] == -signal.SIGTERM


def is_running(number: str) -> bool:
    """Whether a process runs: it is not gone, nor a zombie that its new parent has not asked about."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_finished_run_is_read_unless_it_was_asked_for_other_fields(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    common = importlib.import_module("common")
    (tmp_path / "result.json").write_text('{"steps": 3}')
    for _ in range(2):
        assert common.train(str(tmp_path), "tiny.py:base", {"steps": 3}) == {"steps": 3}
    for config, fields, name in (("tiny.py:memory", {"steps": 3}, "config"), ("tiny.py:base", {"steps": 4}, "steps")):
        with pytest.raises(UserError, match=rf"asked\.json: {name}: expected .* of this run, found"):
            common.train(str(tmp_path), config, fields)
    monkeypatch.setattr(common.sys, "executable", "false")
    with pytest.raises(UserError, match=r"new\.log: expected exit code 0 of the training, found 1"):
        common.train(str(tmp_path / "new"), "tiny.py:base", {})


def test_missing_requirements_come_with_what_they_need(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    requirements = importlib.import_module("requirements")
    listing = "Package Version\n------- -------\nnumpy 2.4.6\nJax_Lib==0.9\nabsl-py\ngrain    0.1.2  /somewhere\n"
    installed = requirements.installed_in(listing)
    assert installed == {"package": "", "numpy": "2.4.6", "jax-lib": "0.9", "absl-py": "", "grain": "0.1.2"}
    asked = ["numpy>=2", "absl-py>=99", "grain>=0.2.12", "nothing-like-it>=3,<4", "tomli; python_version < '3.10'"]
    found = requirements.missing(asked, installed, python="3.12")
    names = {text.partition("==")[0] for text in found}
    assert "nothing-like-it<4,>=3" in names and {"grain", "array-record"} <= names
    assert not {"numpy", "absl-py", "tomli"} & names


@pytest.fixture
def quality_by_size(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("quality_by_size")


def test_error_of_a_paired_difference_is_that_of_the_mean_over_batches(quality_by_size):
    rng = np.random.default_rng(0)
    losses_N, gains_N, tokens_N = rng.uniform(50, 90, 20), rng.normal(0.3, 0.1, 20), np.full(20, 10)
    found = quality_by_size.difference(losses_N + gains_N, losses_N, tokens_N)
    assert found == pytest.approx((gains_N.mean() / 10, gains_N.std(ddof=1) / np.sqrt(20) / 10))
    tokens_N[-1] = 1  # a short last batch with a gain in proportion changes nothing
    assert quality_by_size.difference(tokens_N * 0.5, tokens_N * 0.2, tokens_N) == pytest.approx((0.3, 0), abs=1e-9)


def test_table_claims_only_what_the_errors_separate(quality_by_size):
    row = {"kind": "bits", "setting": "4 bits", "bytes": 90, "rise": 0.004, "error": 0.001}
    pair = {"uniform": row, "bytes": 88, "rise": 0.001, "error": 0.001, "difference": -0.003, "difference_error": 0.001}
    text = quality_by_size.tables([row], [pair, pair | {"difference_error": 0.002}])
    separated, noise = [line for line in text.splitlines() if line.startswith("| 90 |")]
    assert separated == "| 90 | 4 bits | +0.401 ± 0.100 | +0.100 ± 0.100 | -0.300 ± 0.100 | budget better |"
    assert noise.endswith("| -0.300 ± 0.199 | no |")
    # The second setting is larger than the first, and no better.
    assert quality_by_size.frontier([(10, 3.0), (20, 3.5), (30, 1.0)]) == [0, 2]


def test_the_text_of_made_up_facts_states_those_of_known_subjects_and_none_of_others(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    world_lib, facts = importlib.import_module("facts_world"), importlib.import_module("facts")
    world, draw = world_lib.World(12, 4), random.Random(0)
    text = " ".join(world.document(draw) for _ in range(400))
    stated = [f"{prompt} {fact.object}." for fact in world.facts.values() for prompt in fact.prompts]
    assert len(stated) == 12 * 6 * 6 and sum(sentence in text for sentence in stated) > 0.9 * len(stated)
    chosen = facts.facts_to_teach(world, 2, draw)
    for fact in chosen["new"]:  # the text names its subject, and says nothing of it
        assert fact.subject in text and not any(prompt in text for prompt in fact.prompts)
    for fact in chosen["changed"]:
        assert world.facts[fact.subject, fact.relation].object != fact.object
        probes = facts.probes_of(fact, world, draw)
        assert {p.target for p in probes if p.measure in ("taught prompt", "paraphrase")} == {fact.target}
        far = [p.text for p in probes if p.measure == "neighbour"]
        near = [p.text for p in probes if p.measure == "neighbour after the subject"]
        assert len(far) == len(near) == 5 and all(fact.subject in p for p in near)
        assert not any(fact.subject in p for p in far)


def test_tasks_have_the_answers_that_the_text_states_and_that_the_rules_give(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    generator = importlib.import_module("recall_reasoning")
    options = {"characters": 400_000, "questions": 20, "subjects": 10}  # and 60 facts
    generator.main(str(tmp_path), **options)
    lines = b"".join(gzip.decompress(path.read_bytes()) for path in sorted(tmp_path.glob("text/train-*.gz")))
    text = " ".join(json.loads(line)["text"] for line in lines.splitlines())
    found = {path.stem: list(map(json.loads, path.open())) for path in tmp_path.glob("tasks/*.jsonl")}
    for name, questions in found.items():
        assert len(questions) == (30 if name.startswith("recall") else 20) and len({q["answer"] for q in questions}) > 1
        for q in questions:
            answer = q["choices"][q["answer"]]
            filler, _, context = q["context"].partition(". ")
            assert len(set(q["choices"])) == 4 and f"{filler}." in generator.FILLERS
            if name == "recall_stated":
                assert f"{context} {answer}." in text
            elif name == "recall_rephrased":  # the text has the fact, and never in these words
                assert context not in text and " " + answer in text
            elif name == "reasoning_copy":
                listed, again = (part.split() for part in context.removeprefix("The list: ").split(". Again: "))
                assert again == listed[: len(again)] and answer == listed[len(again)]
                assert not set(q["choices"]) & set(again)
            elif name == "reasoning_lookup":
                pairs, asked = (part.split(", ") for part in context.removeprefix("The owners: ").split(". So "))
                assert f"{asked[-1]} {answer}" in pairs and len(pairs) == 5
                assert asked[0] in pairs and asked[0].split()[1] not in q["choices"]
            else:
                words = context.removeprefix("The cycle: ").split()
                assert words.index(answer) > 0 and words[words.index(answer) - 1] == words[-1]
    again = tmp_path / "again"
    generator.main(str(again), **options)
    assert {path.stem: path.read_text() for path in again.glob("tasks/*.jsonl")} == {
        path.stem: path.read_text() for path in tmp_path.glob("tasks/*.jsonl")
    }


def test_the_papers_text_is_english_and_exercises_also_where_it_is_held_out(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    paper, generator = importlib.import_module("paper"), importlib.import_module("recall_reasoning")

    def run(work, log, script, output, characters):
        generator.main(f"{work}/exercises", int(characters.removeprefix("--characters=")), questions=4, subjects=10)

    monkeypatch.setattr(paper, "run", run)
    with pytest.raises(UserError, match=r"english: expected a folder with train-\*\.json\.gz, found none in "):
        paper.make_text(str(tmp_path / "work"), str(tmp_path), 500_000)
    for split in ("train", "validation"):
        paper.write_lines(str(tmp_path / f"{split}-0.json.gz"), [letter * 30_000 for letter in "ABCDEF"])
    paper.make_text(str(tmp_path / "work"), str(tmp_path), 500_000)

    def documents(name):
        lines = gzip.decompress((tmp_path / "work/texts" / name).read_bytes()).splitlines()
        return [json.loads(line)["text"] for line in lines]

    sizes = [len(text) for text in documents("train-english.json.gz")]
    assert max(sizes) == 20_000 and 100_000 <= sum(sizes) < 120_000
    is_english = [text[0] == text[1] for text in documents("validation-0.json.gz")]
    assert 0 < sum(is_english) < len(is_english) == 17 and sorted(is_english, reverse=True) != is_english


def test_the_papers_pages_are_made_once_and_their_record_names_no_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    paper = importlib.import_module("paper")
    lines = []

    def run(work, log, *arguments):
        lines.append(arguments)
        folder = Path(work) / arguments[-1].removeprefix("--output=")
        (folder / "seed-0").mkdir(parents=True)
        found = {"facts": {"checkpoint": f"{work}/memory-0, step 4"}, "results": {"layers": [0.1234567], "long": []}}
        (folder / "clusters.json").write_text(json.dumps(found))
        (folder / "clusters-purity.png").write_bytes(b"of all")
        (folder / "seed-0" / "clusters-layer0.png").write_bytes(b"of the first")

    monkeypatch.setattr(paper, "run", run)
    pages = {page.name: page for page in paper._analyses(("base", "memory", "flex-3"))}
    assert "mutate-memory" not in pages and "clusters-base" not in pages and "agreement-flex-3-compute" in pages
    assert set(paper._PICTURES) <= set(pages)
    page = pages["clusters-memory"]._replace(kept=("layers",))
    for seed in range(2):
        (tmp_path / f"memory-{seed}").mkdir()
        (tmp_path / f"memory-{seed}" / "result.json").write_text('{"validation": {"loss": 2.3456789}, "steps": 4}')
        made = {"variant": "memory", "seed": seed, "rate": 0.004, "tokens": 8192}
        (tmp_path / f"memory-{seed}" / "run.json").write_text(json.dumps(made))
    for _ in range(2):
        paper.analyze(str(tmp_path), [page], seeds=[0, 1])
    (line,) = lines
    assert line[2:] == ("clusters", "--workdir=memory-0", "--workdir=memory-1", "--output=pages/clusters-memory")
    paper.show(str(tmp_path), [page, pages["outliers-memory"]], str(tmp_path / "record.json"), str(tmp_path / "docs"))
    record = json.loads((tmp_path / "record.json").read_text())["results"]
    facts = {"checkpoint": "memory-0, step 4"}
    models = {f"memory-{seed}": {"tokens": 8192, "seed": seed, "rate": 0.004, "loss": 2.3456789} for seed in range(2)}
    assert record.pop("models") == models
    assert record == {"clusters-memory": {"facts": facts, "results": {"layers": [0.123457]}}}
    assert (tmp_path / "docs/look-inside/clusters-memory.png").read_bytes() == b"of the first"
    assert "outliers-memory: has no page yet" in capsys.readouterr().out


def test_pages_are_told_by_their_names_and_held_out_whole(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    pages = importlib.import_module("pages")
    documents = [(f"doc/html/p{i}.html", "page " * i) for i in range(64)]
    documents += [(f"doc/Documentation/p{i}.rst.gz", "page " * (2000 + i)) for i in range(64)]
    documents.append(("doc/html/translations/p.html", "seite"))
    lines = "".join(json.dumps({"text": text, "url": url}) + "\n" for url, text in documents)
    (tmp_path / "texts.json.gz").write_bytes(gzip.compress(lines.encode()))
    pages.main(str(tmp_path), str(tmp_path / "out"))
    train, held_out = (
        [json.loads(line) for line in gzip.open(tmp_path / f"out/{split}-00000.json.gz", "rt")]
        for split in ("train", "validation")
    )
    names = [page["url"] for page in (*train, *held_out)]
    assert sorted(names) == sorted(f"doc/p{i}" for i in range(64)) and 0 < len(held_out) < 16
    assert {len(page["text"]) for page in held_out} == {4096} and all(len(page["text"]) >= 10_000 for page in train)


def test_the_share_of_tokens_is_interpolated_between_runs_from_scratch(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    conversion = importlib.import_module("conversion")
    units_D = np.full(40, 10.0)

    def nats_of(loss):
        return np.full((1, 40), 10 * loss)

    sums = {(conversion.SCRATCH, 100): nats_of(3.0), (conversion.SCRATCH, 400): nats_of(2.0)}
    sums |= {("copy", 50): nats_of(2.5), ("copy", 100): nats_of(1.0), ("copy", 25): nats_of(4.0)}
    losses = conversion.Losses(intervals.Documents(40), units_D, sums, intervals.NO_SPREAD)
    assert losses.share("copy", 50).value == pytest.approx(50 / 200)  # halfway in the logarithm of tokens
    assert losses.share("copy", 100).value == pytest.approx(100 / 400)  # at most: scratch does not get there
    assert losses.share("copy", 25).value == math.inf  # scratch was better after its shortest run
