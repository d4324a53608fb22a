"""The page of a comparison, on scores that were made up: a memory that helps, and a control that does not."""

import csv
import json
import math
import os
import re
import tarfile

import numpy as np
import pytest
from lab import CONTEXT

from memoryllm_jax import compare
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import answers, comparison, costs, heldout, laws, outcomes, packing, scoring, splits
from memoryllm_jax.experiments import protocol as protocol_lib
from memoryllm_jax.experiments.fits import Law
from memoryllm_jax.experiments.protocol import Contrast, Experiment, Protocol, Sweep, Variant
from memoryllm_jax.experiments.results import Cell, Group, Results
from memoryllm_jax.model import flops

LAW = Law(("ffn",), np.array([math.log(1), math.log(5), 0.2, math.log(150), 0.4, 0, 0]), (1, 1))
GAINS = {"base": 0, "flex-3": 1.0, "control": 0, "flex-1": 0}  # in nats a token in the second half of a window
METRICS = dict.fromkeys(("loss", "perplexity", "bits_per_byte", "grad_norm", "learning_rate", "z_loss", "epoch"), 1.0)
METRICS |= {"tokens": 64, "rows": 8, "tokens_per_second": 1e3, "model_flops_per_second_plain": 5e9}
PERMUTED = 0.5  # nats a token that permuted rows cost
SIZES = {name: {"model.dim": dim} for name, dim in (("S", 32), ("M", 64), ("L", 96))}
CONTRASTS = (
    Contrast("Does it help?", "flex-3", "base"),
    Contrast("A planted useless memory", "control", "base"),
    Contrast("Do its rows help?", "flex-3", ""),
)


@pytest.fixture(scope="module")
def protocol():
    return Protocol(
        config="configs/tiny.py",
        fields={"seq_len": CONTEXT, "model.layers": 2, "model.heads": 2},
        sizes=SIZES,
        vocabularies={"512": "sentencepiece:train:512"},
        variants=(
            Variant("base"),
            Variant("flex-3"),
            Variant("control", "flex-3", {"model.rows": "shared"}, rate_of="flex-3", control_of="flex-3"),
            Variant("flex-1"),
        ),
        sweep=Sweep(tokens={"512": 1e4}, rates=(1e-3, 2e-3, 4e-3), sizes={"S": "S", "M": "S", "L": "S"}),
        experiments=(
            Experiment("main", tuple(GAINS), ("S", "M", "L"), ("512",), (1e4, 4e4, 1e5)),
            Experiment("seeds", tuple(GAINS), ("S",), ("512",), (4e4,), (0, 1, 2, 3)),
        ),
        contrasts=CONTRASTS,
    )


@pytest.fixture(scope="module")
def workdir(protocol, lab, tmp_path_factory):
    """The folder of a finished comparison, without models: sweeps whose best rate is 2e-3, and scores of all runs."""
    workdir = tmp_path_factory.mktemp("comparison")
    data = str(workdir / "data" / "512")
    # Many documents of equal size, as few or unequal ones get no interval
    text = "".join(json.loads(line)["text"] for line in open(lab.corpus))
    pieces = [{"text": text[begin : begin + 1000]} for begin in range(0, 100_000, 1000)]
    (workdir / "text.jsonl").write_text("\n".join(map(json.dumps, pieces)))
    tokenizer = f"sentencepiece:{lab.data_path}/tokenizer.model"
    shards.prepare(str(workdir / "text.jsonl"), tokenizer, data, validation_fraction=0.5)
    for setting in map(protocol.swept, protocol.settings()):
        for rate in protocol.sweep.rates:
            folder = protocol.sweep_run(setting, rate).folder(workdir)
            os.makedirs(folder, exist_ok=True)
            with open(f"{folder}/result.json", "w") as file:
                json.dump({"validation": {"loss": 4 + abs(np.log(rate / 2e-3))}}, file)
    text = heldout.open_text(Dataset(data), CONTEXT)
    groups = splits.of_text(text, Dataset(data))
    is_late_N = text.position_N >= CONTEXT // 2
    for run in protocol.experiment_runs(outcomes.chosen_rates(protocol, workdir)):
        rng = np.random.default_rng([list(GAINS).index(run.variant), run.seed, run.tokens])
        counts = flops.parameters(run.config)
        kind = "ffn" if counts["memory"] else ""
        loss = LAW.loss(counts["active"], counts["memory"], run.tokens, kind) - LAW.loss(counts["active"], 0, 1e9, "")
        nats_N = loss - GAINS[run.variant] * is_late_N + rng.normal(0, 0.01, len(text.targets))
        folder = run.folder(workdir)
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/run.json", "w") as file:
            json.dump({"commit": "cc" if run.seed else "c", "versions": {"jax": "1"}}, file)
        with open(f"{folder}/metrics.jsonl", "w") as file:
            json.dump({"kind": "train", "step": 1} | METRICS | {"model_flops_per_second": 5e9}, file)
            file.write("\n")
        scoring._write(f"{folder}/heldout.npz", text, scoring.sums(nats_N, text, groups))
        scoring._write(f"{folder}/heldout_permuted.npz", text, scoring.sums(nats_N + PERMUTED, text, ()))
    return str(workdir)


@pytest.fixture(scope="module")
def results(protocol, workdir):
    return Results(protocol, outcomes.finished(protocol, workdir), workdir)


def test_answers_are_the_differences_that_were_planted(protocol, results):
    found = answers.of_results(results)
    assert found.contrasts() == list(CONTRASTS) and found.factor > 1
    text, cell = results.texts["512"], Cell("S", "512", 100_096)
    late = Group("position", 5, "17-32")
    bits = text.tokens / (text.bytes * np.log(2))
    helps, useless, rows = (found.last(contrast)["S", "512"] for contrast in CONTRASTS)
    assert helps.cell == useless.cell == cell and helps.seeds == 1 and helps.covers_seeds
    assert helps.difference.value == pytest.approx(-text.tokens_of(late) / text.tokens * bits, abs=1e-3)
    assert rows.difference.value == pytest.approx(-PERMUTED * bits, abs=1e-3)
    assert helps.finds and rows.finds and not useless.finds
    for label, expected in (("17-32", -1), ("9-16", 0)):
        (group,) = (group for group in text.groups(text.splits[2]) if group.label == label)
        assert results.difference("flex-3", "base", cell, group).estimate.value == pytest.approx(expected, abs=0.01)


def test_a_difference_without_a_spread_over_seeds_is_no_finding(results):
    # Runs of 10,000 tokens are shorter than those of several seeds, which vary less.
    short, *others = answers.of_results(results).of(CONTRASTS[0]).values()
    assert short.difference.finds and not short.covers_seeds and not short.finds
    assert {(found.covers_seeds, found.cell.tokens > 20_000) for found in others} == {(True, True), (False, False)}


def test_vocabularies_are_compared_after_equal_text(results):
    class Text:
        bytes_per_token = 4.0

    def answer(*cell):
        return answers.Answer(CONTRASTS[0], Cell(*cell), None, 1, True)

    results = object.__new__(Results)
    results.texts = {"512": type("Short", (), {"bytes_per_token": 1.5}), "32000": Text}
    row = [answer("S", "512", tokens) for tokens in (1e6, 2e6, 4e6, 8e6)]
    row += [answer("S", "32000", tokens) for tokens in (1e6, 2e6)]
    (of_size,) = answers.at_equal_text(results, {found.cell: found for found in row}).values()
    assert [(found.cell.vocabulary, found.cell.tokens) for found in of_size] == [("512", 4e6), ("32000", 2e6)]


@pytest.fixture
def draw(protocol, monkeypatch):
    """Writes the page of a workdir."""
    fitted = laws.of_vocabulary
    monkeypatch.setattr(laws, "of_vocabulary", lambda *given: fitted(*given, replicates=3))
    monkeypatch.setattr(protocol_lib, "load", lambda path: protocol)
    return lambda workdir: compare.main("configs/protocols/small.py", workdir, report=True)


def test_packed_runs_give_the_same_numbers_elsewhere(workdir, draw, tmp_path):
    os.makedirs(f"{workdir}/runs/unfinished", exist_ok=True)
    for name in ("run.json", "metrics.jsonl"):
        open(f"{workdir}/runs/unfinished/{name}", "w").close()
    draw(workdir)
    os.symlink(f"{workdir}/data", tmp_path / "data")
    with tarfile.open(f"{workdir}/{packing.FILE}") as archive:
        archive.extractall(tmp_path, filter="data")
    assert set(os.listdir(tmp_path / "runs")) == set(os.listdir(f"{workdir}/runs")) - {"unfinished"}
    draw(str(tmp_path))
    for name in ("comparison.json", packing.FILE):
        with open(f"{workdir}/{name}", "rb") as one, open(tmp_path / name, "rb") as other:
            assert one.read() == other.read()


def test_scores_of_other_groups_are_refused(results, workdir, tmp_path):
    with np.load(f"{results.runs[0].folder(workdir)}/heldout.npz") as scores:
        np.savez(tmp_path / "heldout.npz", **{name: scores[name] for name in scores.files if name != "bigram"})
    with pytest.raises(UserError, match=r"expected scores of the groups .*'bigram'.*, found .*; score the run again"):
        results.texts["512"].scores(str(tmp_path))


def test_the_page_shows_what_the_record_holds(workdir, draw):
    draw(workdir)
    page = open(f"{workdir}/comparison.html").read()
    content = open(f"{workdir}/comparison.json").read()
    record = json.loads(content)
    assert workdir not in page and workdir not in content
    facts, found = record["facts"], record["results"]
    assert facts["finished runs"].startswith("48 of 48")
    assert facts["code of the runs"] == "commit c, jax 1; commit cc, jax 1" and "same code" in facts["warning"]
    marked = found["answers"]["differences"]
    assert len(marked) == len(CONTRASTS) * len(SIZES) * 3 and facts["intervals"].startswith(f"{len(marked)} answers")
    found_in = {(row["question"], row["finds"]) for row in marked if row["covers_seeds"]}
    assert found_in == {(contrast.question, contrast.a == "flex-3") for contrast in CONTRASTS}
    with open(f"{workdir}/comparison-answers.csv") as file:
        shown = {row["question"]: row["512 ids, size S"] for row in csv.DictReader(file)}
    last = {row["question"]: row for row in marked if row["size"] == "S"}  # the longest comes last
    for question, cell in shown.items():
        value, _, high = last[question]["difference"]
        numbers = [float(x) for x in re.findall(r"[\d.]+", cell)[:2]]
        assert numbers == pytest.approx([abs(value), high - value], abs=6e-4)
        assert cell.startswith("▼" if last[question]["finds"] else ("+", "-")) and cell in page
    explored = page[page.index("Exploration") :]
    assert "▼" in page and "▼" not in explored and "▲" not in explored
    assert [row["split"] for row in found["splits"]] == ["input", "target", "position", "bigram"]
    for row in found["splits"]:  # of the one cell with several seeds
        assert row["size"] == "S" and 4e4 <= row["tokens"] < 5e4
        assert list(row["differences"]) == ["flex-3 less base", "control less base"]
    losses = found["losses"]
    assert len(losses) == len(GAINS) * len(SIZES) * 3
    assert [row["against"] for row in losses[:4]] == ["", "base", "flex-3", "base"]
    assert found["fits"]["512"]["settings"] == 27  # without the control, seeds averaged
    assert {row["rate"] for row in found["rates"]} == {2e-3}
    assert {row["tokens"][0] for row in found["crossings"]} == {"inf"}  # base never catches up


def test_costs_say_what_is_equal(protocol, results):
    runs = {run.variant: run for run in results.runs if run.size == "M"}
    base, flex = (costs.of_run(results.config(runs[name]), "none") for name in ("base", "flex-3"))
    counts = flops.parameters(results.config(runs["flex-3"]))
    assert (flex.total, flex.active, flex.memory) == (counts["total"], counts["active"], counts["memory"])
    assert flex.row_bytes == 2 * 2 * 64 and flex.weight_bytes == 2 * (counts["active"] + 512 * 64)
    shown = dict(zip(costs.COLUMNS, flex.shown(base)))
    assert shown["parameters, M"].endswith("\u00a0=") and not shown["active, M"].endswith("=")
    assert costs.equal(base, flex) == ["parameters"]


def test_a_comparison_without_runs_is_refused(protocol, tmp_path):
    with pytest.raises(UserError, match="expected finished runs of the protocol, found none"):
        comparison.draw(protocol, "configs/protocols/small.py", str(tmp_path))
    assert not os.listdir(tmp_path)
