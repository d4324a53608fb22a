"""Looks into the served model, with the parameters that its engine holds.

Call `token` and `position` in one thread. `nearest` and `key` pass over the vocabulary: call them in one other thread.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import views
from memoryllm_jax.analysis.key_values import KeyValueModel, Parameters
from memoryllm_jax.analysis.neighbours import neighbours_of
from memoryllm_jax.analysis.vocabulary import key_triggers
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.tokenizer import token_texts
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.tol.cached_rows import CachedRows
from memoryllm_jax.tol.edited_rows import EditedRows
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.rows import FileRows
from memoryllm_jax.tol.sources import FileSource, Repair, gives_rows

# The rows of all tokens are kept on the device if they take at most this much: a second search for neighbours is then a
# product with them. Larger ones are computed or read again for each search.
KEPT_BYTES = 256 << 20

_PREPARED = 256  # positions of the longest text that is prepared for: on a CPU, longer ones take seconds

Begin = Callable[..., views.Report]  # begins a part of the work, as `Job.begin`


def _unreported(doing: str, is_kept: bool = False) -> views.Report:
    """In place of `Job.begin`, where nobody waits."""
    return lambda done: None


class _Fetched:
    """Embeddings and rows that a source fetches, as `TokenVectors`.

    Args:
      fetch: gets ids [N]; returns their embeddings [N, D] and a sequence by layer of their rows [N, D], or None for a
        layer that is dropped.
    """

    def __init__(self, fetch: Callable[[np.ndarray], tuple[jax.Array, Sequence[jax.Array | None]]]):
        self._fetch = fetch
        self._last: tuple[bytes, tuple] = (b"", ())

    def _of(self, ids_N):
        """What was fetched for ids. The last result is kept, as layers are asked for one after another."""
        ids_N = np.asarray(ids_N, np.int32)
        last = self._last
        if last[0] != ids_N.tobytes():
            last = self._last = ids_N.tobytes(), self._fetch(ids_N)
        return last[1]

    def forget(self) -> None:
        """Frees the last result."""
        self._last = (b"", ())

    def x0(self, ids_N: np.ndarray) -> jax.Array:
        return self._of(ids_N)[0]

    def rows(self, layer: int, ids_N: np.ndarray) -> jax.Array:
        return self._of(ids_N)[1][layer]


class Looker:
    """Looks into a model.

    Args:
      engine: the model.
      rows: its rows for the worker thread.
      params: its parameters, which others may share.
    Attributes:
      has_rows: whether tokens have rows, which the views of a token and of its neighbours show.
      keeps_rows: whether the rows of all tokens are kept, so that all searches for neighbours but the first are quick.
    """

    def __init__(self, engine: Engine, rows: RowSource, params: Parameters):
        self._engine, self._params = engine, params
        self._model = KeyValueModel(engine.trained, params)
        self.config, self.tokenizer, self.context = engine.config, engine.tokenizer, engine.context
        self.has_rows = engine.config.row_dim > 0
        self._rows = rows
        self._source = _Fetched(functools.partial(_fetch, rows))
        self._kept: dict[tuple[int, int], jax.Array] = {}
        size = 4 * self.config.vocab_size * len(self.config.row_layers) * self.config.row_dim
        self.keeps_rows = size <= KEPT_BYTES
        self._is_checked = False  # whether FFN-M is that of the file's rows

    @functools.cached_property
    def _file(self) -> FileSource | None:
        """Reads the rows of a whole file, which would push those of texts out of a cache; None if there is no cache."""
        rows = self._engine.rows
        return FileSource(rows.tol, Repair(self._engine.trained, rows.tol)) if isinstance(rows, CachedRows) else None

    @functools.cached_property
    def _passing(self) -> _Fetched:
        """Rows for passes over the vocabulary."""
        return _Fetched(functools.partial(_fetch, self._engine.rows) if self._file is None else self._read)

    @functools.cached_property
    def _in_order(self) -> np.ndarray:
        """All token ids, in the order of the file's rows, so that neighbouring rows are read together."""
        return self._model.every_id if self._file is None else self._engine.rows.tol.token_of_row()

    def _read(self, ids_N):
        vectors = self._file.vectors(ids_N)
        return vectors.get("x0"), [vectors[f"ffn.{layer}"] for layer in range(self.config.layers)]

    def preparations(self) -> Iterator[Callable[[], object]]:
        """What takes seconds at its first use, as calls to make one after another: token texts, and compilation.

        The views are compiled for as many tokens as the page shows. Weights that the engine does not hold are not read
        for it.
        """
        yield lambda: self._folded
        # A request that came meanwhile waits for one call, so the quick ones are first.
        if self.has_rows and not self._params.missing:
            yield lambda: self.token(0, 5, _unreported)
        for length in sorted({bucket(at, self.context) for at in range(1, min(self.context, _PREPARED) + 1)}):
            yield functools.partial(self.position, [0] * length, length - 1, 3, _unreported)

    def pass_preparations(self) -> Iterator[Callable[[], object]]:
        """The `preparations` of passes over the vocabulary, for the thread that makes them."""
        if self.config.memory_dim and not self._params.missing:
            yield lambda: self.key(0, 0, 12, _unreported)
        if self.has_rows:
            # All chunks have one shape, so that one is enough.
            ids = self._in_order[: self._model.sizes.tokens]
            yield lambda: self._find_nearest(0, None, 12, ids, _unreported)

    # Texts

    @functools.cached_property
    def _folded(self) -> list[str]:
        """The texts of all tokens, without the difference of upper and lower case."""
        return [text.casefold() for text in self._texts]

    @functools.cached_property
    def _texts(self) -> list[str]:
        """The texts of all tokens, as `shown` gives them."""
        return [self._spelled(token, text) for token, text in enumerate(self._model.texts)]

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        return {token: spelling for spelling, token in self.tokenizer.special_tokens.items()}

    def _spelled(self, token, text):
        """The text of a token; a special token, which has none, by its spelling, as completions name it."""
        return self._special.get(token, text) if text == f"#{token}" else text

    def shown(self, token: int) -> dict:
        """{"id", "text"} of a token."""
        return {"id": int(token), "text": self._text(int(token))}

    def _text(self, token):
        texts = self.__dict__.get("_texts")  # not those that still have to be made
        return texts[token] if texts else self._spelled(token, token_texts(self.tokenizer, [token])[0])

    def search(self, query: str, limit: int) -> tuple[list[int], int]:
        """Finds tokens by #ID or by a part of their text as pages show it; spaces may be written as such.

        Tokens whose text is the query come first, then those that begin with it, then others that hold it, then those
        that hold it if upper and lower case count as equal. Each group is in the order of ids.

        Args:
          query: "" finds all tokens.
          limit: most tokens to return.
        Returns: (ids, number of tokens found).
        """
        texts = self._texts
        wanted = query.replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t")
        groups: list[list[int]] = [[], [], [], []]
        number = query[1:] if query.startswith("#") else ""
        if number.isdecimal() and len(number) < 12 and int(number) < len(texts):
            groups[0].append(int(number))
        folded = wanted.casefold()
        for token, (text, without_case) in enumerate(zip(texts, self._folded)):
            if folded in without_case:
                if text == wanted:
                    groups[0].append(token)
                elif text.startswith(wanted):
                    groups[1].append(token)
                else:
                    groups[2 if wanted in text else 3].append(token)
        found = list(dict.fromkeys(token for group in groups for token in group))
        return found[:limit], len(found)

    # Views

    def token(self, token: int, top: int, begin: Begin) -> list[views.TokenLayer]:
        """Looks at a token's rows. `begin` begins a part of the work, as `Job.begin`. Raises: UserError."""
        self._read_weights(begin)
        with jax.default_matmul_precision("highest"):
            return views.token(self._model, self._source, token, top, begin(""))

    def position(
        self, ids: list[int], at: int, top: int, begin: Begin, overlay: Overlay | None = None
    ) -> views.Position:
        """Looks at a position of a text, by the model with the edits of `overlay`. Raises: UserError."""
        source = self._source
        if overlay is not None:
            source = _Fetched(functools.partial(_fetch, EditedRows(self._rows, overlay, self._model.mesh)))
        with jax.default_matmul_precision("highest"):
            return views.position(self._model, source, ids, at, top, begin(""))

    def nearest(self, token: int, layer: int | None, top: int, begin: Begin) -> list[tuple[int, float]]:
        """The tokens with the most similar rows in a layer, or in all layers together: (id, cosine).

        Raises: UserError.
        """
        return self._find_nearest(token, layer, top, self._in_order, begin)

    def _find_nearest(self, token, layer, top, ids_N, begin):
        layers = self.config.row_layers if layer is None else [layer]
        queries = np.array([token], np.int32)
        top = min(top, self.config.vocab_size - 1)
        try:
            with jax.default_matmul_precision("highest"):
                near = neighbours_of(self._model, self._vectors, layers, queries, ids_N, top, report=begin(""))
        finally:
            self._passing.forget()  # the rows of a whole chunk
        # The last entry is that of all layers together.
        return list(zip(near.ids[-1, 0].tolist(), near.cosines[-1, 0].tolist()))

    def key(self, layer: int, key: int, top: int, begin: Begin) -> list[tuple[int, float]]:
        """The tokens with the largest coefficients of a key of FFN-M, on the side of the largest one: (id, c)."""
        self._read_weights(begin)
        total = self._model.chunk_count(self.config.vocab_size)
        report, done = begin(""), 0

        def step():
            nonlocal done
            done += 1
            report(done / total)

        with jax.default_matmul_precision("highest"):
            found = key_triggers(self._model, layer, np.array([key]), top, step)
        pairs = zip(found.labels_Kt[0].tolist(), found.c_Kt[0].tolist())
        return [(token, c) for token, c in pairs if token >= 0]

    def _read_weights(self, begin):
        """Reads what the engine does not hold: with a ToL file, FFN-M and an untied embedding. They are kept.

        Raises: UserError if the rows of the file come from other weights: their keys would not be those of the rows.
        """
        self._params.read(begin("reading the weights of FFN-M", is_kept=True))
        rows, trained = self._engine.rows, self._engine.trained
        if isinstance(rows, FileRows) and not self._is_checked:
            begin("checking the weights of FFN-M", is_kept=True)
            found = trained.digest(functools.partial(gives_rows, trained), self._params)
            if found != rows.tol.metadata["rows_digest"]:
                expected = f"expected the weights that the rows of {rows.tol.path} were made from"
                raise UserError(f"{trained.workdir}, step {trained.step}: {expected}, found others")
            self._is_checked = True

    def _vectors(self, layer: int, ids_N: np.ndarray) -> jax.Array:
        """Rows for a search, whose chunks are the same each time. float32, as cosines in bfloat16 would tie."""
        place = layer, int(ids_N[0])
        if len(ids_N) > 1 and place in self._kept:
            return self._kept[place]
        rows_ND = self._passing.rows(layer, ids_N).astype(jnp.float32)
        if len(ids_N) > 1 and self.keeps_rows:
            self._kept[place] = rows_ND
        return rows_ND

    def close(self) -> None:
        """Ends the threads that read rows."""
        if self.__dict__.get("_file"):
            self._file.close()


def _fetch(rows: RowSource, ids_N):
    x0_1ND, of_layers = rows.fetch(ids_N)
    return x0_1ND[0], _WithoutShards(of_layers)


class _WithoutShards(Sequence):
    """Rows [1, N, D] by layer as [N, D]. A layer's rows may be computed when they are asked for."""

    def __init__(self, of_layers: Sequence[jax.Array] | None):
        self._of_layers = of_layers

    def __len__(self):
        return len(self._of_layers)

    def __getitem__(self, layer):
        return self._of_layers[layer][0]
