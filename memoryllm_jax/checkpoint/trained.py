"""A trained model read back from its checkpoint: config, tokenizer and parameters.

Parameters are read one after another, so that at most two are in host memory besides those that are kept. For
inference, stacked layers are split into one array per layer: a decode step then reads each array at the memory's
bandwidth, whereas a scan over stacked layers would first copy every slice. On a CPU, these arrays are the memory that
was read into.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import sys
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax import config
from memoryllm_jax.checkpoint import description as description_lib
from memoryllm_jax.checkpoint import digest as digest_lib
from memoryllm_jax.checkpoint.reader import Reader
from memoryllm_jax.common import devices, threads
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.model import attention, sharding, transformer

_ROWS_DIGESTED = 16384  # rows of a matrix per sum of a digest; ToL files hold digests, so it must not change
_BLOCK = 1 << 16  # elements that are hashed at once: they and their hashes fit into a core's cache
_QUIET_S = 3  # seconds of reading without a line about it


class TrainedModel:
    """The model in a checkpoint of a workdir.

    Args:
      workdir: folder or gs:// URL of the checkpoints.
      step: the checkpoint's step; None is the newest.
      dtype: dtype of the computation, float32 or bfloat16; "" is that of the training.
      mesh: devices over which the parameters are sharded; None is the first device alone.
    Attributes:
      workdir: absolute path or URL of the checkpoints.
      step: the checkpoint's step.
      run: Config that the model was trained with.
      config: ModelConfig for this machine: with `dtype`, and the attention backend that suits it.
      context: largest number of positions in a sequence.
      tokenizer: Tokenizer of the training data.
      mesh: mesh of the parameters.
      description: the Description beside the arrays.
    Raises: UserError.
    """

    def __init__(self, workdir: str, step: int | None = None, dtype: str = "", mesh=None):
        self.workdir = description_lib.folder(workdir)
        self.step = description_lib.choose_step(self.workdir, step)
        self._reader = Reader(self.workdir)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._reader.close)
            self.description = self._reader.description(self.step)
            self.run = self.description.run()
            self.context = self.run.seq_len
            self.tokenizer = self.description.open_tokenizer()
            _check_tokenizer(self.tokenizer, self.run.model, f"{self.workdir}/{self.step}")
            self.config = for_this_machine(self.run.model, dtype or self.run.model.dtype)
            self.mesh = mesh or sharding.make_mesh(config.MeshConfig(1, 1, 1), devices.find()[:1])
            sharding.check_heads(self.config, self.mesh)
            shapes = transformer.abstract_params(transformer.LanguageModel(self.config), self.mesh)
            self._leaves = {
                digest_lib.array_name(path): _Leaf(path, like)
                for path, like in jax.tree_util.tree_leaves_with_path(shapes)
            }
            self._reader.check_shapes(self.step, _without_padding(self.config))
            on_error.pop_all()  # all is well: `close` closes the reader

    def facts(self) -> dict[str, str]:
        """The caption of a page about this model: {name: text}."""
        c = self.config
        compute_name = "FFN" if c.architecture == "base" else "FFN-C"
        widths = {"FFN-M": c.memory_dim, compute_name: c.compute_dim}
        ffns = ", ".join(f"{name} {width}" for name, width in widths.items() if width)
        tables = "tied embeddings" if c.tie_embeddings else "untied embeddings"
        return {
            "model": f"{c.architecture}, {c.layers} layers of width {c.dim}, {c.heads} heads, {ffns}, "
            f"{c.vocab_size:,} ids, {tables}, computed in {c.dtype}",
            "checkpoint": f"{self.workdir}, step {self.step}",
        }

    def is_memory(self, name: str) -> bool:
        """Whether a ToL file replaces a parameter: those of FFN-M, and the input embedding unless it is tied."""
        return name.startswith("memory/") or (name == "embedding" and not self.config.tie_embeddings)

    def load(
        self,
        wanted: Callable[[str], bool],
        digest: "Digest | None" = None,
        report: Callable[[float], None] | None = None,
    ) -> dict:
        """Reads the parameters whose names are wanted, each once, and shows the progress if it takes long.

        Args:
          wanted: whether a parameter is to be read, by its name.
          digest: gets all of them.
          report: called after each parameter with the share that is read, from 0 to 1.
        Returns: the parameters in the layout of `for_serving`.
        Raises: UserError.
        """
        params = {}
        for name, array in self._read(wanted, report):
            if digest is not None:
                digest.add(name, parts(name, array))
            _put(params, name, self._placed(name, array), self.config)
        return params

    def shapes(self) -> dict:
        """What `load` returns for all parameters, with shapes, dtypes and shardings in place of the arrays."""
        params = {}
        for name, (_, like) in self._leaves.items():
            _put(params, name, _shape_for_serving(name, like, self.config), self.config)
        return params

    def digest(self, wanted: Callable[[str], bool], params: dict | None = None) -> str:
        """The text of the Digest of the parameters whose names are wanted.

        Args:
          wanted: whether a parameter is digested, by its name.
          params: what `load` returned for them, on devices of this process; None: they are read.
        Raises: UserError.
        """
        digest = Digest()
        if params is None:
            for name, array in self._read(wanted):
                digest.add(name, parts(name, array))
                del array  # frees it before the next one but one is read
            return digest.text()
        # In the order of `_read`. The digest rounds to bfloat16, as loading may have done.
        for name in filter(wanted, self._leaves):
            digest.add(name, [np.asarray(part) for part in _loaded_parts(params, name, self.config)])
        return digest.text()

    def _read(self, wanted, report=None):
        """Yields (name, array in host memory, of the shape on the mesh) of the parameters whose names are wanted."""
        shapes = {name: leaf.like.shape for name, leaf in self._leaves.items() if wanted(name)}
        sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        label = f"read {self.workdir}/{self.step}"
        # On stderr, as what a command prints on stdout may be read by a program.
        progress = Progress(label, sum(sizes.values()), "B", quiet_s=_QUIET_S, stream=sys.stderr)
        done = 0
        with contextlib.closing(progress):
            arrays = {f"params/{name}": shape for name, shape in shapes.items()}
            for key, array in self._reader.arrays(self.step, arrays, lambda key: _has_layers(key[len("params/") :])):
                name = key[len("params/") :]
                yield name, array
                del array
                done += sizes[name]
                if report is not None:
                    report(done / progress.total)
                if done < progress.total:
                    progress.update(done)

    def _placed(self, name, array):
        """The array on the mesh in the dtype for inference; stacked layers become a list of one array per layer."""
        dtype = _serving_dtype(name, self.config)
        where = self._leaves[name].like.sharding
        if _has_layers(name):
            where = _of_one_layer(where)

        def put(part):
            # Each device gets its own part only; on a CPU the part is used without a copy if its dtype stays.
            return jax.make_array_from_callback(part.shape, where, lambda at: part[at].astype(dtype, copy=False))

        placed = threads.in_threads(put, parts(name, array))
        return placed if _has_layers(name) else placed[0]

    def names(self) -> list[str]:
        """Names of all parameters, in the order in which `load` reads them."""
        return list(self._leaves)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one parameter without padding; the layers' parameters are stacked over the layers."""
        return self._leaves[name].like.shape

    def leaf(self, name: str, like: jax.ShapeDtypeStruct | None = None) -> jax.Array:
        """Reads one parameter as float32; the layers' parameters are stacked over the layers.

        Args:
          name: the parameter's name, such as layers/ffn/gate.
          like: shape and sharding of the result; None: those of the model on `mesh`.
        Raises: UserError.
        """
        path, default = self._leaves[name]
        like = default if like is None else like
        wanted = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.sharding)
        return self._reader.leaf(self.step, path, wanted)

    def leaf_on_host(self, name: str) -> np.ndarray:
        """Reads one parameter as float32 into host memory, without padding and without a copy on a device.

        Raises: UserError.
        """
        path, like = self._leaves[name]
        saved = self._reader.leaf_on_host(self.step, path)
        without_padding = saved[tuple(slice(size) for size in like.shape)]
        return without_padding.astype(np.float32, copy=False)

    def close(self) -> None:
        """Closes the reader: no parameter can be read any more."""
        self._reader.close()


class _Leaf(typing.NamedTuple):
    """A parameter of the model: where it lies in the tree, and its shape, dtype and sharding on the mesh."""

    path: tuple  # in the tree of parameters, as jax.tree_util gives it
    like: jax.ShapeDtypeStruct


def _without_padding(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name of an array in a checkpoint: its shape} of all parameters; on one device nothing is padded."""
    shapes = transformer.unpadded_params(model, devices.find_local()[0])
    return {
        f"params/{digest_lib.array_name(path)}": leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


def _check_tokenizer(tokenizer: Tokenizer, model: ModelConfig, where: str) -> None:
    """Raises: UserError if the tokenizer has ids that the model has no embedding for."""
    special = [i for i in (tokenizer.bos_id, *tokenizer.stop_ids) if i is not None]
    largest = max([tokenizer.vocab_size - 1, *special])
    if largest >= model.vocab_size:
        raise UserError(
            f"{where}: tokenizer: expected ids below {model.vocab_size}, the model's vocab_size, found {largest}"
        )


class Digest:
    """A digest of the names, shapes and values of parameters, by which a ToL file names the decoder that it fits.

    Values are rounded to bfloat16 first, so that the digest does not depend on the dtype of the computation. Each
    matrix has two 32-bit hashes per _ROWS_DIGESTED rows; the digest is the SHA-256 of all names, shapes and hashes.

    Args:
      wanted: whether a parameter is part of the digest, by its name; `add` ignores the others.
    """

    def __init__(self, wanted: Callable[[str], bool] = lambda name: True):
        self._wanted = wanted
        self._sums: dict[str, list] = {}

    def add(self, name: str, layers: list[np.ndarray]) -> None:
        """Adds one parameter: a list of its layers, or of it alone. The order of the calls changes the digest."""
        if not self._wanted(name):
            return
        pieces = [(layer, first) for layer in layers for first in range(0, len(layer), _rows_digested(layer))]
        hashes = iter(threads.in_threads(lambda piece: _hashes_of_rows(*piece), pieces))
        self._sums[name] = [
            [
                list(layer.shape),
                *itertools.chain.from_iterable(next(hashes) for _ in range(0, len(layer), _rows_digested(layer))),
            ]
            for layer in layers
        ]

    def text(self) -> str:
        """The SHA-256 in hexadecimal."""
        return hashlib.sha256(json.dumps(self._sums).encode()).hexdigest()


def _rows_digested(x):
    """Rows of an array per pair of hashes; a vector is hashed as a whole."""
    return _ROWS_DIGESTED if x.ndim > 1 else len(x)


def _hashes_of_rows(x, first):
    """Two 32-bit hashes, of different seeds, of the rows of x from `first` on, as bfloat16.

    The bits and the place of each element are mixed by MurmurHash3's finalizer, and the results are summed modulo 2^32.
    Elements are numbered row by row from the seed on; the numbers wrap at 2^32.
    """
    flat = x[first : first + _rows_digested(x)].reshape(-1)
    places = np.arange(_BLOCK, dtype=np.uint32)
    sums = [0, 0]
    for start in range(0, flat.size, _BLOCK):
        bits = flat[start : start + _BLOCK].astype(jnp.bfloat16, copy=False).view(np.uint16).astype(np.uint32)
        for k, seed in enumerate((1, 2)):
            place = places[: bits.size] + np.uint32((start + seed) % 2**32)
            sums[k] += int(digest_lib.mixed(bits ^ (place * np.uint32(0x9E3779B1))).sum(dtype=np.uint32))
    return [total % 2**32 for total in sums]


def for_serving(params, config: ModelConfig) -> dict:
    """Converts a training state's parameters to the layout for inference, on the same devices.

    Args:
      params: tree of parameters, those of the layers stacked over the layers.
      config: the model.
    Returns: {"layers": [tree of layer 0, ...], "memory": [tree of layer 0, ...], "head": array, ...}; matrices in the
      config's dtype, norm scales in float32. In "memory", a layer that looks up nothing is {}.
    """
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = digest_lib.array_name(path)
        _put(out, name, _for_serving(name, leaf, config), config)
    return out


def serving_shapes(params_shape, config: ModelConfig) -> dict:
    """What `for_serving` returns, with shapes, dtypes and shardings in place of the arrays.

    Args:
      params_shape: the training state's parameters as jax.ShapeDtypeStruct with shardings.
    """
    out = {}
    for path, like in jax.tree_util.tree_leaves_with_path(params_shape):
        name = digest_lib.array_name(path)
        _put(out, name, _shape_for_serving(name, like, config), config)
    return out


def _for_serving(name, leaf, config):
    """The leaf in the dtype for inference; stacked layers become a list of one array per layer."""
    dtype = _serving_dtype(name, config)
    if _has_layers(name):
        return _layers_as(dtype, _of_one_layer(leaf.sharding))(leaf)
    return leaf if leaf.dtype == dtype else _as(dtype, leaf.sharding)(leaf)


def _shape_for_serving(name, like, config):
    """The shape, dtype and sharding of what `_for_serving` returns."""
    dtype = _serving_dtype(name, config)
    if not _has_layers(name):
        return jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding)
    part = jax.ShapeDtypeStruct(like.shape[1:], dtype, sharding=_of_one_layer(like.sharding))
    return [part] * like.shape[0]


# Cached, so that a run that converts its parameters again and again compiles the conversion once.
@functools.cache
def _as(dtype, where):
    return jax.jit(lambda x: x.astype(dtype), out_shardings=where)


@functools.cache
def _layers_as(dtype, where):
    return jax.jit(lambda x: [x[i].astype(dtype) for i in range(x.shape[0])], out_shardings=where)


def _serving_dtype(name, config):
    return jnp.dtype(jnp.float32 if name.endswith("scale") else config.dtype)


def _has_layers(name):
    """Whether the first axis of a parameter is that of the layers."""
    return name.split("/")[0] in (*transformer.LAYERS, "memory")


def parts(name: str, array: np.ndarray) -> list[np.ndarray]:
    """The layers of a parameter that has layers, else it alone."""
    return list(array) if _has_layers(name) else [array]


def _of_one_layer(where: NamedSharding) -> NamedSharding:
    """The sharding of one layer of an array whose first axis is that of the layers."""
    return NamedSharding(where.mesh, P(*where.spec[1:]))


def for_this_machine(config: ModelConfig, dtype: str) -> ModelConfig:
    """The config with another compute dtype, and the attention backend that suits it on this machine.

    Raises: UserError.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ArgumentError("dtype", f"expected float32 or bfloat16, found {dtype!r}")
    backend = attention.resolve_backend("auto", dtype, config.head_dim)
    return dataclasses.replace(config, dtype=dtype, attention=backend)


def _put(tree: dict, name: str, value, config: ModelConfig) -> None:
    """Sets tree[PART][PART]... to the value of the parameter PART/PART/...

    Of a parameter that has layers, the value is a list of one array per layer; each goes into the tree of its layer.
    """
    group, *path = name.split("/")
    if _has_layers(name):
        where, chosen = _layers_of(group, config)
        layers = tree.setdefault(where, [{} for _ in range(config.layers)])
        for layer, part in zip(layers[chosen], value, strict=True):
            _set(layer, path, part)
    else:
        _set(tree, [group, *path], value)


def _set(tree: dict, path: list[str], value) -> None:
    *parents, last = path
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _layers_of(group: str, config: ModelConfig) -> tuple[str, slice]:
    """(list of layers in the layout of `for_serving`, which of them have the parameters of a stacked group)."""
    first = config.row_layers.start
    if group == "layers":
        return group, slice(first or None)  # those below `upper_layers`; all, in most architectures
    return "memory" if group == "memory" else "layers", slice(first, None)


def _loaded_parts(params: dict, name: str, config: ModelConfig) -> list[jax.Array]:
    """The arrays that `_put` put for this parameter: one for each layer, or the parameter alone."""
    group, *path = name.split("/")
    if _has_layers(name):
        where, chosen = _layers_of(group, config)
        trees = params[where][chosen]
    else:
        trees = [params[group]]
    for part in path:
        trees = [tree[part] for tree in trees]
    return trees
