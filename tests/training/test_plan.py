"""Plans: memory and traffic of a step, and what to change if it does not fit."""

import dataclasses
import functools
import json
import math
import re
import subprocess
import sys

import jax
import pytest
from lab import with_devices

from memoryllm_jax.common import config_files
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import MeshConfig, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import sharding
from memoryllm_jax.training import chips, collectives, muon, plan, plan_text, roofline
from memoryllm_jax.training.batches import TrainBatches
from memoryllm_jax.training.collectives import Transfer
from memoryllm_jax.training.step import Trainer


@pytest.mark.slow
def test_plan_places_state_and_activations_on_8_and_64_devices(tmp_path):
    small = {"model.dim": 128, "model.layers": 2, "model.heads": 8, "model.vocab_size": 1000, "seq_len": 64}
    small |= {"mesh.data": 2, "mesh.tensor": 2, "mesh.fsdp": -1, "model.dtype": "float32"}
    config = config_files.load("configs/tiny.py:flex-3")
    config.update_from_flattened_dict(small | {"batch_size": 8})
    plans = {8: plan.plan(resolve(config), "h100", jax.devices())}

    # In a process of its own, as the tests' process has eight devices.
    command = [sys.executable, "-m", "memoryllm_jax.train", "--config=configs/tiny.py:flex-3", "--dry_run"]
    command += [f"--config.{name}={value}" for name, value in small.items()]
    command += ["--config.batch_size=64", "--devices=64", "--chip=h100", f"--plan={tmp_path}/64.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=with_devices(1))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("flex-3 on 64 x H100 80GB SXM (data 2, fsdp 16, tensor 2)")
    with open(tmp_path / "64.json") as file:
        plans[64] = json.load(file)

    D, L, V = 128, 2, 1000
    C, M = 128, 216  # FFN-C and FFN-M of width 344
    for n, p in plans.items():
        assert p["mesh"] == {"data": 2, "fsdp": n // 4, "tensor": 2}
        matrices = L * (4 * D * D + 3 * D * (C + M)) + 2 * V * D
        norms = L * 3 * D + D
        stored = matrices + L * 3 * D * 8 + 2 * 8 * D  # FFN-M and the ids in multiples of 8 on each of two devices
        held = 4 * (stored // (n // 4) // 2 + norms)
        assert p["memory"]["parameters"] == held  # by the shardings of the executable's outputs
        assert p["memory"]["optimizer"] == 2 * held + 8  # two moments, and two counts of 4 bytes
        assert p["parameters"]["total"] == matrices + norms
    # Both have two sequences a shard: activations do not grow, and traffic grows only by (g - 1) / g.
    few, many = plans.values()
    assert many["memory"]["activations"] < 1.2 * few["memory"]["activations"]
    assert few["collective_bytes"] < many["collective_bytes"] < 1.9 * few["collective_bytes"]


def test_plan_says_what_the_run_does_besides_training_and_refuses_tasks_that_it_would_refuse(make_config, monkeypatch):
    monkeypatch.setattr(plan.chips, "emulate", lambda count: None)
    monkeypatch.setattr(plan.chips, "devices", lambda *_: (jax.devices()[:1], "a compiler"))
    chosen = {"optimizer.max_skipped": 3, "log.norms_every": 10, "sample.tokens": 20, "eval.tasks": "some"}
    config = make_config("memory", **chosen, **{"eval.tasks_every": 2})
    assert plan._besides(config, sharding.make_mesh(config.mesh, jax.devices()[:1]), 60) == [
        "skips at most 3 steps whose loss or gradient norm is not finite",
        "norms by layer every 10 steps; all steps compute them",
        "a sample of 20 tokens after the last step",
        "tasks some, all examples of each, every 2 steps and after the last",
    ]
    with pytest.raises(UserError, match=r"^config.eval.tasks: expected none"):
        plan.dry_run(config, "h100", 1, 0, "")


def test_plan_says_what_to_change(make_config, data_path, swapped, monkeypatch):
    """It also shows the sources of the data, without a plan of their own."""
    # All plans compile the same steps.
    monkeypatch.setattr(plan.LoweredStep, "compile", functools.cache(plan.LoweredStep.compile))
    monkeypatch.setattr(plan, "LoweredStep", functools.cache(plan.LoweredStep))
    big = {"model.vocab_size": 1000, "model.layers": 1, "batch_size": 64, "mesh.data": 2, "data.path": "embedded"}

    def planned(memory, **more):
        monkeypatch.setitem(chips.CHIPS, "h100", dataclasses.replace(chips.get("h100"), memory=memory))
        return plan.plan(make_config("memory", **big, **more), "h100", jax.devices()[:4])

    p = planned(1e9)
    assert p["fits"] and p["memory"]["largest_sequences_a_device"] > 16 and "DOES NOT FIT" not in plan_text.text(p)
    room = p["memory"]["fixed"] + 10 * p["memory"]["each_sequence"]
    p = planned(room)
    assert not p["fits"] and p["memory"]["largest_sequences_a_device"] == 10 and "DOES NOT FIT" in plan_text.text(p)
    assert p["sources"] == [] and "\ndata " not in plan_text.text(p)
    mixture = make_config("memory", **{"data.path": f"{data_path}:3,{swapped}:1", "data.epochs": 9})
    text = plan_text.text(p | plan._data_use(mixture, 1))
    assert re.search(r"\ndata +75% prepared: 0.\d\d epochs of .*\n +25% small: \d.\d\d epochs of .* sequences\n", text)
    accumulate, size = re.match(r"--config.accumulate=(\d+): ([\d.]+) GB a device", p["advice"][0]).groups()
    assert accumulate in ("2", "4", "8", "16") and float(size) <= room / 1e9 + 0.005


def test_micro_batches_recompute_the_token_memory(make_config):
    m = make_config("flex-3", **{"model.vocab_size": 512}).model
    recomputed = [roofline._recomputed(make_config("flex-3", accumulate=n), tokens=256, rows=100) for n in (1, 2)]
    assert recomputed == [0, 100 * m.layers * 6 * m.dim * m.memory_dim]  # three products of h x W


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_pairs_between_documents_take_time_where_the_kernel_computes_them(make_config, remat):
    def flops_a_token(backend, share):
        config = make_config("base", **{"model.attention": backend, "model.remat": remat, "model.vocab_size": 512})
        found = roofline.flops_a_token(config, 0, share)
        return found["per_token"], sum(
            found[part] for part in ("per_token", "recomputed_per_token", "masked_per_token")
        )

    (whole, computed), (inside, skipping) = flops_a_token("cudnn", 1), flops_a_token("blocked", 0.25)
    assert flops_a_token("cudnn", 0.25) == pytest.approx((inside, computed))
    c = make_config("base")
    assert whole - inside == 3 * c.model.layers * 2 * c.model.dim * c.seq_len * 0.75
    assert computed - skipping == pytest.approx((whole - inside) * (4 / 3 if remat == "full" else 1))


def test_memory_is_planned_for_the_most_distinct_ids_and_work_for_the_usual_number(make_config):
    config = make_config("memory", steps=1000, batch_size=64, **{"model.vocab_size": 5000, "data.epochs": 9})
    planned = TrainBatches(config, Dataset(config.data.path), 2, [0]).sizes()  # those of the run, counted in its data
    usual, _, largest = planned.planned
    step = plan.LoweredStep(config, sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2]))
    assert step._usual == usual and step._lowered.in_avals[0][1].ids_SU.shape == (2, largest)
    # English text: as many tokens a shard, but the largest of more shards. 16 sequences of 2,048 tokens a shard at 1b.
    c = config_files.load("configs/1b.py:flex-3")
    c.update_from_flattened_dict({"model.vocab_size": 128_256, "batch_size": 16 * 512})
    many = resolve(c)
    few = dataclasses.replace(many, batch_size=16 * 8)
    sizes = plan.distinct_ids(few, 8).planned, plan.distinct_ids(many, 512).planned
    assert all(a < b for a, b in zip(*sizes, strict=True)) and sizes[1][-1] < 1.6 * 0.20 * 16 * 2048


def test_a_tpu_compiler_that_finds_no_room_is_a_sentence(make_config, monkeypatch):
    def refuse(self, options):
        found = "memory required for HLO temporaries (904.00G) exceeds available HBM (15.75G)"
        raise jax.errors.JaxRuntimeError(
            f"RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: the total {found}. HLO module: x"
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.setitem(chips.CHIPS, "v5e", dataclasses.replace(chips.get("v5e"), memory=1e5))
    config = make_config("memory", **{"model.vocab_size": 1000, "data.path": "embedded"})
    with pytest.raises(
        UserError, match=r"^the step does not fit: memory required .*\(15.75G\); more devices: .* alone"
    ):
        plan.plan(config, "v5e", jax.devices()[:1])


def test_groups_that_span_nodes_share_the_network():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4), jax.devices())
    chip = chips.get("h100")
    transfers = [
        Transfer("weights", "all-gather", ("fsdp",), 1e6),
        Transfer("gradients", "all-reduce", ("data",), 1e6),
        Transfer("norms", "all-reduce", ("data", "fsdp"), 1e6),
        Transfer("rows", "all-to-all", ("data", "fsdp"), 1e6),
    ]
    found = {part["what"]: part for part in roofline.traffic(transfers, mesh, chip, domain=4)}
    # {what: (devices, links or network, bytes sent, bytes sent to other nodes)}
    assert {what: (p["group"], p["over"], p["bytes"], p["bytes_between"]) for what, p in found.items()} == {
        "weights": (4, "links", 3e6, 0),
        "gradients": (2, "network", 1e6, 1e6),  # one device in each node
        "norms": (8, "network", 1.75e6, 1.75e6 / 4),  # four in each node, which share what the node sends
        "rows": (8, "network", 0.875e6, 0.5e6),  # half of the receivers are in the other node
    }
    assert found["weights"]["seconds"] == pytest.approx({"least": 3e6 / 450e9, "most": 3e6 / 450e9})
    assert found["gradients"]["seconds"] == pytest.approx({"least": 1e6 / 50e9, "most": 1e6 / 50e9})
    assert found["norms"]["seconds"] == pytest.approx({"least": 1.75e6 / 4 / 50e9, "most": 1.75e6 / 50e9})
    # All eight in one node
    assert {part["over"] for part in roofline.traffic(transfers, mesh, chip, domain=8)} == {"links"}


def hand_calculation(N: int, U: int, rows: int) -> dict:
    """docs/plan.md, "By hand": 1b:flex-3 on N H100, fsdp over all of them, with 8 sequences on each.

    Args:
      U: rows that each batch shard looks up.
      rows: rows of token memory that all shards evaluate in a usual step.
    """
    L, D, V, T = 24, 2048, 128_256, 2048
    C, M = 2046, 3418  # widths of FFN-C and FFN-M, stored as 2048 and 3424
    layers, memory, table = L * (4 * D**2 + 3 * D * 2048), L * 3 * D * 3424, V * D
    norms = L * 3 * D + D
    stored = 4 * ((layers + memory + 2 * table) // N + norms)
    share = (N - 1) / N
    sent = {
        ("weights of the layers", "all-gather"): 2 * 2 * layers * share,
        ("weights of the token memory", "all-gather"): 2 * 2 * memory * share,
        ("gradients of the layers", "reduce-scatter"): 2 * layers * share,
        ("gradients of the token memory", "reduce-scatter"): 2 * memory * share,
        ("output head", "all-gather"): 2 * table * share,
        ("gradient of the output head", "reduce-scatter"): 4 * table * share,
        ("ids of the embeddings", "all-gather"): 4 * U * (N - 1),
        ("rows of the embeddings", "all-to-all"): 2 * 2 * U * D * share,
        ("norms' gradients", "all-reduce"): 2 * 4 * norms * share,
    }
    exchanged = sent["rows of the embeddings", "all-to-all"]
    rings = sum(sent.values()) - exchanged
    least = most = (rings + exchanged) / 450e9  # NVLink
    if N > 8:  # eight GPUs and network adapters in a node: 8 of an all-to-all's N receivers are there
        least = rings / 8 / 50e9 + exchanged * (N - 8) / (N - 1) / 50e9
        most = (rings + exchanged) / 50e9
    tokens = 8 * N * T
    flops = 3 * (tokens * (L * (8 * D**2 + 2 * D * T + 6 * D * C) + 2 * D * V) + rows * L * 6 * D * M)
    compute, optimizer = flops / (N * 989e12 * 0.5), 7 * stored / 3.35e12
    return {
        "parameters": L * (4 * D**2 + 3 * D * (C + M)) + 2 * table + norms,
        "stored": stored,
        "moments": 2 * stored + 8,  # and two counts of 4 bytes
        "sent": sent,
        "step": {"least": max(compute, least) + optimizer, "most": compute + most + optimizer},
    }


@pytest.mark.parametrize("N", [8, 64])
def test_the_committed_plans_of_1b_flex_3_are_those_by_hand(N):
    with open(f"benchmarks/results/plan_1b_flex-3_h100_{N}.json") as file:
        p = json.load(file)
    (ids,) = (part["bytes"] for part in p["collectives"] if part["what"] == "ids of the embeddings")
    by_hand = hand_calculation(N, int(ids / 4 / (N - 1)), p["rows_a_step"])
    assert p["parameters"]["total"] == by_hand["parameters"] == 1_733_838_848
    assert p["memory"]["parameters"] == p["memory"]["gradients"] == by_hand["stored"]
    assert p["memory"]["optimizer"] == by_hand["moments"]
    assert {(part["what"], part["kind"]): part["bytes"] for part in p["collectives"]} == by_hand["sent"]
    assert p["seconds"]["step"] == pytest.approx(by_hand["step"], rel=1e-12)
    steps = p["run_tokens"] / p["tokens_a_step"]
    hours = {bound: steps * seconds * N / 3600 for bound, seconds in by_hand["step"].items()}
    assert p["run_device_hours"] == pytest.approx(hours)


def test_this_code_plans_1b_flex_3_as_by_hand():
    config = config_files.load("configs/1b.py:flex-3")
    config.update_from_flattened_dict({"batch_size": 64, "model.vocab_size": 128_256})
    config = resolve(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    sizes = plan.distinct_ids(config, 8).planned
    by_hand = hand_calculation(8, sizes[-1], 8 * sizes[0])
    params = Trainer(config, mesh).params_shape
    transfers = collectives.transfers(config, params, mesh.shape, sizes[-1])
    assert {(t.what, t.kind): t.sent_bytes(8) for t in transfers} == by_hand["sent"]
    stored = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params))
    assert stored == by_hand["stored"]
    chip = chips.get("h100")
    traffic = roofline.traffic(transfers, mesh, chip, chip.domain)
    flops_a_token = roofline.flops_a_token(config, 8 * sizes[0])
    times = roofline.times(8, chip, 64 * 2048, flops_a_token, traffic, stored, muon.Work())
    assert times["step"] == pytest.approx(by_hand["step"], rel=1e-12)
