"""A trained model over prepared text, layer by layer: the queries that its keys get, and what each layer adds.

The text is cut into windows, which follow neither sentences nor documents. A prefix is the beginning of a window, up to
and including any of its tokens. It is labelled with one number: window * length + its last position.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report
from memoryllm_jax.data.dataset import Split
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.inference.rows import live_layer
from memoryllm_jax.model import memories, transformer
from memoryllm_jax.model.modules import Norm

Limit = Annotated[int, Option("tokens of text to read, in windows at even distances; 0: all", least=0)]


@dataclasses.dataclass(frozen=True)
class CorpusOptions:
    """The text that a model is run over, and the seed of random draws. Raises: ArgumentError."""

    data: Annotated[str, Option("prepared data of the model's tokenizer; by default what the model was trained on")] = (
        ""
    )
    split: Split = "train"
    length: Annotated[
        int, Option("tokens of the windows that the text is cut into; their beginnings are the prefixes", least=2)
    ] = 64
    limit: Limit = 1 << 20
    seed: Annotated[int, Option("seed of the random draws")] = 0

    def __post_init__(self):
        options.check(self)

    def open(self, model: KeyValueModel) -> "Corpus":
        """Opens the text. Raises: UserError if it does not fit the model."""
        return Corpus(model, self)


@dataclasses.dataclass(frozen=True)
class ExampleOptions(CorpusOptions):
    """The text that prefixes are drawn from at random, and how many are drawn. Raises: ArgumentError."""

    split: Split = "validation"
    limit: Limit = 1 << 16
    examples: Annotated[int, Option("prefixes to draw at random from the text", least=1)] = 4000

    def draw(self, model: KeyValueModel, page: Report) -> tuple["Corpus", np.ndarray]:
        """Opens the text and draws prefixes, which the page's facts name.

        Returns: (the text, labels of the prefixes in rising order). Raises: UserError.
        """
        corpus = self.open(model)
        labels = corpus.examples(self.examples, self.seed)
        page.facts |= corpus.facts() | {"examples": f"{len(labels):,} prefixes drawn at random, seed {self.seed}"}
        return corpus, labels


class Corpus:
    """Windows of a split of prepared data.

    Iterating over it yields batches of windows.

    Attributes:
      length: tokens of a window.
      positions: tokens of all windows.
    Raises: UserError if the windows are longer than the model's context, or the text is shorter than one window.
    """

    def __init__(self, model: KeyValueModel, text: CorpusOptions):
        context = model.trained.context
        if text.length > context:
            raise ArgumentError("length", f"expected from 2 to the model's {context} positions, found {text.length}")
        opened = model.open_data(text.data)
        self.path, self.split, self.length = opened.path, text.split, text.length
        self._stream = getattr(opened, text.split)
        windows = (self._stream.tokens - 1) // text.length  # `next` needs a token after the last window
        if not windows:
            found = f"{self._stream.tokens} in {self.path}"
            raise ArgumentError("data", f"expected more than {text.length} {text.split} tokens, found {found}")
        count = min(windows, -(-text.limit // text.length)) if text.limit else windows
        # At even distances: the first windows alone would come from few documents.
        self._starts = np.linspace(0, windows - 1, count).astype(np.int64) * text.length
        self.positions = count * text.length
        if self.positions >= 1 << 31:  # labels are int32
            raise ArgumentError("limit", f"expected fewer than {1 << 31:,} tokens, found {self.positions:,}")
        self._stream.verify(self._starts.tolist(), text.length + 1)
        self._windows_at_a_time = max(1, min(count, model.sizes.positions // text.length))

    @property
    def batches(self) -> int:
        """How many batches an iteration yields."""
        return -(-len(self._starts) // self._windows_at_a_time)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (tokens [B, T], labels [B T], is_real [B T]).

        A label is that of the prefix which ends at the position. The last batch repeats the last window, marked as not
        real, so that all batches have one shape.
        """
        for first in range(0, len(self._starts), self._windows_at_a_time):
            at = np.arange(first, first + self._windows_at_a_time)
            starts = self._starts[np.minimum(at, len(self._starts) - 1)]
            tokens_BT = np.stack(self._stream.read_each(list(starts), self.length))
            labels = (at[:, None] * self.length + np.arange(self.length)).reshape(-1)
            yield tokens_BT, labels.astype(np.int32), np.repeat(at < len(self._starts), self.length)

    def prefix(self, label: int) -> np.ndarray:
        """The token ids of the prefix with a label."""
        window, last = divmod(int(label), self.length)
        return self._stream.read(self._starts[window], last + 1)

    def next(self, label: int) -> int:
        """The id of the token that follows a prefix in the text."""
        window, last = divmod(int(label), self.length)
        return int(self._stream.read(self._starts[window] + last + 1, 1)[0])

    def examples(self, count: int, seed: int) -> np.ndarray:
        """Labels of `count` different prefixes, drawn at random, in rising order; of all if there are fewer."""
        drawn = np.random.default_rng(seed).choice(self.positions, min(count, self.positions), replace=False)
        return np.sort(drawn)

    def facts(self) -> dict[str, str]:
        """What the facts of a page say of the text."""
        read = f"{self.positions:,} of {self._stream.tokens:,} tokens"
        return {"data": f"{self.path}, {self.split}, {read} in windows of {self.length}"}


class State(NamedTuple):
    """What a layer computes at N positions.

    attended_ND: Attn_l.
    residual_ND: r = X_l + Attn_l, the residual that the FFNs' outputs are added to.
    row_ND: the row of the token memory at each position; None if the model has none.
    output_ND: X_{l+1}, the layer's output.
    queries: {"compute": [N, D], "memory": [N, D]}, the inputs of those FFNs that the model has. "memory" is left out
      where rows were looked up.
    """

    attended_ND: jax.Array
    residual_ND: jax.Array
    row_ND: jax.Array | None
    output_ND: jax.Array
    queries: dict[str, jax.Array]


class TokenVectors(Protocol):
    """What a model reads by token id: computed, as by `KeyValueModel`, or looked up."""

    def x0(self, ids_N: np.ndarray) -> jax.Array:
        """The embeddings of tokens, [N, D]."""

    def rows(self, layer: int, ids_N: np.ndarray) -> jax.Array:
        """The rows of tokens in one layer, [N, D]."""


def states(model: KeyValueModel, tokens_BT: np.ndarray, source: TokenVectors | None = None) -> Iterator[State]:
    """Runs B sequences through the model.

    Args:
      source: embeddings and rows of the tokens; None computes them.
    Yields: the State of each layer in turn, N = B T.
    """
    # FFN-M runs once for each distinct token, as in training.
    ids, index = np.unique(tokens_BT, return_inverse=True)
    # The number of distinct tokens differs by batch. Padded to a power of two, it makes few shapes to compile. A single
    # text is padded to its length, so that all texts of one length have one shape.
    size = bucket(len(ids), tokens_BT.size) if len(tokens_BT) > 1 else tokens_BT.size
    ids = np.pad(ids, (0, size - len(ids)), "edge").astype(np.int32)
    index_1N = index.reshape(1, -1).astype(np.int32)
    config, params = model.config, model.params
    x0_UD = (source or model).x0(ids).astype(config.dtype)
    x_BTD = _take(x0_UD, index_1N[0]).reshape(*tokens_BT.shape, -1)
    if source is None and config.memory_dim:
        x0_UD = memories.of(config).source(ids, x0_UD, model.x0)
    for layer in range(config.layers):
        memory = rows_UD = None
        if source is None and config.memory_dim:
            memory = params["memory"][layer]
        elif layer in config.row_layers:
            rows_UD = (source or model).rows(layer, ids)
        with jax.set_mesh(model.mesh):
            state, x_BTD = _layer(config, params["layers"][layer], memory, x_BTD, x0_UD, rows_UD, index_1N)
        # Layer by layer, so that only one State exists at a time, and a caller who stops here runs no layers above.
        yield state


@functools.partial(jax.jit, static_argnums=0)
def _layer(config, layer, memory, x_BTD, x0_UD, rows_UD, index_1N):
    """Runs one layer.

    Args:
      layer, memory: parameters of the decoder layer and of its FFN-M; the latter is None where it is not run.
      x_BTD: the residual stream before the layer.
      x0_UD: the embeddings that FFN-M reads for the U distinct tokens, where it is run.
      rows_UD: their rows, where FFN-M is not run; None in a model without them.
      index_1N: for each position, which of the distinct tokens it has.
    Returns: (State of the layer, the residual stream after it [B, T, D]).
    """

    def by_position(x_BTD):
        return x_BTD.reshape(-1, config.dim)

    queries = {}
    rows_1UD = None if rows_UD is None else rows_UD[None].astype(config.dtype)  # as one batch shard
    if memory is not None:
        rows_1UD = live_layer(config, memory, x0_UD[None])
        queries["memory"] = Norm(config).apply({"params": memory["norm"]}, x0_UD[index_1N[0]])
    rope = transformer.rope_table(config, jnp.arange(x_BTD.shape[1]))
    out = transformer.apply_layer(config, layer, x_BTD, rows_1UD, index_1N, rope)
    if config.compute_dim:
        queries["compute"] = by_position(out.ffn_input_BTD)
    state = State(
        attended_ND=by_position(out.attended_BTD),
        residual_ND=by_position(x_BTD + out.attended_BTD),
        row_ND=None if rows_1UD is None else rows_1UD[0, index_1N[0]],
        output_ND=by_position(out.x_BTD),
        queries=queries,
    )
    return state, out.x_BTD


@jax.jit
def _take(x_UD, at_N):
    return x_UD[at_N]


def example_states(
    model: KeyValueModel, corpus: Corpus, examples: np.ndarray, label: str
) -> Iterator[tuple[np.ndarray, list[State]]]:
    """Runs the text through the model and picks the positions where the drawn prefixes end.

    Args:
      examples: labels of the prefixes.
      label: name of the progress that is shown.
    Yields: (labels of a batch's N examples, State of each layer). The first N positions of a State are the examples;
      those after them repeat the last one.
    """
    progress = Progress(label, corpus.batches, "batch")
    for number, (tokens_BT, labels, is_real) in enumerate(corpus, 1):
        at = np.flatnonzero(is_real & np.isin(labels, examples))
        if len(at):
            # The number of examples differs by batch. Padded to a power of two, it makes few shapes to compile.
            filled = np.pad(at, (0, bucket(len(at), len(labels)) - len(at)), "edge")
            picked = [positions(state, filled) for state in states(model, tokens_BT)]
            yield labels[at], picked
        progress.update(number)
    progress.close()


@jax.jit
def positions(state: State, at: np.ndarray) -> State:
    """The State at some of its positions."""
    return jax.tree.map(lambda x: x[at], state)
