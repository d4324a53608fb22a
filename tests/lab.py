"""Helpers for the tests of several parts: trained models, environments for commands, and free ports."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import reference

from memoryllm_jax.checkpoint import store, trained
from memoryllm_jax.checkpoint.description import Data, Description, SavedTokenizer, config_of, describe
from memoryllm_jax.config import Config, MeshConfig, ModelConfig, default, resolve
from memoryllm_jax.data import shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.experiments import models as models_lib
from memoryllm_jax.inference.decoder import Decoder, bucket
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.tol import compress, serving
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.training import loop

# For checkpoints of arrays that belong to no model
DESCRIPTION = Description(
    config={},
    data=Data(digest="0"),
    tokenizer=SavedTokenizer(kind="hf", digest=hashlib.sha256(b"").hexdigest(), content=b""),
)
CONTEXT = 32  # context of the models that `Lab` trains, in tokens
TOKENS = 12 * CONTEXT  # length of the text that models are compared on: whole windows, so that only one shape compiles
GREEDY = Sampling(temperature=0)
# For `jax.jit`: as XLA compiles outside of the tests, which fuses operations and orders sums as it likes
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hf", "golden_hf")


def with_devices(count: int) -> dict[str, str]:
    """The environment for a command with `count` emulated devices and the compiler options of this process."""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={count}")}


_IN_FORKS = """
import importlib, json, os, runpy, sys, tempfile
module, lines = sys.argv[1], json.loads(sys.argv[2])
importlib.import_module(module)
del sys.modules[module]  # or runpy warns
ends = []
for line in lines:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = [module, *line]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        ends.append((code, out.read(), err.read()))
print(json.dumps(ends))
"""


def run_lines(module: str, *lines: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Runs `python -m module` with the arguments of each line, in forks of one process: imports are most of the time.

    Returns: exit code, stdout and stderr for each line.
    """
    command = [sys.executable, "-c", _IN_FORKS, module, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [tuple(end) for end in json.loads(done.stdout)]


def stop_time(monkeypatch, *modules) -> list[float]:
    """Lets these modules read the time, in seconds, from a list of one number. Returns: the list.

    Do not replace `time.monotonic` itself: the event loop of a server in another thread of this process would compute
    from the stopped time how long to sleep, up to a day, and the end of the session would wait for that server.
    """
    now = [100.0]
    for module in modules:
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def free_port() -> int:
    """A free port of this machine, where the processes of one run can find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read_all(dataset: Dataset, split: str = "train") -> np.ndarray:
    """All token ids of a split."""
    tokens = getattr(dataset, split)
    return tokens.read(0, tokens.tokens)


def shared_folder(tmp_path_factory) -> pathlib.Path:
    """A folder that all workers of this test session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@contextlib.contextmanager
def made_once(path: pathlib.Path):
    """Yields whether the caller has to make `path`. Other workers that ask for the same path wait until it is made."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = pathlib.Path(f"{path}.done")
        yield not done.exists()
        done.touch()


def random_params(config: ModelConfig, mesh, std: float = 0.1) -> tuple[dict, dict]:
    """Random parameters: (sharded on the mesh and padded, as in a training state; as plain arrays without padding)."""
    model, rng = transformer.LanguageModel(config), np.random.default_rng(0)
    one = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])

    def draw(path, like):
        # If norm scales were one, a norm that is applied twice would not change the result.
        return rng.normal(path[-1].key == "scale", std, like.shape).astype("f")

    def place(x, like):
        padded = np.pad(x, [(0, b - a) for a, b in zip(x.shape, like.shape)])
        return jax.device_put(padded, like.sharding)

    whole = jax.tree_util.tree_map_with_path(draw, transformer.abstract_params(model, one))
    return jax.tree.map(place, whole, transformer.abstract_params(model, mesh)), whole


def write_untrained(config: Config, workdir: str, tensor: int = 1) -> str:
    """Makes a workdir with one checkpoint, step 0 with `random_params`, without compiling anything.

    Args:
      tensor: devices along the tensor axis; the parameters are padded for them.
    Returns: the workdir.
    """
    prepared = Dataset(config.data.path)
    config = loop.complete(config, prepared)
    mesh = sharding.make_mesh(MeshConfig(1, 1, tensor), jax.devices()[:tensor])
    params, _ = random_params(config.model, mesh, std=0.2)
    with contextlib.closing(store.Checkpoints(workdir)) as checkpoints:
        checkpoints.save(0, {"params": params}, describe(config, prepared.digest, prepared.tokenizer()))
        checkpoints.wait()
    return workdir


def random_decoder(config: ModelConfig, mesh: tuple[int, int, int] = (1, 1, 1)) -> tuple[Decoder, LiveRows, dict]:
    """A model with random weights large enough for varied texts: (decoder, its rows, parameters as plain arrays)."""
    mesh = sharding.make_mesh(MeshConfig(*mesh), jax.devices()[: np.prod(mesh)])
    placed, whole = random_params(config, mesh, std=0.3)
    params = trained.for_serving(placed, config)
    return Decoder(config, params, mesh), LiveRows(config, params, mesh), whole


class HostRows:
    """A row source whose rows a decode step finds only after `hold`. It keeps those of the last step alone."""

    on_device = False

    def __init__(self, live):
        self.live, self.held, self.asked, self.reserved = live, np.zeros(64, bool), [], 0

    @property
    def arrays(self):
        return self.live.arrays, jnp.array(self.held)  # a copy: a step under way reads what was held when it began

    def fetch(self, ids_U):
        return self.live.fetch(ids_U)

    def gather(self, arrays, ids_U):
        rows = self.live.gather(arrays[0], ids_U)
        is_held_U1 = arrays[1][ids_U][None, :, None]  # a row that is not held is not a number
        return jax.tree.map(lambda x: jnp.where(is_held_U1, x, jnp.nan), rows)

    def holds(self, arrays, ids_U):
        return arrays[1][ids_U]

    def reserve(self, rows):
        self.reserved = max(rows, self.reserved)

    def hold(self, ids_U):
        assert 0 < len(ids_U) <= self.reserved
        was_held = self.held[ids_U].all()
        self.held[:] = False
        self.held[ids_U] = True
        self.asked.append(set(ids_U.tolist()))
        return not was_held


def stacked(params: dict) -> dict:
    """Stacks the layers of parameters from `TrainedModel.load`, as tests/reference.py expects them."""
    layers, memory = params["layers"], [layer for layer in params.get("memory", ()) if layer]
    lower = sum("v" in layer["attention"] for layer in layers)  # others have their values from a token memory
    groups = {"layers": layers[:lower], "upper_layers": layers[lower:], "memory": memory}
    return params | {name: jax.tree.map(lambda *x: jnp.stack(x), *group) for name, group in groups.items() if group}


def log_softmax(model, ids_BT) -> np.ndarray:
    """Log-probabilities from tests/reference.py, float64 [B, T, V]."""
    params = model.trained.load(lambda _: True)
    logits = np.asarray(reference.logits(stacked(params), np.asarray(ids_BT), model.config), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def of_sequences(model, sequences):
    """Scores the sequences with tests/reference.py.

    Returns: for each sequence (log-probability, whether it is the likeliest) of every id but the first, as two arrays.
    """
    longest = max(map(len, sequences))
    padded = np.stack([np.pad(s, (0, longest - len(s))) for s in sequences])
    p = log_softmax(model, padded[:, :-1])
    targets = padded[:, 1:]
    of_targets = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    is_top = p.argmax(-1) == targets
    out = []
    for number, sequence in enumerate(sequences):
        count = len(sequence) - 1
        out.append((of_targets[number, :count], is_top[number, :count]))
    return out


def loss_on(model, path, tokens=TOKENS) -> float:
    """The loss on the first `tokens` held-out tokens, in nats per token."""
    windows = perplexity.Windows(CONTEXT, CONTEXT, tokens)
    text = perplexity.prepared_text(path, "validation", model.tokenizer, windows)
    return perplexity.perplexity(model, text, windows)["loss"]


def run_experiment(experiment, models, folder, **chosen) -> tuple[dict, str]:
    """Runs an experiment. Returns: (results in its JSON file, HTML of its page)."""
    models_lib.run(experiment, [models], str(folder), **chosen)
    name = folder / experiment.__name__
    return json.loads(name.with_suffix(".json").read_text())["results"], name.with_suffix(".html").read_text()


# {name of a model: (its architecture, overridden fields)}. Any other name is an architecture without overrides.
MODELS = {
    "flex-3": ("flex-3", {"checkpoint.every": 8}),
    "tied": (
        "memory",
        {"model.tie_embeddings": True, "model.norm": "layernorm", "model.qk_norm": True, "model.logit_softcap": 8.0},
    ),
    "other": ("memory", {"steps": 2, "data.path": "other"}),  # same shapes as memory, another tokenizer
}


def records(workdir, kind: str = "train") -> list[dict]:
    """The records of one kind, train or validation, in the metrics.jsonl of a run."""
    with open(f"{workdir}/metrics.jsonl") as file:
        return [record for record in map(json.loads, file) if record["kind"] == kind]


def opened(path) -> contextlib.closing[TolFile]:
    """A ToL file, closed at the end of the `with` block."""
    return contextlib.closing(TolFile(str(path)))


def some_tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    return np.random.default_rng(seed).integers(3, 512, count).tolist()


def written(model, prompts, tokens=12, settings=GREEDY, **more) -> list[list[int]]:
    """The tokens that the model generates for each prompt."""
    out = [[] for _ in prompts]
    for new in model.generate(prompts, tokens, settings, **more):
        for sequence, token in new:
            out[sequence].append(token)
    return out


def all_layers(rows):
    """`TokenRows` with the rows of every layer in a list, as a jitted function takes them."""
    return rows if rows.rows_LSUP is None else rows._replace(rows_LSUP=list(rows.rows_LSUP))


def jitted_step(decoder):
    """`Decoder.step` as a function of (rows, index_B, position_B, cache) that compiles once."""
    of_cache = jax.NamedSharding(decoder.mesh, sharding.spec("batch", "heads", None, None))
    step = jax.jit(decoder.step, out_shardings=(None, of_cache))  # the first cache comes from the prefill

    def call(rows, index_B, position_B, cache):
        with jax.set_mesh(decoder.mesh):
            return step(decoder.params, all_layers(rows), index_B, position_B, cache)

    return call


def step_logits(decoder, rows, tokens, first=1) -> np.ndarray:
    """Logits after each of tokens[first - 1:], [n, V], from a prefill of `first` tokens and then decode steps."""
    cache = decoder.empty_cache(decoder.shards, bucket(len(tokens), CONTEXT))
    batch = np.repeat(np.array(tokens, np.int32)[None], decoder.shards, 0)
    ids, index = np.unique(batch, return_inverse=True)
    index, rows = index.reshape(batch.shape).astype(np.int32), rows.fetch(ids.astype(np.int32))
    lengths = np.full(decoder.shards, first, np.int32)
    logits, cache = decoder.prefill(rows, index[:, :first], lengths, np.arange(decoder.shards, dtype=np.int32), cache)
    out = [np.asarray(logits[-1])]
    step = jitted_step(decoder)
    for position in range(first, len(tokens)):
        logits, cache = step(rows, index[:, position], np.full(decoder.shards, position, np.int32), cache)
        out.append(np.asarray(logits[-1]))
    return np.stack(out)


class Lab:
    """Trained models and their ToL files. Each is made when a test first needs it, once for all workers."""

    def __init__(self, data_path, corpus, folder):
        self.data_path, self.corpus, self.folder = data_path, corpus, folder
        self.workdir = functools.cache(self._workdir)
        self.tol = functools.cache(self._tol)
        self.params = functools.cache(self._params)

    def _workdir(self, name):
        architecture, overrides = MODELS.get(name, (name, {}))
        c = default(architecture)
        c.steps, c.batch_size, c.seq_len = 16, 8, CONTEXT
        c.model.dim, c.model.layers, c.model.heads, c.model.dtype = 32, 2, 4, "float32"
        c.model.init_std, c.model.loss_chunk = 0.1, 24
        c.data.path, c.data.epochs = self.data_path, 9
        c.optimizer.peak_lr, c.optimizer.warmup_steps = 2e-2, 2
        c.log.every, c.log.tensorboard = 100, False
        c.update_from_flattened_dict(overrides)
        if c.data.path == "other":
            c.data.path = self.other_data()
        workdir = self.folder / name
        with made_once(workdir) as to_make:
            if to_make:
                assert loop.train(resolve(c), str(workdir), jax.devices()[:1]) == 0
        return str(workdir)

    def other_data(self):
        """Prepared data of another tokenizer: every second document of the corpus, and a tokenizer trained on these."""
        path, text = self.folder / "other_data", self.folder / "other.jsonl"
        with made_once(path) as to_make:
            if to_make:
                lines = pathlib.Path(self.corpus).read_text().splitlines(keepends=True)
                text.write_text("".join(lines[::2]))
                shards.prepare(str(text), "sentencepiece:train:512", str(path), validation_fraction=0.1)
        return str(path)

    def _tol(self, name, **choices):
        """A ToL file with these `compress.Options`."""
        chosen = "".join(f"-{option}-{value}" for option, value in choices.items())
        path = self.folder / f"{name}{re.sub('[^-0-9a-z_.]', '_', chosen)}.safetensors"
        with made_once(path) as to_make:
            if to_make:
                compress.precompute(self.workdir(name), str(path), compress.Options(**choices))
        return str(path)

    def _params(self, name):
        """(parameters as tests/reference.py takes them, ModelConfig)."""
        model = trained.TrainedModel(self.workdir(name))
        params = model.load(lambda _: True)
        return stacked(params), model.config

    def memory(self, name, change=lambda layer, p: p):
        """FFN-M outputs of all tokens from tests/reference.py, [layers, V, D].

        Args:
          change: (layer, its parameters) -> changed parameters.
        """
        params, m = self.params(name)
        layers = [jax.tree.map(lambda a, i=i: a[i], params["memory"]) for i in range(m.layers)]
        layers = [change(i, p) for i, p in enumerate(layers)]
        x0 = params["embedding"]
        return np.stack([reference.swiglu(reference.norm(x0, p["norm"]["scale"], m), p["ffn"]) for p in layers])

    def run(self, name):
        """The Config of the model's run."""
        return config_of(self.workdir(name))

    def config(self, name):
        """The ModelConfig of a model."""
        return self.run(name).model

    def model(self, name, *args, devices=1, **kwargs):
        """A context manager that opens a model as an `Engine`; further arguments are those of `open_engine`."""
        mesh = sharding.make_mesh(MeshConfig(-1, 1, 1), jax.devices()[:devices])
        return contextlib.closing(serving.open_engine(self.workdir(name), *args, mesh=mesh, **kwargs))
