"""The loss of the served model on a text, with and without the changes of a request."""

import hashlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.evaluation.perplexity import Text, Windows
from memoryllm_jax.inference.engine import Contribution, Engine
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.server.changes import Changed
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.recent import Recent
from memoryllm_jax.tol.edited_rows import EditedRows

_MOST_TOKENS = 8192  # of a text that are scored
_POSITIONS = 2048  # of a batch, between which the client is told how far it is, and the work can end
_TEXTS = 64  # whose loss without changes is kept


class Losses(NamedTuple):
    """The loss with and without changes.

    Attributes:
      before, after: nats a token.
      tokens: number of tokens that these are means over.
    """

    before: float
    after: float
    tokens: int


class LossMeter:
    """Measures losses. Only the worker thread calls it.

    Args:
      engine: the model.
      rows: its rows for the worker thread.
    Attributes:
      has_held_out: whether the model's training data is at hand, whose validation split is held out.
    """

    def __init__(self, engine: Engine, rows: RowSource):
        self._engine, self._rows = engine, rows
        first_id = perplexity.first_id(engine)
        self._windows = Windows(engine.context, engine.context, max(_MOST_TOKENS, engine.context), first_id=first_id)
        self._before: Recent[str, float] = Recent(_TEXTS)
        self._held_out: Text | None = None
        self._data = ""
        try:
            self._data = run_data.find_own(engine.trained)
        except UserError as error:
            # Not an error: a model is served without its data too. Requests do not learn paths of the server.
            print(f"no held-out text, so losses are measured on texts of requests alone: {error}", file=sys.stderr)
        self.has_held_out = bool(self._data)

    def measure(self, changed: Changed, text: str | None, begin: Callable[[str], Callable[[float], None]]) -> Losses:
        """The loss on a text, of which the first 8,192 tokens are scored or, if it is longer, one context.

        Args:
          changed: what `after` has and `before` has not.
          text: None: the held-out text.
          begin: begins a part of the work, as `Job.begin`.
        Raises: ApiError.
        """
        opened = self._open(text)
        key = "" if text is None else hashlib.sha256(text.encode()).hexdigest()

        def unchanged():
            return self._loss(Changed(None, Contribution()), opened, begin("scoring the text without the changes"))

        before = self._before.get(key, unchanged, lambda _: 1)
        after = self._loss(changed, opened, begin("scoring the text with the changes"))
        return Losses(before, after, opened.tokens - 1)

    def _loss(self, changed, text, report):
        rows = self._rows
        if changed.overlay is not None:
            rows = EditedRows(rows, changed.overlay, self._engine.trained.mesh)
        model = self._engine.changed(rows, changed.contribution)
        return perplexity.perplexity(model, text, self._windows, report=report, positions=_POSITIONS)["loss"]

    def _open(self, text):
        tokenizer = self._engine.tokenizer
        if text is not None:
            try:
                return perplexity.text_of([text], tokenizer, self._windows, "text")
            except UserError as error:
                raise ApiError(400, str(error), "text") from error
        if not self.has_held_out:
            problem = "expected a text, as the model's training data is not at hand, found null"
            raise ApiError(400, f"text: {problem}", "text")
        if self._held_out is None:
            workdir = self._engine.trained.workdir
            self._held_out = perplexity.prepared_text(self._data, "validation", tokenizer, self._windows, workdir)
        return self._held_out
