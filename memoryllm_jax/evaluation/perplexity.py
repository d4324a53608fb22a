"""Perplexity of a trained model on a stream of tokens, in windows."""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data import dataset, document_starts, documents
from memoryllm_jax.inference import scoring
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.model import loss

_CHUNK = 1 << 20  # tokens read at a time


class Part(NamedTuple):
    """A part of a stream that is cut into windows of its own: a source of a mixture, or all of the stream.

    name: of the source; "": all of the stream.
    start, stop: positions of its first token, and one past its last.
    bytes: size of the text that is predicted.
    """

    name: str
    start: int
    stop: int
    bytes: float

    @property
    def predicted(self) -> int:
        """Number of tokens that are predicted, which are all but the first."""
        return self.stop - self.start - 1


class Text(NamedTuple):
    """A stream of token ids to score.

    read_each: (starts, count) -> list of arrays, `count` int32 ids from each start, fewer at the end of the stream.
    tokens: length of the stream.
    words: number of words in the text that is predicted.
    parts: what is scored of it.
    """

    read_each: Callable
    tokens: int
    words: float
    parts: tuple[Part, ...]


class Span(NamedTuple):
    """Where a window lies in the stream.

    start, stop: positions of its first token, and one past its last.
    skipped: the number of its first targets that an earlier window has scored already.
    """

    start: int
    stop: int
    skipped: int


class Windows(NamedTuple):
    """How a stream is cut into windows, which start every `stride` tokens.

    context: tokens that are predicted in a window, which holds one more: its first token is not predicted.
    max_tokens: how many tokens of the stream are predicted at most; 0: all.
    whole: leave out a last window that is not full.
    first_id: the id that a document begins with, if each document of a window is scored alone, as
      config.data.document_mask trains; None: a window is scored as one text.
    """

    context: int
    stride: int
    max_tokens: int = 0
    whole: bool = False
    first_id: int | None = None

    def used(self, tokens: int, path: str) -> int:
        """The number of tokens, from the start of a stream of `tokens`, that the windows cover.

        Args:
          path: of the text, for the error message.
        Raises: UserError for a stream or `max_tokens` that are too small.
        """
        least = self.context if self.whole else 1
        if tokens - 1 < least:
            raise UserError(f"{path}: expected at least {least + 1} tokens, found {tokens}")
        predicted = min(tokens - 1, self.max_tokens or tokens)
        if predicted < least:
            raise ArgumentError(
                "max_tokens", f"expected 0 or at least {least}, a whole window, found {self.max_tokens}"
            )
        if self.whole:
            predicted -= (predicted - self.context) % self.stride
        return predicted + 1

    def spans(self, tokens: int, first: int = 0) -> Iterator[Span]:
        """Yields the windows of `tokens` tokens of a stream, from position `first` on."""
        start = scored = first  # scored: one past the last token that a window has held
        while scored < first + tokens:
            stop = min(start + self.context + 1, first + tokens)
            # The targets of a window are its tokens from start + 1 on.
            yield Span(start, stop, skipped=max(0, scored - 1 - start))
            scored = stop
            start += self.stride


def first_id(model: Engine, document_mask: bool | None = None) -> int | None:
    """The `first_id` of a model's windows.

    Args:
      document_mask: whether each document of a window is scored alone; None: as the model was trained.
    Raises: ArgumentError if its tokenizer does not show where documents begin.
    """
    if document_mask is None:
        document_mask = model.trained.run.data.document_mask
    if not document_mask:
        return None
    return document_starts.first_id(model.tokenizer, model.trained.workdir, "document_mask")


def perplexity(
    model: Engine,
    text: Text,
    windows: Windows,
    save_tokens: str = "",
    report: Callable[[float], None] | None = None,
    positions: int = scoring.POSITIONS,
) -> dict:
    """Scores a text.

    Args:
      windows: those that `text` was opened with.
      save_tokens: path of a .npy file for the scored ids, int32 [windows, context + 1], or ""; needs `windows.whole`.
      report: called after each batch, as by `Progress`; None: the progress is printed.
      positions: as of `scoring.score`.
    Returns: a record for JSON with loss in nats a token, perplexity of tokens and of words, bits per byte, the numbers
      of tokens, words and bytes that these are means over, and the loss by context; of a mixture also "sources",
      {name: loss, perplexity, bits per byte and tokens of one source}.
    """
    # Sums over all windows, by the number of tokens before the predicted one in its window, or in its document.
    nats_T = np.zeros(windows.context)
    predicted_T = np.zeros(windows.context, np.int64)
    nats_of_parts = np.zeros(len(text.parts))
    saved, spans = [], 0
    for window in scored_windows(model, text, windows, report, positions):
        np.subtract.at(nats_T, window.before_T, window.log_probs_T)
        np.add.at(predicted_T, window.before_T, 1)
        nats_of_parts[window.part] -= window.log_probs_T.sum(dtype=np.float64)
        spans += 1
        if save_tokens:
            saved.append(window.ids)
    if save_tokens:
        buffer = io.BytesIO()
        np.save(buffer, np.stack(saved))
        storage.write_bytes(save_tokens, buffer.getvalue())
    tokens, nats = sum(part.predicted for part in text.parts), float(nats_T.sum())
    text_bytes = sum(part.bytes for part in text.parts)
    result = {
        **loss.quality(nats / tokens, tokens, text_bytes),
        "tokens": tokens,
        "word_perplexity": math.exp(min(nats / max(text.words, 1), 700.0)),  # exp overflows above 709
        "words": round(text.words),
        "bytes": round(text_bytes),
        "windows": spans,
        "context": windows.context,
        "stride": windows.stride,
        "document_mask": windows.first_id is not None,
        "by_context": _by_context(nats_T, predicted_T),
    }
    if any(part.name for part in text.parts):
        result["sources"] = _by_source(text.parts, nats_of_parts.tolist())
    return result


class ScoredWindow(NamedTuple):
    """The scores of the targets of a window that no earlier window has scored.

    part: number of the window's part in `Text.parts`.
    ids: all token ids of the window; the targets are the last ones.
    log_probs_T, before_T: as in `WindowScores`.
    """

    part: int
    ids: np.ndarray
    log_probs_T: np.ndarray
    before_T: np.ndarray


def scored_windows(
    model: Engine,
    text: Text,
    windows: Windows,
    report: Callable[[float], None] | None = None,
    positions: int = scoring.POSITIONS,
) -> Iterator[ScoredWindow]:
    """Scores the windows of a text, one after another. The arguments are those of `perplexity`."""
    spans, part_of = [], []  # the number of the part that each span is of
    for number, part in enumerate(text.parts):
        found = list(windows.spans(part.stop - part.start, part.start))
        spans += found
        part_of += [number] * len(found)
    total = sum(span.stop - span.start - 1 for span in spans)
    progress = Progress("score", total, "token", enabled=report is None, report=report)
    step = max(1, _CHUNK // windows.context)  # windows whose ids are in memory at a time
    for first in range(0, len(spans), step):
        chosen = spans[first : first + step]
        pieces = text.read_each([span.start for span in chosen], windows.context + 1)
        ids = [piece[: span.stop - span.start] for piece, span in zip(pieces, chosen)]
        found = score_windows(model, ids, windows, progress, positions)
        for number, span, of_window, scores in zip(part_of[first:], chosen, ids, found):
            yield ScoredWindow(number, of_window, *(x_T[span.skipped :] for x_T in scores))
    progress.close()


class WindowScores(NamedTuple):
    """Scores of the targets of a window.

    log_probs_T: in nats.
    before_T: the number of tokens that each is predicted from, less one.
    """

    log_probs_T: np.ndarray
    before_T: np.ndarray


def score_windows(
    model: Engine,
    ids: Sequence[np.ndarray],
    windows: Windows,
    progress: Progress | None = None,
    positions: int = scoring.POSITIONS,
) -> Iterator[WindowScores]:
    """Scores windows, each whole or, with `windows.first_id`, document by document.

    Args:
      ids: token ids of each window.
      windows, progress, positions: as of `perplexity` and `scoring.score`.
    """
    texts = [[x] if windows.first_id is None else document_starts.split(x, windows.first_id) for x in ids]
    every = list(itertools.chain.from_iterable(texts))
    scores = iter(scoring.score(model.decoder, model.rows, every, windows.context, progress, positions))
    for of_window in texts:
        found = [next(scores).log_probs_T for _ in of_window]
        yield WindowScores(np.concatenate(found), np.concatenate([np.arange(len(x_T)) for x_T in found]))


def _by_source(parts: Iterable[Part], nats: Iterable[float]) -> dict[str, dict]:
    """The means over each source of a mixture, from its sum of nats."""
    return {
        part.name: loss.quality(of_part / part.predicted, part.predicted, part.bytes) | {"tokens": part.predicted}
        for part, of_part in zip(parts, nats)
    }


def _by_context(nats_T: np.ndarray, predicted_T: np.ndarray) -> list[dict]:
    """Loss after 1, 2, 3 to 4, 5 to 8, ... tokens of the window or document.

    Returns: {"from", "to": tokens before the predicted one, "loss": nats a token, "tokens": predicted} of each part.
    """
    context = int(np.flatnonzero(predicted_T)[-1]) + 1
    starts = [0, *(2**k for k in range((context - 1).bit_length()))]
    stops = [*starts[1:], context]
    nats = np.add.reduceat(nats_T[:context], starts).tolist()
    tokens = np.add.reduceat(predicted_T[:context], starts).tolist()
    return [
        {"from": start + 1, "to": stop, "loss": nats[part] / tokens[part], "tokens": tokens[part]}
        for part, (start, stop) in enumerate(zip(starts, stops))
    ]


def prepared_text(path: str, split: str, tokenizer, windows: Windows, workdir: str = "") -> Text:
    """Opens a split of prepared data, and verifies what is used of it.

    Bytes are in proportion to the tokens used; words are counted in the decoded tokens. The sources of a mixture follow
    one another, whatever their weights, each with windows of its own as in the validation of training.

    Args:
      path: the data, as of `Dataset`.
      split: "train" or "validation".
      tokenizer: the model's, which the data must have been prepared with.
      windows: how the text is cut, and how much of it is used.
      workdir: remembers which file shards are verified; "": nothing does.
    Raises: UserError.
    """
    data = dataset.open_for(path, tokenizer.digest, workdir)
    if data.shares and windows.whole:
        raise ArgumentError("save_tokens", f"expected one folder of prepared data, found the mixture {path}")
    stream = getattr(data, split)
    tokens = windows.used(stream.tokens, path)
    stream.verify([0], tokens)
    parts = []
    for source in data.sources:
        start, length, text_bytes = getattr(source, split)
        stop = min(start + length, tokens)
        if stop - start > 1:
            share = (stop - start - 1) / (length - 1)
            parts.append(Part(source.name if data.shares else "", start, stop, text_bytes * share))
    return Text(stream.read_each, tokens, _count_words(stream, tokens, tokenizer), tuple(parts))


def raw_text(pattern: str, text_key: str, tokenizer, windows: Windows) -> Text:
    """Reads text files as one stream of documents, as `text_of` makes it.

    Args:
      pattern: paths and globs, separated by commas.
      text_key: JSON field or parquet column that holds a document's text.
    Raises: UserError.
    """
    return text_of(_documents(pattern, text_key), tokenizer, windows, pattern)


def text_of(texts: Iterable[str], tokenizer, windows: Windows, name: str) -> Text:
    """One stream of documents, each between bos and eos.

    Bytes and words are in proportion to the tokens used.

    Args:
      texts: the documents. Those past the tokens that are used are not read.
      name: of the text, for the error message.
    Raises: UserError for a text that is empty or too short.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    pieces, tokens, text_bytes, words = [], 0, 0, 0
    for text in texts:
        pieces.append(np.array([*bos, *tokenizer.encode(text), *eos], np.int32))
        tokens += len(pieces[-1])
        text_bytes += len(text.encode())
        words += len(text.split())
        if windows.max_tokens and tokens > windows.max_tokens:
            break
    if not text_bytes:
        raise UserError(f"{name}: expected some text, found none")
    used = windows.used(tokens, name)
    ids = np.concatenate(pieces)
    share = (used - 1) / (tokens - 1)

    def read_each(starts, count):
        return [ids[start : start + count] for start in starts]

    return Text(read_each, used, words * share, (Part("", 0, used, text_bytes * share),))


def _documents(pattern, text_key):
    for path in documents.expand(pattern):
        for text, _ in documents.read(path, text_key):
            yield text


def _count_words(stream, tokens, tokenizer) -> int:
    """Words, separated by white space, in the first `tokens` tokens of a stream."""
    # Decoded document by document, so that no word joins the end of one and the start of the next.
    ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    words, rest = 0, np.empty(0, np.int32)
    for start in range(0, tokens, _CHUNK):
        ids = np.concatenate([rest, stream.read(start, min(_CHUNK, tokens - start))])
        # The last document of the chunk may go on in the next one, so it is counted there.
        *whole, rest = np.split(ids, np.nonzero(np.isin(ids, ends))[0])
        if start + _CHUNK >= tokens:
            whole.append(rest)
        words += sum(len(tokenizer.decode(piece[~np.isin(piece, ends)]).split()) for piece in whole)
    return words


def summary(result: dict) -> str:
    """Two lines for the terminal about a result of `perplexity`, and one for each source of a mixture."""
    lines = [
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.3f}, word perplexity "
        f"{result['word_perplexity']:.2f}, {result['bits_per_byte']:.4f} bits per byte",
        f"{result['tokens']:,} tokens, {result['words']:,} words, {result['bytes']:,} bytes in {result['windows']:,} "
        f"windows of {result['context']}, stride {result['stride']}",
    ]
    for name, found in result.get("sources", {}).items():
        lines.append(
            f"  {name}: loss {found['loss']:.4f} nats a token, perplexity {found['perplexity']:.3f}, "
            f"{found['bits_per_byte']:.4f} bits per byte, {found['tokens']:,} tokens"
        )
    return "\n".join(lines)
