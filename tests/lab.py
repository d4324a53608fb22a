"""What tests of several parts share: trained models to look at, environments for commands, and ports."""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import socket

import jax
import jax.numpy as jnp
import numpy as np
import reference

from memoryllm_jax.checkpoint import store, trained
from memoryllm_jax.config import Config, MeshConfig, ModelConfig, default, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.experiments import models as models_lib
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.tol import compress, serving
from memoryllm_jax.training import loop

CONTEXT = 32  # of the models that `lab` trains
GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hf", "golden_hf")


def with_devices(count: int) -> dict[str, str]:
    """The environment of a command with so many emulated devices that computes as the tests here do."""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={count}")}


def free_port() -> int:
    """Of this machine, for the processes of one run to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read_all(dataset: Dataset, split: str = "train") -> np.ndarray:
    """All token ids of a split."""
    tokens = getattr(dataset, split)
    return tokens.read(0, tokens.tokens)


def shared_folder(tmp_path_factory) -> pathlib.Path:
    """A folder of this test session that all of its workers have."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@contextlib.contextmanager
def made_once(path: pathlib.Path):
    """Yields whether `path` is still to be made; other workers that ask for it meanwhile wait."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = pathlib.Path(f"{path}.done")
        yield not done.exists()
        done.touch()


def random_params(config: ModelConfig, mesh, std: float = 0.1) -> tuple[dict, dict]:
    """Parameters drawn at random: (as a training state holds them on the mesh, as plain arrays without padding)."""
    model, rng = transformer.LanguageModel(config), np.random.default_rng(0)
    one = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])

    def draw(path, like):
        # Norm scales of one would hide a norm that is applied twice or not at all.
        return rng.normal(path[-1].key == "scale", std, like.shape).astype("f")

    def place(x, like):
        padded = np.pad(x, [(0, b - a) for a, b in zip(x.shape, like.shape)])
        return jax.device_put(padded, like.sharding)

    whole = jax.tree_util.tree_map_with_path(draw, transformer.abstract_params(model, one))
    return jax.tree.map(place, whole, transformer.abstract_params(model, mesh)), whole


def write_untrained(config: Config, workdir: str) -> str:
    """Makes a workdir with one checkpoint, of step 0 and `random_params`, without compiling anything."""
    prepared = Dataset(config.data.path)
    config = loop.complete(config, prepared)
    params, _ = random_params(config.model, sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), std=0.2)
    with contextlib.closing(store.Checkpoints(workdir)) as checkpoints:
        checkpoints.save(0, {"params": params}, store.describe(config, prepared, prepared.tokenizer()))
        checkpoints.wait()
    return workdir


def random_decoder(config: ModelConfig, mesh: tuple[int, int, int] = (1, 1, 1)) -> tuple[Decoder, LiveRows, dict]:
    """(decoder, its rows, the parameters as plain arrays) of a model with random weights, whose texts vary."""
    mesh = sharding.make_mesh(MeshConfig(*mesh), jax.devices()[: np.prod(mesh)])
    placed, whole = random_params(config, mesh, std=0.3)
    params = trained.for_serving(placed, config)
    return Decoder(config, params, mesh), LiveRows(config, params, mesh), whole


def stacked(params: dict) -> dict:
    """Parameters as `TrainedModel.load` returns them, their layers stacked as tests/reference.py takes them."""
    groups = [name for name in ("layers", "memory") if name in params]
    return params | {name: jax.tree.map(lambda *x: jnp.stack(x), *params[name]) for name in groups}


def log_softmax(model, ids_BT) -> np.ndarray:
    """Log-probabilities [B, T, V] by the equations, in float64."""
    params, _ = model.trained.load(lambda _: True)
    logits = np.asarray(reference.logits(stacked(params), np.asarray(ids_BT), model.config), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def of_sequences(model, sequences):
    """By the equations, for each sequence: (log-probabilities of ids 1 on, whether each is the likeliest)."""
    longest = max(map(len, sequences))
    padded = np.stack([np.pad(s, (0, longest - len(s))) for s in sequences])
    p = log_softmax(model, padded[:, :-1])
    targets = padded[:, 1:]
    gathered = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    return [(x[: len(s) - 1], g[: len(s) - 1]) for x, g, s in zip(gathered, p.argmax(-1) == targets, sequences)]


def loss_on(model, path, tokens=400) -> float:
    """Nats a token of the first held-out tokens."""
    windows = perplexity.Windows(CONTEXT, CONTEXT, tokens)
    text = perplexity.prepared_text(path, "validation", model.tokenizer, windows)
    return perplexity.perplexity(model, text, windows)["loss"]


def run_experiment(experiment, models, folder, **chosen) -> tuple[dict, str]:
    """(results, HTML) of the page that an experiment writes."""
    models_lib.run(experiment, models, str(folder), **chosen)
    name = folder / experiment.__name__
    return json.loads(name.with_suffix(".json").read_text())["results"], name.with_suffix(".html").read_text()


class Lab:
    """A trained model of each architecture, made when it is first asked for, once for all workers."""

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
        workdir = self.folder / name
        with made_once(workdir) as to_make:
            if to_make:
                assert loop.train(resolve(c), str(workdir), jax.devices()[:1]) == 0
        return str(workdir)

    def _tol(self, name):
        path = self.folder / f"{name}.safetensors"
        with made_once(path) as to_make:
            if to_make:
                compress.precompute(self.workdir(name), str(path), compress.Options())
        return str(path)

    def run(self, name):
        """Its Config."""
        return trained.config_of(self.workdir(name))

    def config(self, name):
        return self.run(name).model

    def model(self, name, *args, devices=1):
        mesh = sharding.make_mesh(MeshConfig(-1, 1, 1), jax.devices()[:devices])
        return contextlib.closing(serving.open_engine(self.workdir(name), *args, mesh=mesh))
