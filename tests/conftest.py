"""Eight emulated CPU devices, one prepared data set of real text, and a small config that trains on it."""

import importlib.metadata
import os
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers, and the commands that tests start, share one
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="memoryllm_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# LLVM's optimisations would make compiling half as long again, its threads a quarter longer in CPU time while workers
# fill the cores, and the newer fusion emitters twice as long.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones always use them
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import contextlib
import functools
import itertools
import json
import shutil
import socket

import jax
import pytest

from memoryllm_jax.checkpoint import trained
from memoryllm_jax.config import MeshConfig, default, resolve
from memoryllm_jax.data import documents, shards
from memoryllm_jax.model import sharding
from memoryllm_jax.tol import compress, serving
from memoryllm_jax.training import loop

CONTEXT = 32  # of the models that `lab` trains
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
    if "PYTEST_XDIST_WORKER" not in os.environ:
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
    shards.prepare(corpus, "sentencepiece:train:512", path, validation_fraction=0.05)
    return path


@pytest.fixture
def make_config(data_path):
    """make_config("flex-3", **{"model.dim": 64}) -> Config of a model small enough for any test."""

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


class Lab:
    """A trained model of each architecture, made when it is first asked for."""

    def __init__(self, data_path, folder):
        self.data_path, self.folder = data_path, folder
        self.workdir = functools.cache(self._workdir)
        self.tol = functools.cache(self._tol)

    def _workdir(self, name):
        c = default(name)
        c.steps, c.batch_size, c.seq_len = 16, 8, CONTEXT
        c.model.dim, c.model.layers, c.model.heads, c.model.dtype = 32, 2, 4, "float32"
        c.model.init_std, c.model.loss_chunk = 0.1, 24
        c.data.path, c.data.epochs = self.data_path, 9
        c.optimizer.peak_lr, c.optimizer.warmup_steps = 2e-2, 2
        c.log.every, c.log.tensorboard = 100, False
        workdir = str(self.folder / name)
        assert loop.train(resolve(c), workdir, jax.devices()[:1]) == 0
        return workdir

    def _tol(self, name):
        path = str(self.folder / f"{name}.safetensors")
        compress.precompute(self.workdir(name), path, compress.Options())
        return path

    def run(self, name):
        """Its Config."""
        return trained.config_of(self.workdir(name))

    def config(self, name):
        return self.run(name).model

    def model(self, name, *args, devices=1):
        mesh = sharding.make_mesh(MeshConfig(-1, 1, 1), jax.devices()[:devices])
        return contextlib.closing(serving.open_engine(self.workdir(name), *args, mesh=mesh))


@pytest.fixture(scope="session")
def lab(data_path, tmp_path_factory):
    return Lab(data_path, tmp_path_factory.mktemp("lab"))
