"""A trained model over prepared text, layer by layer: the queries that its keys meet, and what each layer adds.

The text is cut into windows; a prefix is a window's beginning, up to and with any of its tokens. Windows do not follow
sentences or documents. A prefix is named by one number, window * length + its last position.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis.key_values import Inside
from memoryllm_jax.analysis.vocabulary import checked_dataset
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.legacy import at_least
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.model import transformer

_BATCH = 2048  # positions that run at a time


class State(NamedTuple):
    """A layer at N positions. residual_ND: r, what its update is added to, X_l + Attn_l; output_ND: r + update.

    queries: {"compute": [N, D], "memory": [N, D]} of the FFNs there are.
    """

    residual_ND: jax.Array
    output_ND: jax.Array
    queries: dict[str, jax.Array]


def states(inside: Inside, tokens_BT: np.ndarray):
    """Yields the State of each layer in turn, the positions of B sequences in a row, N = B T."""
    ids, index = np.unique(tokens_BT, return_inverse=True)
    ids = np.pad(ids, (0, bucket(len(ids), tokens_BT.size) - len(ids))).astype(np.int32)
    index_1N = index.reshape(1, -1).astype(np.int32)
    config, params = inside.config, inside.params
    x0_1UD = params["embedding"][ids][None, :, : config.dim]
    x_BTD = x0_1UD[0, index_1N[0]].reshape(*tokens_BT.shape, -1)
    for layer in range(config.layers):
        memory = params["memory"][layer] if config.memory_dim else None
        with jax.set_mesh(inside.mesh):
            state, x_BTD = _layer(config, params["layers"][layer], memory, x_BTD, x0_1UD, index_1N)
        yield state


@functools.partial(jax.jit, static_argnums=0)
def _layer(config, layer, memory, x_BTD, x0_1UD, index_1N):
    """(State of a layer, the residual stream after it [B, T, D])."""

    def by_position(x_BTD):
        return x_BTD.reshape(-1, config.dim)

    queries, rows_1UD = {}, None
    if memory is not None:
        memory_output = transformer.apply_memory_layer(config, memory, x0_1UD)
        rows_1UD = memory_output.row
        queries["memory"] = memory_output.query[0, index_1N[0]]
    rope = transformer.rope_table(config, jnp.arange(x_BTD.shape[1]))
    out = transformer.apply_layer(config, layer, x_BTD, rows_1UD, index_1N, rope)
    if config.compute_dim:
        queries["compute"] = by_position(out.ffn_input_BTD)
    return State(by_position(x_BTD + out.attended_BTD), by_position(out.x_BTD), queries), out.x_BTD


class Corpus:
    """Windows of a split of prepared data.

    Args:
      split: train or validation.  length: tokens of a window.  limit: tokens read, in windows spread evenly; 0: all.
    Raises: UserError.
    """

    def __init__(self, inside: Inside, path: str, split: str, length: int, limit: int):
        at_least({"limit": limit}, 0)
        if split not in ("train", "validation"):
            raise UserError(f"--split: expected train or validation, found {split!r}")
        if not 2 <= length <= inside.trained.context:
            raise UserError(
                f"--length: expected from 2 to the model's {inside.trained.context} positions, found {length}"
            )
        self.path, self.split, self.length = path, split, length
        self._stream = getattr(checked_dataset(inside, path), split)
        windows = (self._stream.tokens - 1) // length
        if not windows:
            raise UserError(f"--data={path}: expected more than {length} {split} tokens, found {self._stream.tokens}")
        count = min(windows, -(-limit // length)) if limit else windows
        self._starts = np.linspace(0, windows - 1, count).astype(np.int64) * length
        self.positions = count * length
        if self.positions >= 1 << 31:
            raise UserError(f"--limit: expected fewer than {1 << 31:,} tokens, found {self.positions:,}")
        self._rows = max(1, min(count, _BATCH // length))

    @property
    def batches(self) -> int:
        return -(-len(self._starts) // self._rows)

    def __iter__(self):
        """Yields (tokens [B, T], labels [B T], real [B T]): positions in a row; what is not real only fills up."""
        for first in range(0, len(self._starts), self._rows):
            at = np.arange(first, first + self._rows)
            kept = np.minimum(at, len(self._starts) - 1)
            tokens_BT = np.stack(self._stream.read_each(list(self._starts[kept]), self.length))
            labels = (at[:, None] * self.length + np.arange(self.length)).reshape(-1)
            yield tokens_BT, labels.astype(np.int32), np.repeat(at < len(self._starts), self.length)

    def prefix(self, label: int) -> np.ndarray:
        """Token ids of a prefix."""
        window, last = divmod(int(label), self.length)
        return self._stream.read(self._starts[window], last + 1)

    def next(self, label: int) -> int:
        """The token that follows a prefix in the text."""
        window, last = divmod(int(label), self.length)
        return int(self._stream.read(self._starts[window] + last + 1, 1)[0])

    def examples(self, count: int, seed: int) -> np.ndarray:
        """Labels of prefixes drawn at random, all different, in order."""
        drawn = np.random.default_rng(seed).choice(self.positions, min(count, self.positions), replace=False)
        return np.sort(drawn)

    def facts(self) -> dict[str, str]:
        read = f"{self.positions:,} of {self._stream.tokens:,} tokens"
        return {"data": f"{self.path}, {self.split}, {read} in windows of {self.length}"}
