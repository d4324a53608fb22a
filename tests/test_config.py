"""Sizes compared with the paper's tables, values that are refused, and config files installed with the package."""

import dataclasses
import glob
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from lab import run_lines

from memoryllm_jax.common import config_files
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import default, from_saved, resolve
from memoryllm_jax.model import flops, sharding, transformer

ROOT = Path(__file__).parents[1]
VARIANTS = ("memory", "flex-1", "flex-2", "flex-3", "base")
# The paper's Tables 5 and 6: {size: (h, heads, FFN-M widths, total parameters, active parameters)}. Widths and active
# parameters are those of VARIANTS, in their order; parameters are in millions.
TABLE = {
    "250m": (960, 16, (2560, 2240, 1920, 1600, 0), 265, (88, 111, 133, 155, 265)),
    "750m": (1600, 16, (4272, 3738, 3200, 2668, 0), 738, (246, 307, 369, 430, 738)),
    "1b": (2048, 32, (5464, 4778, 4096, 3418, 0), 1208, (403, 504, 604, 704, 1208)),
}


def load(size, variant):
    return config_files.load(f"configs/{size}.py:{variant}")


@pytest.mark.parametrize("size", TABLE)
def test_parameter_counts_are_those_of_the_paper(size):
    h, heads, memory_widths, total_millions, active_millions = TABLE[size]
    base_width = memory_widths[0]
    for variant, memory_width, active in zip(VARIANTS, memory_widths, active_millions):
        config = load(size, variant)
        config.model.vocab_size = V = 128_256
        config = resolve(config)
        m = config.model
        assert (m.dim, m.heads, m.ffn_dim, m.layers, config.seq_len) == (h, heads, base_width, 24, 2048)
        assert (m.memory_dim, m.compute_dim) == (memory_width, base_width - memory_width)

        attention_and_norm = 4 * h * h + h
        ffn_c = 3 * h * m.compute_dim + (h if m.compute_dim else 0)
        ffn_m = 3 * h * m.memory_dim + (h if m.memory_dim else 0)
        counted = flops.parameters(config)
        assert counted["active"] == 24 * (attention_and_norm + ffn_c) + h
        assert counted["total"] == counted["active"] + 24 * ffn_m + 2 * V * h
        # The paper's own millions count no norms.
        assert counted["active"] / 1e6 == pytest.approx(active, abs=1.2)
        assert (counted["total"] - 2 * V * h) / 1e6 == pytest.approx(total_millions, abs=1)


BASELINES = ("rows-3", "rows-8", "value-3", "value-0", "bov-3", "bigram-3", "ple-3", "no-memory-3", "no-memory-8")


@pytest.mark.parametrize("variant", [*VARIANTS, *BASELINES])
def test_counted_parameters_are_those_of_the_model(variant):
    config = resolve(load("1b", variant))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=1000))
    assert config.model.architecture == variant
    with jax.set_mesh(sharding.make_mesh(config.mesh, jax.devices()[:1])):
        boxed = jax.eval_shape(lambda: transformer.init(transformer.LanguageModel(config.model), jax.random.key(0)))
    sizes = {jax.tree_util.keystr(path): x.size for path, x in jax.tree_util.tree_leaves_with_path(boxed)}
    counted = flops.parameters(config)
    assert counted["total"] == sum(sizes.values())
    assert counted["memory"] == sum(size for name, size in sizes.items() if name.startswith("['memory']"))
    if variant.endswith("-3"):  # the baselines are as large as flex-3, up to rounded widths
        flex = flops.parameters(resolve(load("1b", "flex-3")))
        assert counted["active"] == pytest.approx(flex["active"], rel=1e-3)


def test_every_config_file_builds_every_variant():
    names = sorted(set(glob.glob("configs/*.py")) - {"configs/start.py"})  # start.py needs a trained model
    assert len(names) >= 4
    for name in names:
        for variant in (*VARIANTS, "flex-1.5"):
            config = resolve(config_files.load(f"{name}:{variant}"))
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
        ("eval.tasks_limit", 7, "config.eval.tasks_limit: expected its default, 0, as eval.tasks is '', found 7"),
        (
            "optimizer.muon_lr",
            0.05,
            "config.optimizer.muon_lr: expected its default, 0.02, as optimizer.name is 'adamw', found 0.05",
        ),
        ("model.heads", 256, "config.model.heads: expected an even head size"),
        ("model.beta", 9.0, "config.model.beta: expected at least 0 and at most 8, found 9.0"),
        ("model.beta", 8.0, "config.model.compute_input: expected after_attention"),
        (
            "model.attention",
            "flash",
            "config.model.attention: expected one of auto, plain, blocked, cudnn, splash, found 'flash'",
        ),
        ("model.ffn_dim", 1, "config.model.ffn_dim: expected at least 2"),
        ("steps", 0, "config.steps: expected at least 1, found 0"),
        ("optimizer.b1", 1.0, "config.optimizer.b1: expected at least 0 and less than 1, found 1.0"),
        ("optimizer.eps", 0.0, "config.optimizer.eps: expected more than 0, found 0.0"),
        (
            "optimizer.spike_deviations",
            6.0,
            "config.optimizer.spike_deviations: expected its default, 0.0, as optimizer.max_skipped is 0, found 6.0",
        ),
        ("sample.temperature", 1e-9, "config.sample.temperature: expected 0 (greedy), or from 0.001 to 1000"),
        ("accumulate", 3, "config.batch_size: expected a multiple of accumulate = 3"),
        ("optimizer.final_lr", 1.0, "config.optimizer.final_lr: expected at most"),
        ("mesh.data", -1, "config.mesh.fsdp: expected -1 on one axis only"),
    ],
)
def test_impossible_and_unused_values_are_refused_by_name(field, value, message):
    config = load("tiny", "flex-3")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        resolve(config)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "architecture, fields, message",
    [
        (
            "base",
            {"optimizer.train": "memory"},
            "config.optimizer.train: expected all, as base has no token memory, found 'memory'",
        ),
        (
            "value-3",
            {"optimizer.train": "memory", "optimizer.name": "muon"},
            "config.optimizer.name: expected adamw, as the token memory of value-3, which alone is trained, has no",
        ),
        ("rows-3", {"start.memory": "zero"}, "config.start.memory: expected copy, new or distill for rows-3, as rows"),
    ],
)
def test_what_does_not_fit_the_token_memory_is_refused_by_name(architecture, fields, message):
    config = load("tiny", architecture)
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError) as error:
        resolve(config)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"steps": 39},
            "config.optimizer.warmup_steps: expected at most the 39 steps of the run, found 40; set it to 1,",
        ),
        (
            {"optimizer.schedule": "wsd", "optimizer.decay_share": 0.92},
            "config.optimizer.decay_share: expected a decay that begins after the 40 steps of warm-up, found 0.92",
        ),
        (
            {"start.workdir": "base", "start.memory": "distill", "start.distill_tokens": 1e6},
            "config.start.distill_tokens: expected at most the 983,040 tokens of the run, found 1,000,000",
        ),
        ({"tokens": 1e6, "tokens_per_parameter": 2.0}, "config.tokens_per_parameter: expected one length of the run"),
    ],
)
def test_what_the_steps_cannot_hold_is_refused_by_name(fields, message):
    config = load("tiny", "flex-3")
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError) as error:
        resolve(config)
    assert str(error.value).startswith(message)
    if "tokens" not in fields:  # earlier versions trained so, and what they saved still opens
        from_saved(config.to_dict())


def test_one_number_sets_sizes_and_recipe():
    """GPT-3 Small at depth 12 (its Table 2.1), and the tokens of Hoffmann et al. (2022)."""
    c = load("depth", "base@12")
    config = resolve(c)
    m, o = config.model, config.optimizer
    assert (m.layers, m.dim, m.heads, config.batch_size * config.seq_len) == (12, 768, 12, 2**19)
    assert (o.peak_lr, o.warmup_steps, config.steps) == (6e-4, config.steps // 20, 3240)
    c.batch_size = 64  # steps and warm-up follow
    config = resolve(c)
    assert config.steps == math.ceil(20 * m.matrix_parameters / (64 * 2048)) == 12_960
    assert config.optimizer.warmup_steps == 648
    config = resolve(load("depth", "base@24"))
    assert (config.model.dim, config.batch_size, config.optimizer.peak_lr) == (1536, 512, 3e-4)
    c.batch_size = 0
    with pytest.raises(UserError, match="config: expected values from which other fields can be computed, found"):
        resolve(c)
    for depth in ("0", "1.5", "deep"):
        with pytest.raises(UserError, match=f"a depth from 1 to 100, found base@{depth}"):
            load("depth", f"base@{depth}")


def test_tokens_set_the_steps():
    config = load("tiny", "flex-3")  # 2,048 tokens a step
    config.tokens = 2048 * 50.5
    resolved = resolve(config)
    assert resolved.steps == 51
    assert resolve(dataclasses.asdict(resolved)) == resolved
    config.tokens = 0
    for architecture in ("base", "memory", "flex-3", "ple-3"):
        config = load("tiny", architecture)
        config.tokens_per_parameter = 2.0
        config.model.vocab_size = 1000
        base = load("tiny", "base")
        counted = flops.parameters(resolve(base))
        matrices = counted["attention"] + counted["ffn_c"]
        assert resolve(config).steps == math.ceil(2 * matrices / 2048)
    # One on the command line goes before those of the config file; two are refused.
    assert resolve(config, ["steps"]).steps == 480
    assert resolve(config, ["steps"]).tokens_per_parameter == 0
    with pytest.raises(UserError, match=r"config\.tokens: expected one length of the run, found config\.steps beside"):
        resolve(config, ["tokens", "steps"])


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
    with pytest.raises(UserError, match=r"config: expected the architecture base, memory or flex-B .* found 'flex-8'"):
        default("flex-8")


def test_command_line_mistakes_are_one_sentence(tmp_path):
    messages = {
        "--config.steps=many": "flag --config.steps=many",
        "--config=configs/tyni.py": "error: --config: expected FILE.py:ARCHITECTURE, found no file configs/tyni.py",
        "--config.model.heads=3": "error: config.model.heads: expected a divisor of model.dim = 256, found 3",
        "--chip=h100": "error: --chip: expected only with --dry_run, found without it",
        "--workdir=": "error: --workdir: expected a folder for checkpoints and metrics, found none",
    }
    lines = [("--config=configs/tiny.py:base", f"--workdir={tmp_path}/w", argument) for argument in messages]
    for message, (code, _, err) in zip(messages.values(), run_lines("memoryllm_jax.train", *lines), strict=True):
        assert code == 1 and message in err and "Traceback" not in err, err
        if message.startswith("error: "):
            assert err.startswith(message) and err.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_the_package_lists_its_commands():
    command = "import runpy, sys; sys.argv[1:] = sys.argv[2:]; runpy.run_module('memoryllm_jax', run_name='__main__')"
    watch = f"import atexit, sys; atexit.register(lambda: print('jax imported:', 'jax' in sys.modules)); {command}"
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True)
    assert done.returncode == 0 and "jax imported: False" in done.stdout
    listed = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    files = {p.stem for p in (ROOT / "memoryllm_jax").glob("*.py")} - {"__init__", "__main__"}
    assert set(listed) == files | {"tol"}
    assert listed["train"] == "  train       Trains base, MemoryLLM or Flex-MemoryLLM from one config."

    done = subprocess.run([sys.executable, "-m", "memoryllm_jax", "trian"], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: expected no argument, found 'trian'; a command is run as python -m ")
