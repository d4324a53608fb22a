"""Eight emulated CPU devices, one prepared data set of real text, and a small config that trains on it."""

import importlib.metadata
import os
import tempfile

# The workers, and the commands that tests start, share one cache of compiled functions.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["TESTS_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(
        prefix="memoryllm_jax_tests_"
    )
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":  # else an accelerator is tested, with its own compiler
    # Compile time is most of the tests' time. LLVM's optimisations would make it 1.5 times as long, and the newer
    # fusion emitters twice as long. Compiling in several threads would take 1.25 times the CPU time, and the workers
    # already fill all cores.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones always use them
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true"

import faulthandler
import gc
import hashlib
import itertools
import json
import shutil
import sys
import types

import jax
import numpy as np
import pytest
import shared_trainers as trainers
from jax._src.cudnn import fused_attention_stablehlo
from lab import Lab, made_once, shared_folder

from memoryllm_jax.config import default, resolve
from memoryllm_jax.data import documents, shards
from memoryllm_jax.training import chips, loop

# JAX traces with many small objects, in a process where as many live on. By Python's default thresholds, to look for
# garbage took 16% of the CPU time of tests/inference/test_slots.py and test_decoder.py; with these 8%.
gc.set_threshold(50_000, 10, 10)
gc.freeze()  # what the imports have made stays anyway

# A worker that never ends would keep pytest waiting without a word: it shows the stacks of its threads, and exits.
_MOST_SECONDS_TO_END = 120


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One worker more than cores: tests of launchers and of commands wait for other processes."""
    return (yield) + 1


def pytest_collection_modifyitems(config, items):
    if "long" not in config.option.markexpr:
        items[:] = [item for item in items if "long" not in item.keywords]
    for item in items:
        if "chip_devices" in item.fixturenames:
            item.add_marker("chips")
    # The longest tests first: the last one of a session would keep one worker busy while the other has nothing to do.
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_sessionfinish():
    # execnet interrupts a worker that takes more than 5 seconds to end after its last test. In that time pytest
    # collects garbage twice, and Python again at its exit: seconds each on a busy machine. So garbage is collected
    # here, before the worker reports that it is done, and what is left is not searched again.
    faulthandler.dump_traceback_later(_MOST_SECONDS_TO_END, file=sys.__stderr__, exit=True)
    gc.collect()
    gc.freeze()
    faulthandler.cancel_dump_traceback_later()
    if "PYTEST_XDIST_WORKER" not in os.environ and "TESTS_CACHE" in os.environ:
        shutil.rmtree(os.environ["TESTS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A .jsonl file with 80 of Python's documentation topics, 400 kB."""
    path = shared_folder(tmp_path_factory) / "topics.jsonl"
    with made_once(path) as to_make:
        if to_make:
            texts = [text for text, _ in itertools.islice(documents.read("embedded"), 80)]
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="session")
def data_path(corpus, tmp_path_factory):
    """`corpus`, prepared with a SentencePiece model of 512 ids that was trained on it."""
    path = shared_folder(tmp_path_factory) / "prepared"
    with made_once(path) as to_make:
        if to_make:
            shards.prepare(corpus, "sentencepiece:train:512", str(path), validation_fraction=0.05)
    return str(path)


@pytest.fixture(scope="session")
def make_config(data_path):
    """A function: make_config("flex-3", **{"model.dim": 64}) returns the Config of a model that trains fast."""

    def make(architecture="flex-3", **overrides):
        c = default(architecture)
        c.steps, c.batch_size, c.seq_len = 4, 8, 32
        c.model.dim, c.model.layers, c.model.heads, c.model.loss_chunk = 32, 2, 4, 24
        c.model.dtype = "float32"
        c.data.path, c.data.epochs = data_path, 4
        c.optimizer.peak_lr, c.optimizer.warmup_steps = 1e-2, 1
        c.checkpoint.every = c.eval.every = 100
        c.eval.batches, c.log.every, c.log.tensorboard = 2, 1, False
        c.update_from_flattened_dict(overrides)
        return resolve(c)

    return make


@pytest.fixture
def shared_trainers(monkeypatch):
    """Runs in this process with the same step compile it once."""
    monkeypatch.setattr(loop, "Trainer", trainers.shared)


@pytest.fixture(scope="session")
def lab(data_path, corpus, tmp_path_factory):
    return Lab(data_path, corpus, shared_folder(tmp_path_factory))


@pytest.fixture
def copied(data_path, tmp_path):
    """A copy of the prepared data, which the test may damage."""
    path = tmp_path / "copy"
    path.mkdir()
    for name in os.listdir(data_path):
        (path / name).write_bytes(open(f"{data_path}/{name}", "rb").read())
    return path


@pytest.fixture
def with_cudnn(monkeypatch):
    """Pretends that cuDNN is installed: JAX asks for its version when it traces a call, even for another machine."""
    version = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)


@pytest.fixture
def chip_devices(monkeypatch, with_cudnn):
    """A function: chip_devices("h100", 8) returns devices to compile for, ahead of time and without such a chip.

    It skips the test where the chip's compiler is not installed.
    """

    def devices(name, count=1):
        chip = chips.get(name)
        if not chip.has_compiler():
            pytest.skip(f"needs the extra {chip.platform}")
        jax.devices()  # XLA for CPUs reads XLA_FLAGS now; libtpu would end the process for a flag that it does not know
        monkeypatch.delenv("XLA_FLAGS", raising=False)
        return chips.devices(name, count)[0]

    return devices


@pytest.fixture
def swapped(copied):
    """Prepared data with the texts of `data_path`: its splits are swapped, so that it is small, and its ids uint32."""
    tree = json.loads((copied / "dataset.json").read_text())
    tree["splits"] = {"train": tree["splits"]["validation"], "validation": tree["splits"]["train"]}
    tree["dtype"] = "uint32"
    for split in tree["splits"].values():
        for shard in split["shards"]:
            ids = np.fromfile(copied / shard["file"], "<u2").astype("<u4").tobytes()
            (copied / shard["file"]).write_bytes(ids)
            shard["sha256"] = hashlib.sha256(ids).hexdigest()
    (copied / "dataset.json").write_text(json.dumps(tree))
    return copied.rename(copied.parent / "small")
