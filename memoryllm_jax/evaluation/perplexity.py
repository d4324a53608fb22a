"""Perplexity of a trained model on a stream of tokens, in windows."""

import io
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data import dataset, documents
from memoryllm_jax.inference import scoring
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.model import loss

_CHUNK = 1 << 20  # tokens read at a time


class Text(NamedTuple):
    """A stream of token ids to score.

    read_each: (starts, count) -> `count` int32 ids from each start, fewer at the end of the stream.
    tokens: of the stream.
    bytes, words: of the text that all tokens but the first stand for.
    """

    read_each: Callable
    tokens: int
    bytes: float
    words: float


class Windows(NamedTuple):
    """How a stream is cut: `context` tokens are predicted in each window, and windows start every `stride` tokens.

    max_tokens: to predict at most; 0: all.
    whole: leave out a last window that is not full.
    """

    context: int
    stride: int
    max_tokens: int = 0
    whole: bool = False

    def cut(self, tokens: int, path: str) -> int:
        """Tokens of a stream that are used. Raises: UserError for a stream that is too short."""
        predicted = min(tokens - 1, self.max_tokens or tokens)
        least = self.context if self.whole else 1
        if predicted < least:
            raise UserError(f"{path}: expected at least {least + 1} tokens, found {tokens}")
        if self.whole:
            predicted -= (predicted - self.context) % self.stride
        return predicted + 1

    def spans(self, tokens: int) -> Iterator[tuple[int, int, int]]:
        """(first token, one past the last, number of its targets that are context only) of each window."""
        start = stop = 0
        while stop < tokens:
            before, stop = stop, min(start + self.context + 1, tokens)
            yield start, stop, max(0, before - 1 - start)
            start += self.stride


def perplexity(model: Engine, text: Text, windows: Windows, save_tokens: str = "") -> dict:
    """Scores a text.

    Args:
      save_tokens: path for the [windows, context + 1] ids, int32; needs windows that are whole.
    Returns: loss in nats a token, perplexity of tokens and of words, bits per byte, and what they are counted over.
    """
    spans = list(windows.spans(text.tokens))
    progress = Progress("score", sum(stop - start - 1 for start, stop, _ in spans), "token")
    # By the position of the predicted token in its window: the sum of nats, and the number of tokens.
    nats_T, predicted_T = np.zeros(windows.context), np.zeros(windows.context, np.int64)
    saved = []
    step = max(1, _CHUNK // windows.context)  # windows whose ids are in memory at a time
    for first in range(0, len(spans), step):
        chosen = spans[first : first + step]
        pieces = text.read_each([start for start, _, _ in chosen], windows.context + 1)
        ids = [piece[: stop - start] for piece, (start, stop, _) in zip(pieces, chosen)]
        scores = scoring.score(model.decoder, model.rows, ids, windows.context, progress)
        for (log_probs_T, _), (_, _, skip) in zip(scores, chosen):
            nats_T[skip : len(log_probs_T)] -= log_probs_T[skip:]
            predicted_T[skip : len(log_probs_T)] += 1
        if save_tokens:
            saved += ids
    progress.close()
    if save_tokens:
        buffer = io.BytesIO()
        np.save(buffer, np.stack(saved))
        storage.write_bytes(save_tokens, buffer.getvalue())
    targets, nats = text.tokens - 1, float(nats_T.sum())
    return {
        **loss.quality(nats / targets, targets, text.bytes),
        "tokens": targets,
        "word_perplexity": math.exp(min(nats / max(text.words, 1), 700.0)),  # exp overflows above 709
        "words": round(text.words),
        "bytes": round(text.bytes),
        "windows": len(spans),
        "context": windows.context,
        "stride": windows.stride,
        "by_context": _by_context(nats_T, predicted_T),
    }


def _by_context(nats_T: np.ndarray, predicted_T: np.ndarray) -> list[dict]:
    """Loss after 1, 2, 3 to 4, 5 to 8, ... tokens of the window."""
    context = int(np.flatnonzero(predicted_T)[-1]) + 1
    starts = [0, *(2**k for k in range((context - 1).bit_length()))]
    stops = [*starts[1:], context]
    nats = np.add.reduceat(nats_T[:context], starts).tolist()
    tokens = np.add.reduceat(predicted_T[:context], starts).tolist()
    return [
        {"from": start + 1, "to": stop, "loss": nats[part] / tokens[part], "tokens": tokens[part]}
        for part, (start, stop) in enumerate(zip(starts, stops))
    ]


def prepared_text(path: str, split: str, tokenizer, windows: Windows) -> Text:
    """A split of prepared data.

    Bytes are in proportion to the tokens used; words are those of the decoded tokens. Raises: UserError.
    """
    stream = getattr(dataset.open_for(path, tokenizer.digest), split)
    tokens = windows.cut(stream.tokens, path)
    share = (tokens - 1) / (stream.tokens - 1)
    return Text(stream.read_each, tokens, stream.bytes * share, _count_words(stream, tokens, tokenizer))


def raw_text(pattern: str, text_key: str, tokenizer, windows: Windows) -> Text:
    """Text files as one stream of documents, each between bos and eos.

    Bytes and words are in proportion to the tokens used. Raises: UserError.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    pieces, tokens, text_bytes, words = [], 0, 0, 0
    for text in _documents(pattern, text_key):
        pieces.append(np.array([*bos, *tokenizer.encode(text), *eos], np.int32))
        tokens += len(pieces[-1])
        text_bytes += len(text.encode())
        words += len(text.split())
        if windows.max_tokens and tokens > windows.max_tokens:
            break
    used = windows.cut(tokens, pattern)
    ids, share = np.concatenate(pieces), (used - 1) / (tokens - 1)

    def read_each(starts, count):
        return [ids[start : start + count] for start in starts]

    return Text(read_each, used, text_bytes * share, words * share)


def _documents(pattern, text_key):
    for path in documents.expand(pattern):
        for text, _ in documents.read(path, text_key):
            yield text


def _count_words(stream, tokens, tokenizer) -> int:
    """Words, separated by white space, of the documents that a stream's first tokens hold."""
    ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    words, rest = 0, np.empty(0, np.int32)
    for start in range(0, tokens, _CHUNK):
        ids = np.concatenate([rest, stream.read(start, min(_CHUNK, tokens - start))])
        # The last document may go on in the next chunk, and is counted with it.
        *whole, rest = np.split(ids, np.nonzero(np.isin(ids, ends))[0])
        if start + _CHUNK >= tokens:
            whole.append(rest)
        words += sum(len(tokenizer.decode(piece[~np.isin(piece, ends)]).split()) for piece in whole)
    return words


def summary(result: dict) -> str:
    """Two lines for the terminal, of what `perplexity` returns."""
    return (
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.3f}, word perplexity "
        f"{result['word_perplexity']:.2f}, {result['bits_per_byte']:.4f} bits per byte\n"
        f"{result['tokens']:,} tokens, {result['words']:,} words, {result['bytes']:,} bytes in {result['windows']:,} "
        f"windows of {result['context']}, stride {result['stride']}"
    )
