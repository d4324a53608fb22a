"""A trained model read back from its checkpoint: config, tokenizer and parameters.

Parameters are read one at a time, so that at most one is in memory besides those that are kept. For inference, stacked
layers are split into one array per layer: a decode step then reads each array at the memory's bandwidth, whereas a scan
over stacked layers would first copy every slice.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
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
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.model import attention, sharding, transformer

_ROWS_DIGESTED = 16384  # rows of a matrix per sum of a digest; ToL files hold digests, so it must not change


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
            self.mesh = mesh or sharding.make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1])
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

    def load(self, wanted: Callable[[str], bool]) -> tuple[dict, str]:
        """Reads the parameters whose names are wanted.

        Returns: (the parameters in the layout of `for_serving`, the text of their Digest).
        Raises: UserError.
        """
        params = {}
        digest = Digest()
        for name in filter(wanted, self._leaves):
            value = self._leaf_for_serving(name)
            digest.add(name, value)
            _put(params, name.split("/"), value)
        return params, digest.text()

    def digest(self, wanted: Callable[[str], bool]) -> str:
        """The digest that `load` returns, without keeping the parameters. Raises: UserError."""
        digest = Digest()
        for name in filter(wanted, self._leaves):
            # No variable holds the value, so that it is freed before the next one is read.
            digest.add(name, self._leaf_for_serving(name))
        return digest.text()

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

    def _leaf_for_serving(self, name):
        return _for_serving(name, self.leaf(name), self.config)

    def close(self) -> None:
        """Closes the reader: no parameter can be read any more."""
        self._reader.close()


class _Leaf(typing.NamedTuple):
    """A parameter of the model: where it lies in the tree, and its shape, dtype and sharding on the mesh."""

    path: tuple  # in the tree of parameters, as jax.tree_util gives it
    like: jax.ShapeDtypeStruct


def _without_padding(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name of an array in a checkpoint: its shape} of all parameters; on one device nothing is padded."""
    mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1), jax.local_devices()[:1])
    shapes = transformer.abstract_params(transformer.LanguageModel(model), mesh)
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
    """

    def __init__(self):
        self._sums: dict[str, list] = {}

    def add(self, name: str, value: jax.Array | list[jax.Array]) -> None:
        """Adds one parameter, or a list of its layers. The order of the calls changes the digest."""
        layers = value if isinstance(value, list) else [value]
        self._sums[name] = [[list(layer.shape), *_sums(layer)] for layer in layers]

    def text(self) -> str:
        """The SHA-256 in hexadecimal."""
        return hashlib.sha256(json.dumps(self._sums).encode()).hexdigest()


def _sums(x):
    """Two hashes, of different seeds, for each _ROWS_DIGESTED rows of a matrix; a vector is hashed as a whole."""
    # Elements are numbered row by row; the numbers wrap at 2^32, as the hashes do.
    strides = tuple(int(np.prod(x.shape[axis + 1 :])) % 2**32 for axis in range(x.ndim))
    rows = _ROWS_DIGESTED if x.ndim > 1 else len(x)
    sums = []
    for first in range(0, len(x), rows):
        for seed in (1, 2):
            sums.append(int(_fingerprint(x[first : first + rows], np.uint32(seed), strides)))
    return sums


def for_serving(params, config: ModelConfig) -> dict:
    """Converts a training state's parameters to the layout for inference, on the same devices.

    Args:
      params: tree of parameters, those of the layers stacked over the layers.
      config: the model.
    Returns: {"layers": [tree of layer 0, ...], "memory": [tree of layer 0, ...], "head": array, ...}; matrices in the
      config's dtype, norm scales in float32.
    """
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = digest_lib.array_name(path)
        _put(out, name.split("/"), _for_serving(name, leaf, config))
    return out


def _for_serving(name, leaf, config):
    """The leaf in the dtype for inference; stacked layers become a list of one array per layer."""
    dtype = jnp.float32 if name.endswith("scale") else jnp.dtype(config.dtype)
    where = leaf.sharding
    if not name.startswith(("layers/", "memory/")):
        if leaf.dtype == dtype:
            return leaf
        return jax.jit(lambda x: x.astype(dtype), out_shardings=where)(leaf)
    layer = NamedSharding(where.mesh, P(*where.spec[1:]))  # without the axis of the layers
    return jax.jit(lambda x: [x[i].astype(dtype) for i in range(x.shape[0])], out_shardings=layer)(leaf)


def for_this_machine(config: ModelConfig, dtype: str) -> ModelConfig:
    """The config with another compute dtype, and the attention backend that suits it on this machine.

    Raises: UserError.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ArgumentError("dtype", f"expected float32 or bfloat16, found {dtype!r}")
    return dataclasses.replace(config, dtype=dtype, attention=attention.resolve_backend("auto", dtype))


def _put(tree: dict, path: list[str], value) -> None:
    """Sets tree[path[0]][path[1]]... to the value.

    Under "layers" and "memory" the value is a list of one array per layer; each goes into the tree of its layer.
    """
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
    """A 32-bit hash of x as bfloat16, which depends on where each value stands; `origin` is its seed.

    The bits and the place of each element are mixed by MurmurHash3's finalizer, and the results are summed modulo 2^32.
    The order of such a sum does not matter, so the hash is the same on any mesh.
    """
    place = jnp.full(x.shape, origin, jnp.uint32)  # number of each element, counted from `origin`
    for axis, stride in enumerate(strides):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return digest_lib.mixed(bits.astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B1))).sum(dtype=jnp.uint32)
