"""A trained model read back for use: its config, its tokenizer, and its parameters leaf by leaf.

Leaves come one at a time, so that the host never holds more than one beside what is kept of them, and stacked layers
are taken apart: a decode step that reads one array a layer runs at the memory's bandwidth, where a scan over stacked
layers copies each slice first.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax import config
from memoryllm_jax.checkpoint import store
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config, ModelConfig
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.model import attention, sharding, transformer

ROWS_DIGESTED = 16384  # of an array, at a time
_BLOCK_BYTES = 128 << 20  # of a parameter, read at a time, where its chunks in the checkpoint are not larger


class TrainedModel:
    """The newest checkpoint of a workdir, or that of `step`.

    Args:
      dtype: of the computation; "" takes the one that the model was trained with.
      mesh: devices the parameters are spread over; by default the first device alone.
    Attributes:
      workdir.  run: Config it was trained with.  config: ModelConfig for this machine.  context: positions a sequence
        may have.  step, tokenizer, mesh.
      description: what the checkpoint holds beside the arrays (`checkpoint.describe`).
    Raises: UserError.
    """

    def __init__(self, workdir: str, step: int | None = None, dtype: str = "", mesh=None):
        self._checkpoints, self.step = _open(workdir, step)
        self.workdir = self._checkpoints.workdir
        self.description = self._checkpoints.description(self.step)
        self.run = run = config.from_saved(self.description["config"])
        self.context, self.tokenizer = run.seq_len, Tokenizer.from_json(self.description["tokenizer"])
        self.config = for_this_machine(run.model, dtype or run.model.dtype)
        self.mesh = mesh or sharding.make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1])
        sharding.check_heads(self.config, self.mesh)
        shapes = transformer.abstract_params(transformer.LanguageModel(self.config), self.mesh)
        self._shapes = {
            parameter_name(path): (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        }

    def facts(self) -> dict[str, str]:
        """What a page about this model is captioned with."""
        c = self.config
        widths = {"FFN-M": c.memory_dim, "FFN" if c.architecture == "base" else "FFN-C": c.compute_dim}
        ffns = ", ".join(f"{name} {width}" for name, width in widths.items() if width)
        tables = "tied embeddings" if c.tie_embeddings else "untied embeddings"
        return {
            "model": f"{c.architecture}, {c.layers} layers of width {c.dim}, {c.heads} heads, {ffns}, "
            f"{c.vocab_size:,} ids, {tables}, computed in {c.dtype}",
            "checkpoint": f"{self.workdir}, step {self.step}",
        }

    def is_memory(self, name: str) -> bool:
        """Whether a parameter is only needed to make rows: FFN-M, and the input embedding where it is untied."""
        return name.startswith("memory/") or (name == "embedding" and not self.config.tie_embeddings)

    def load(self, wanted: Callable[[str], bool], keep: bool = True) -> tuple[dict, str]:
        """The parameters whose names are wanted, laid out for serving, and a digest of their values as bfloat16.

        Returns:
          params: {"layers": [tree of layer 0, ...], "memory": likewise, "head", ...}, matrices in the config's dtype;
            empty if not `keep`.
        """
        params, digest = {}, Digest()
        for name in self._shapes:
            if wanted(name):
                dtype = jnp.float32 if name.endswith("scale") else jnp.dtype(self.config.dtype)
                value = _for_serving(name, self.leaf(name, dtype), self.config)
                for layer, part in enumerate(value if isinstance(value, list) else [value]):
                    digest.add(name, layer, part.shape, part)
                if keep:
                    _put(params, name.split("/"), value)
                del value, part
        return params, digest.text()

    def names(self) -> list[str]:
        """Names of all parameters, in the order in which `load` reads them."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one parameter, stacked over the layers if it is one of theirs."""
        return self._shapes[name][1].shape

    def leaf(self, name: str, dtype, like: jax.ShapeDtypeStruct | None = None) -> jax.Array:
        """One parameter, stacked over the layers if it is one of theirs; in the shape and place of `like`, if given."""
        path, shape = self._shapes[name]
        like = shape if like is None else like
        wanted = jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding)
        return self._checkpoints.restore_leaf(self.step, path, wanted)

    def blocks(self, name: str, axis: int) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(where it begins on each axis, part) of one parameter, float32, read piece by piece.

        Pieces are cut on `axis`: on the first, ROWS_DIGESTED long; else of about _BLOCK_BYTES in whole chunks of the
        checkpoint, or where these are larger, of some layers each.
        """
        path, like = self._shapes[name]
        shape, stored = like.shape, self._checkpoints.open_leaf(self.step, path)
        chunk, size = stored.chunk_layout.read_chunk.shape, list(shape)
        if axis == 0:
            size[0] = ROWS_DIGESTED
        else:
            along = 4 * like.size // shape[axis] * chunk[axis]
            size[axis] = max(1, _BLOCK_BYTES // along) * chunk[axis]
            size[0] = max(1, shape[0] * _BLOCK_BYTES // along)
        for first in itertools.product(*(range(0, whole, step) for whole, step in zip(shape, size))):
            last = [min(a + step, whole) for a, step, whole in zip(first, size, shape)]
            piece = np.empty([b - a for a, b in zip(first, last)], np.float32)
            # Chunk by chunk, as TensorStore would hold all of them beside what they make up.
            grid = (range(a - a % step, b, step) for a, b, step in zip(first, last, chunk))
            for corner in itertools.product(*grid):
                begins = list(map(max, corner, first))
                ends = [min(low + step, b) for low, step, b in zip(corner, chunk, last)]
                place = tuple(slice(low - a, high - a) for low, high, a in zip(begins, ends, first))
                piece[place] = stored[tuple(map(slice, begins, ends))].read().result()
            yield first, piece
            del piece

    def close(self) -> None:
        self._checkpoints.close()


def config_of(workdir: str, step: int | None = None) -> Config:
    """The config that a checkpoint was trained with. Raises: UserError."""
    checkpoints, step = _open(workdir, step)
    try:
        return config.from_saved(checkpoints.description(step)["config"])
    finally:
        checkpoints.close()


def _open(workdir, step):
    """The checkpoints of a workdir, and `step` or the newest of them. Raises: UserError."""
    workdir = store.folder(workdir)
    if not storage.exists(workdir):
        raise UserError(f"--workdir={workdir}: expected a folder with checkpoints, found none")
    checkpoints = store.Checkpoints(workdir, read_only=True)
    steps = checkpoints.steps()
    chosen = max(steps, default=None) if step is None else step
    if chosen not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{workdir}: expected a checkpoint{'' if step is None else f' of step {step}'}, found {found}")
    return checkpoints, chosen


class Digest:
    """Names the values of some parameters, taken as bfloat16, so that a model read in any dtype has one digest."""

    def __init__(self):
        self._sums: dict[str, dict] = {}

    def add(self, name: str, layer: int, shape: tuple[int, ...], part, axis: int = 0, start: int = 0) -> None:
        """Some of a layer's parameter: what begins at `start` on an axis; on the first, in pieces of ROWS_DIGESTED."""
        _, sums = self._sums.setdefault(name, {}).setdefault(layer, (list(shape), {}))
        strides = tuple(int(np.prod(shape[i + 1 :])) % 2**32 for i in range(len(shape)))
        first, begin = (start // ROWS_DIGESTED, 0) if axis == 0 else (0, start * strides[axis])
        rows = ROWS_DIGESTED if len(shape) > 1 else shape[0]
        for number, row in enumerate(range(0, len(part), rows), first):
            for seed in (1, 2):
                origin = np.uint32((seed + begin) % 2**32)
                found = int(_fingerprint(part[row : row + rows], origin, strides))
                sums[number, seed] = (sums.get((number, seed), 0) + found) % 2**32

    def text(self) -> str:
        """In the order in which parameters were added first."""
        whole = {
            name: [[shape, *(sums[key] for key in sorted(sums))] for _, (shape, sums) in sorted(layers.items())]
            for name, layers in self._sums.items()
        }
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def for_serving(params, config: ModelConfig) -> dict:
    """A training state's parameters as `TrainedModel.load` lays them out, on the devices they are on."""
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _put(out, parameter_name(path).split("/"), _for_serving(parameter_name(path), leaf, config))
    return out


def _for_serving(name, leaf, config):
    """The leaf in the dtype of the computation; of stacked layers, a list."""
    dtype = jnp.float32 if name.endswith("scale") else jnp.dtype(config.dtype)
    where = leaf.sharding
    if not name.startswith(("layers/", "memory/")):
        return jax.jit(lambda x: x.astype(dtype), out_shardings=where)(leaf) if leaf.dtype != dtype else leaf
    layer = NamedSharding(where.mesh, P(*where.spec[1:]))
    return jax.jit(lambda x: [x[i].astype(dtype) for i in range(x.shape[0])], out_shardings=layer)(leaf)


def for_this_machine(config: ModelConfig, dtype: str) -> ModelConfig:
    """The config with the attention backend that suits this machine and dtype. Raises: UserError."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype: expected float32 or bfloat16, found {dtype!r}")
    return dataclasses.replace(config, dtype=dtype, attention=attention.resolve_backend("auto", dtype))


def parameter_name(path) -> str:
    """As parameters are called here: layers/ffn/gate, from a path in the tree."""
    return "/".join(key.key for key in path)


def _put(tree: dict, path: list[str], value) -> None:
    if path[0] in ("layers", "memory") and len(path) > 1:
        layers = tree.setdefault(path[0], [{} for _ in value])
        for layer, part in zip(layers, value):
            _put(layer, path[1:], part)
    elif len(path) > 1:
        _put(tree.setdefault(path[0], {}), path[1:], value)
    else:
        tree[path[0]] = value


@functools.partial(jax.jit, static_argnames="strides")
def _fingerprint(x, origin, strides):
    """A 32-bit sum over the bits and places of all elements: the same on any mesh, as integers add in any order."""
    place = jnp.full(x.shape, origin, jnp.uint32)
    for axis, stride in enumerate(strides):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    h = bits.astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B1))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return (h ^ (h >> 16)).sum(dtype=jnp.uint32)
