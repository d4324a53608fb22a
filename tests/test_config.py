"""Sizes against the design's table, and what is refused by name."""

import dataclasses
import glob
import math
import subprocess
import sys

import jax
import pytest

from memoryllm_jax import config as config_lib
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import MeshConfig, default, resolve
from memoryllm_jax.model import flops, sharding, transformer

# DESIGN: size -> h, heads, base width, FFN-M widths at beta 1, 2, 3, millions in total, active at 0, 1, 2, 3, 8.
TABLE = {
    "250m": (960, 16, 2560, (2240, 1920, 1600), 265, (88, 111, 133, 155, 265)),
    "750m": (1600, 16, 4272, (3738, 3200, 2668), 738, (246, 307, 369, 430, 738)),
    "1b": (2048, 32, 5464, (4778, 4096, 3418), 1208, (403, 504, 604, 704, 1208)),
}
VARIANTS = ("memory", "flex-1", "flex-2", "flex-3", "base")


def load(size, variant):
    return config_lib.load(f"configs/{size}.py:{variant}")


@pytest.mark.parametrize("size", TABLE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts_follow_from_the_table(size, variant):
    h, heads, width, memory_widths, total_millions, active_millions = TABLE[size]
    config = load(size, variant)
    config.model.vocab_size = V = 128_256
    config = resolve(config)
    assert (config.model.dim, config.model.heads, config.model.ffn_dim) == (h, heads, width)
    assert (config.model.layers, config.seq_len) == (24, 2048)

    memory_width = {"memory": width, "base": 0}.get(variant) if variant in ("memory", "base") else None
    if memory_width is None:
        memory_width = memory_widths[int(variant[-1]) - 1]
    attention_and_norm = 4 * h * h + h
    compute = 3 * h * (width - memory_width) + (h if memory_width < width else 0)
    memory = 3 * h * memory_width + (h if memory_width else 0)
    expected_active = 24 * (attention_and_norm + compute) + h
    expected_total = expected_active + 24 * memory

    with jax.set_mesh(sharding.make_mesh(config.mesh, jax.devices()[:1])):
        boxed = jax.eval_shape(lambda: transformer.init(transformer.LanguageModel(config.model), jax.random.key(0)))
    sizes = {jax.tree_util.keystr(p): math.prod(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(boxed)}
    tables = [n for name, n in sizes.items() if "'embedding'" in name or "'head'" in name]
    assert tables == [V * h, V * h]
    total = sum(sizes.values()) - sum(tables)
    in_memory = sum(n for name, n in sizes.items() if name.startswith("['memory']"))
    assert (total, total - in_memory) == (expected_total, expected_active)
    counted = flops.parameters(config)
    assert counted["total"] == total + 2 * V * h and counted["active"] == expected_active
    # Against the table's own millions; it counts no norms.
    assert total / 1e6 == pytest.approx(total_millions, abs=1)
    assert (total - in_memory) / 1e6 == pytest.approx(active_millions[VARIANTS.index(variant)], abs=1.2)


@pytest.mark.parametrize("variant", ["value-3", "ple-3", "narrow-3"])
def test_baselines_have_the_active_parameters_of_flex(variant):
    config = resolve(config_lib.load(f"configs/1b.py:{variant}"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=1000))
    with jax.set_mesh(sharding.make_mesh(config.mesh, jax.devices()[:1])):
        boxed = jax.eval_shape(lambda: transformer.init(transformer.LanguageModel(config.model), jax.random.key(0)))
    counted = flops.parameters(config)
    assert counted["total"] == sum(x.size for x in jax.tree.leaves(boxed))
    assert config.model.architecture == variant
    flex = flops.parameters(resolve(config_lib.load("configs/1b.py:flex-3")))
    assert counted["active"] == pytest.approx(flex["active"], rel=1e-3)


def test_every_config_file_builds_every_variant():
    names = sorted(set(glob.glob("configs/*.py")) - {"configs/start.py"})  # which wants a model to start from
    assert len(names) >= 4
    for name in names:
        for variant in (*VARIANTS, "flex-1.5"):
            config = resolve(config_lib.load(f"{name}:{variant}"))
            assert config.model.architecture == variant
            assert config.model.memory_dim + config.model.compute_dim == config.model.ffn_dim


def test_width_follows_an_overridden_dim():
    config = load("1b", "flex-3")
    config.model.dim = 960
    assert config.model.ffn_dim == 2560
    assert resolve(config).model.memory_dim == 1600


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("model.heads", 7, "config.model.heads: expected a divisor of model.dim = 256, found 7"),
        ("model.heads", 256, "config.model.heads: expected an even head size"),
        ("model.beta", 9.0, "config.model.beta: expected a number from 0"),
        ("model.beta", 8.0, "config.model.compute_input: expected after_attention"),
        (
            "model.attention",
            "flash",
            "config.model.attention: expected one of auto, plain, blocked, cudnn, splash, found 'flash'",
        ),
        ("model.ffn_dim", 1, "config.model.ffn_dim: expected at least 2"),
        ("steps", 0, "config.steps: expected at least 1, found 0"),
        ("accumulate", 3, "config.batch_size: expected a multiple of accumulate = 3"),
        ("optimizer.final_lr", 1.0, "config.optimizer.final_lr: expected at most"),
        ("mesh.data", -1, "config.mesh.fsdp: expected -1 on one axis only"),
    ],
)
def test_impossible_values_are_refused_by_name(field, value, message):
    config = load("tiny", "flex-3")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        resolve(config)
    assert str(error.value).startswith(message)


def test_unknown_fields_and_wrong_types_are_refused_by_name():
    tree = load("tiny", "base").to_dict()
    for change, message in (
        ({"stepz": 1}, "config.stepz: no such field; did you mean steps?"),
        ({"steps": "many"}, "config.steps: expected int, found 'many'"),
        ({"model": 3}, "config.model: expected a group of fields, found 3"),
    ):
        with pytest.raises(UserError) as error:
            resolve({**tree, **change})
        assert str(error.value) == message
    with pytest.raises(UserError, match="architecture 'flex-8': expected base, memory, or flex-B"):
        default("flex-8")


def test_batches_and_meshes_that_do_not_fit_are_refused():
    config = resolve(load("tiny", "flex-3"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=4096))

    def check(mesh, **changes):
        changed = dataclasses.replace(config, **changes)
        sharding.check_mesh(changed, sharding.make_mesh(MeshConfig(*mesh)))

    check((2, 2, 2))
    with pytest.raises(UserError, match=r"config.batch_size: expected a multiple of .* = 8, found 12"):
        check((1, 8, 1), batch_size=12)
    grouped = dataclasses.replace(config.model, heads=8, kv_heads=2)
    check((2, 2, 2), model=grouped)
    with pytest.raises(
        UserError, match=r"config.model.kv_heads: expected a multiple of config.mesh.tensor = 4,.*found 2"
    ):
        check((1, 2, 4), model=grouped)
    with pytest.raises(UserError, match=r"config.mesh: expected parts whose product is the 8 devices, found data 3"):
        check((3, -1, 1))


def test_an_axis_claimed_twice_is_an_error():
    with pytest.raises(ValueError, match="claim a mesh axis twice"):
        sharding.spec("vocab", "mlp")
    with pytest.raises(ValueError, match="no mesh is set"):
        jax.jit(lambda x: sharding.constrain(x, "batch"))(jax.numpy.ones(8))


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.model.dimm=3", "error: config.model.dimm: no such field; did you mean dim?"),
        ("--config.steps=many", "flag --config.steps=many"),
        ("--config.steps.more=1", "error: config.steps.more: no such field"),
        ("--config=configs/tiny.py:flex-9", "error: architecture 'flex-9': expected base, memory, or flex-B"),
        ("--config.model.heads=3", "error: config.model.heads: expected a divisor of model.dim = 256, found 3"),
    ],
)
def test_command_line_mistakes_are_one_sentence(argument, message, tmp_path):
    command = [sys.executable, "-m", "memoryllm_jax.train", "--config=configs/tiny.py:base", argument]
    result = subprocess.run([*command, f"--workdir={tmp_path}/w"], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "w").exists()
