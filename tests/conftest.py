"""Eight emulated CPU devices, one prepared data set of real text, and a small config that trains on it."""

import os
import tempfile

os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="memoryllm_jax_tests_")  # tests' commands share it
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# LLVM's optimisations would make compiling half as long again.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import itertools
import json
import shutil
import socket

import pytest

from memoryllm_jax import config as config_lib
from memoryllm_jax import documents, prepare

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden_hf")


def with_devices(count: int) -> dict[str, str]:
    """The environment of a command with so many emulated devices that computes as the tests here do."""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={count}")}


def free_port() -> int:
    """Of this machine, for the processes of one run to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def pytest_sessionfinish():
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A .jsonl file of 400 kB of Python's documentation topics."""
    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    with open(path, "w") as file:
        for text, _ in itertools.islice(documents.read("embedded"), 80):
            file.write(json.dumps({"text": text}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def data_path(corpus, tmp_path_factory):
    """`corpus`, tokenised with a SentencePiece model of 512 ids trained on it."""
    path = str(tmp_path_factory.mktemp("data") / "prepared")
    prepare.prepare(corpus, "sentencepiece:train:512", path, validation_fraction=0.05)
    return path


@pytest.fixture
def make_config(data_path):
    """make_config("flex-3", **{"model.dim": 64}) -> Config of a model small enough for any test."""

    def make(architecture="flex-3", **overrides):
        c = config_lib.default(architecture)
        c.steps, c.batch_size, c.seq_len = 4, 8, 32
        c.model.dim, c.model.layers, c.model.heads, c.model.loss_chunk = 32, 2, 4, 24
        c.model.dtype = "float32"
        c.data.path, c.data.epochs = data_path, 4
        c.optimizer.peak_lr, c.optimizer.warmup_steps = 1e-2, 1
        c.checkpoint.every = c.eval.every = 100
        c.eval.batches, c.log.every, c.log.tensorboard = 2, 1, False
        c.update_from_flattened_dict(overrides)
        return config_lib.resolve(c)

    return make
