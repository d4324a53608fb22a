"""The formulas of traffic against compiled steps: of XLA for CPUs, and of the TPU and GPU compilers where installed."""

import collections

import hlo
import jax
import pytest

from memoryllm_jax.config import Config, default, resolve
from memoryllm_jax.model import sharding
from memoryllm_jax.training import chips, collectives, plan

TOLERANCE = 0.02  # for what the formulas leave out: norms of gradients, sums of losses, ids looked up again

_SUMMED_ONCE = {("gradients of the layers", ("data",)), ("norms' gradients", ("data", "fsdp"))}


def small(architecture: str, **overrides) -> Config:
    c = default(architecture)
    c.batch_size, c.seq_len = 16, 64
    c.model.dim, c.model.layers, c.model.heads, c.model.vocab_size = 64, 3, 4, 512
    c.model.loss_chunk = 64
    c.update_from_flattened_dict(overrides)
    return resolve(c)


def expected_bytes(config: Config, transfers: list[collectives.Transfer], shape: dict[str, int], platform: str) -> dict:
    """The formulas' operand bytes by kind and mesh axes of a group, with what each compiler does otherwise."""
    expected = collections.Counter()
    for t in transfers:
        kind = t.kind.replace("reduce-scatter", "all-reduce")
        size = t.operand_bytes
        if platform == "cpu" and t.what == "activations, backward":
            size *= 5 / 2  # sums q, k, v, gate and up apart, where the formula has attention's and the FFN's inputs
        if platform == "cpu" and t.what == "rows of the token memory, backward":
            size *= 2  # sums gate and up apart
        if platform == "cpu" and (t.what, t.axes) in _SUMMED_ONCE:
            size *= config.accumulate / collectives.data_sums(config)  # sums for each micro-batch
        if platform != "cuda" and t.what == "output head":
            size /= config.accumulate  # gathers the head once a step
        expected[kind, tuple(axis for axis in t.axes if shape[axis] > 1)] += size
    return dict(expected)


def check(config: Config, devices, platform: str) -> None:
    """Compares formulas and compiled step by kind of collective and the mesh axes of its groups."""
    mesh = sharding.make_mesh(config.mesh, devices)
    compiled = plan.LoweredStep(config, mesh).compile()
    found = hlo.operand_bytes(compiled.executable.as_text(), mesh.shape)
    expected = expected_bytes(config, compiled.transfers, dict(mesh.shape), platform)
    total = sum(expected.values())
    for key in found.keys() | expected.keys():
        assert found.get(key, 0) == pytest.approx(expected.get(key, 0), rel=TOLERANCE, abs=0.002 * total), key


@pytest.mark.parametrize(
    "architecture, overrides",
    [
        (
            "flex-3",
            {"mesh.data": 2, "mesh.fsdp": 4, "accumulate": 2, "optimizer.train": "memory"},
        ),
        (
            "flex-3",
            {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "model.qk_norm": True, "optimizer.name": "muon"}
            | {"model.rows": "permuted"},
        ),
        ("bov-3", {"mesh.data": 2, "mesh.fsdp": 4, "model.layers": 6}),
    ],
)
def test_formulas_are_what_xla_for_cpus_compiles(architecture, overrides):
    """Norms by layer send next to nothing. Frozen parameters have no gradients to send."""
    # In float32, because XLA for CPUs sums bfloat16 in float32 too.
    config = small(architecture, **overrides, **{"model.dtype": "float32", "log.norms_every": 1})
    check(config, jax.devices(), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5p", "h100"])
@pytest.mark.parametrize(
    "architecture, overrides",
    [
        ("flex-3", {"mesh.data": 2, "mesh.fsdp": 4, "accumulate": 2}),
        ("flex-3", {"mesh.data": 2, "mesh.fsdp": 4, "accumulate": 2, "model.reduce_dtype": "float32"}),
        ("flex-3", {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "model.qk_norm": True, "optimizer.name": "muon"}),
    ],
)
def test_formulas_are_what_the_chips_compilers_compile(chip_devices, name, architecture, overrides):
    # Batches of two chunks of logits: of one, XLA unrolls the loop and gathers the head twice.
    check(small(architecture, batch_size=32, **overrides), chip_devices(name, 8), chips.get(name).platform)


def test_bytes_sent_are_those_of_rings():
    sent = {"all-gather": 300, "all-reduce": 150, "reduce-scatter": 75, "all-to-all": 75}
    for kind, bytes_sent in sent.items():
        assert collectives.Transfer("x", kind, ("fsdp",), 100.0).sent_bytes(group=4) == bytes_sent
