"""The page of a comparison, on scores that were made up: a memory that helps, and controls that show what does not."""

import csv
import json
import os
import re

import numpy as np
import pytest
from lab import CONTEXT

from memoryllm_jax import compare
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import comparison, costs, heldout, laws, runner
from memoryllm_jax.experiments import protocol as protocol_lib
from memoryllm_jax.experiments.protocol import Experiment, Protocol, Sweep, Variant
from memoryllm_jax.experiments.results import Cell, Group, Results
from memoryllm_jax.model import flops

# What each variant gains in nats a token, and what more on targets in the second half of a window
GAINS = {"base": (0, 0), "flex-3": (0.3, 1.0), "control": (0.3, 1.0), "flex-1": (0, 0)}
SIZES = {"S": {"model.dim": 32}, "M": {"model.dim": 64}}


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
            # A useless control is as good as what it controls: what differs between the two is worth nothing.
            Variant("control", "flex-3", {"model.init_std": 0.03}, rate_of="flex-3"),
            Variant("flex-1"),
        ),
        sweep=Sweep(tokens={"512": 1e4}, rates=(1e-3, 2e-3, 4e-3), sizes={"S": "S", "M": "S"}),
        experiments=(Experiment("main", tuple(GAINS), ("S", "M"), ("512",), (1e4, 4e4, 1e5), (0, 1)),),
    )


@pytest.fixture(scope="module")
def workdir(protocol, lab, tmp_path_factory):
    """The folder of a finished comparison, without models: sweeps whose best rate is 2e-3, and scores of all runs."""
    workdir = tmp_path_factory.mktemp("comparison")
    os.makedirs(workdir / "data")
    os.symlink(lab.data_path, workdir / "data" / "512")
    for setting in map(protocol.swept, protocol.settings()):
        for rate in protocol.sweep.rates:
            folder = protocol.sweep_run(setting, rate).folder(workdir)
            os.makedirs(folder, exist_ok=True)
            with open(f"{folder}/result.json", "w") as file:
                json.dump({"validation": {"loss": 4 + abs(np.log(rate / 2e-3))}}, file)
    data = Dataset(lab.data_path)
    text = heldout.open_text(data, CONTEXT)
    is_late_N = text.position_N >= CONTEXT // 2
    for run in protocol.experiment_runs(runner.chosen_rates(protocol, workdir)):
        rng = np.random.default_rng([list(GAINS).index(run.variant), run.seed, run.tokens])
        everywhere, more = GAINS[run.variant]
        nats_N = 30 * run.tokens**-0.2 - everywhere - more * is_late_N + rng.normal(0, 0.01, len(text.targets))
        folder = run.folder(workdir)
        os.makedirs(folder, exist_ok=True)
        np.savez(f"{folder}/heldout.npz", nats=nats_N.astype("f"), digest=np.array(text.digest))
    return str(workdir)


@pytest.fixture(scope="module")
def results(protocol, workdir):
    return Results(protocol, runner.finished(protocol, workdir), workdir)


def test_a_useless_memory_shows_as_useless_and_a_useful_one_where_it_helps(protocol, results):
    (variants, controls), cell = results.families(), Cell("S", "512", 100_096)
    assert variants.variants == ("base", "flex-3", "flex-1") and controls.variants == ("flex-3", "control")
    assert cell in results.cells(variants)
    found, control = results.compare(variants, cell), results.compare(controls, cell)["control"]
    assert [compared.against for compared in found.values()] == ["", "base", "base"] and control.against == "flex-3"
    assert not found["flex-1"].difference.finds and not control.difference.finds
    text = results.texts["512"]
    late = Group("position", 5, "17-32")
    gain = 0.3 + 1.0 * text.tokens_of(late) / text.tokens  # nats a token
    expected = -gain * text.tokens / (text.bytes * np.log(2))
    assert found["flex-3"].difference.value == pytest.approx(expected, abs=1e-3) and found["flex-3"].difference.finds
    for label, expected in (("17-32", -1.3), ("9-16", -0.3)):
        (group,) = (group for group in text.groups(text.splits[2]) if group.label == label)
        of_group = results.compare(variants, cell, group)
        assert of_group["flex-3"].difference.value == pytest.approx(expected, abs=0.01)
        assert of_group["flex-3"].difference.finds and not of_group["flex-1"].difference.finds


def test_the_page_shows_what_the_record_holds(protocol, workdir, monkeypatch):
    fitted = laws.of_vocabulary
    monkeypatch.setattr(laws, "of_vocabulary", lambda *given: fitted(*given, replicates=3))
    monkeypatch.setattr(protocol_lib, "load", lambda path: protocol)
    compare.main("configs/protocols/small.py", workdir, report=True)
    page = open(f"{workdir}/comparison.html").read()
    content = open(f"{workdir}/comparison.json").read()
    record = json.loads(content)
    assert workdir not in page and workdir not in content
    assert record["facts"]["finished runs"].startswith("48 of 48")
    losses = record["results"]["variants"]["losses"]
    assert len(losses) == len(SIZES) * 3 * 3
    with open(f"{workdir}/comparison-variants-losses.csv") as file:
        shown = list(csv.DictReader(file))
    for row, cells in zip(losses, shown, strict=True):
        assert float(cells["bits per byte"]) == pytest.approx(row["mean"][0], abs=1e-4)
        assert cells["variant"] == row["variant"] and f"<td>{cells['bits per byte']}</td>" in page
        if row["difference"]:
            numbers = [float(x) for x in re.findall(r"[-+][\d.]+", cells["difference"])]
            assert numbers == pytest.approx(row["difference"], abs=1e-4)
            assert ("▼" in cells["difference"]) == (row["difference"][2] < 0)
    assert record["results"]["fits"]["512"]["runs"] == 36  # without the control
    assert {row["rate"] for row in record["results"]["rates"]} == {2e-3}
    assert page.count("<img") == 8


def test_costs_say_what_is_equal(protocol, results):
    runs = {run.variant: run for run in results.runs if run.size == "M"}
    base, flex = (costs.of_run(results.config(runs[name]), "none") for name in ("base", "flex-3"))
    counts = flops.parameters(results.config(runs["flex-3"]))
    assert (flex.total, flex.active, flex.memory) == (counts["total"], counts["active"], counts["memory"])
    assert flex.row_bytes == 2 * 2 * 64 and flex.weight_bytes == 2 * (counts["active"] + 512 * 64)
    shown = dict(zip(costs.COLUMNS, flex.shown(base)))
    assert shown["parameters, M"].endswith("\u00a0=") and not shown["active, M"].endswith("=")
    assert shown["training MFLOP a token"] == ""


def test_a_comparison_without_runs_is_refused(protocol, tmp_path):
    with pytest.raises(UserError, match="expected finished runs of the protocol, found none"):
        comparison.draw(protocol, "configs/protocols/small.py", str(tmp_path))
    assert not os.listdir(tmp_path)
