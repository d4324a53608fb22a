"""Ids of long texts, by tokenizer libraries that take only short ones: in pieces, with the ids of the whole text.

Where a text is cut, a library that encodes only what follows would add a space (a "dummy prefix"), and could choose
other tokens on both sides. So each piece overlaps its neighbours by CONTEXT characters. A cut is a seam between two
tokens: the library gives the same ids before it whether or not the text goes on. Each piece is compared with what the
library gave around its seams. So a piece whose tokens fall otherwise, as in a run of one character, is noticed and cut
elsewhere.

Two kinds of SentencePiece models are exceptions: Unigram models, whose sums of scores are rounded in long texts and tie
in runs of one character, and models with white space as suffix, in runs without white space.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

# Texts are encoded in pieces of about this many characters, as tiktoken's regular expressions fail on much longer ones
# and SentencePiece takes hundreds of bytes for a character. Llama 3's own tokenizer cuts at the same length.
PIECE_CHARS = 400_000
RUN_CHARS = 25_000  # longest run of white space, or of other characters, that tiktoken can handle
CONTEXT = 1_000  # characters that the library sees on each side of a seam
_TRIES = 64  # places that are tried for a seam, and places where its context may begin

Encode = Callable[[list[str], int], list[list[int]]]  # (texts, threads) -> ids


class _Seam(NamedTuple):
    """A place between two tokens.

    context: position in the text of the first character that the next piece sees.
    end: position after the last character that the piece before the seam sees.
    before: ids from `context` to the seam.
    after: ids from the seam to `end`.
    """

    context: int
    end: int
    before: list[int]
    after: list[int]


_START = _Seam(0, 0, [], [])


def encode_batch(texts: list[str], encode: Encode, threads: int) -> list[list[int]]:
    """The ids of each text.

    Args:
      encode: the library's function for texts of less than PIECE_CHARS characters and without long runs.
      threads: threads of the library.
    """
    seams_of_texts = [_guessed_seams(text, encode) for text in texts]
    pieces = [piece for text, seams in zip(texts, seams_of_texts) for piece in _pieces(text, seams)]
    # One call for the pieces of all texts, so that the threads share the work evenly.
    ids_of_pieces = iter(encode(pieces, threads))
    out = []
    for text, seams in zip(texts, seams_of_texts):
        ids = _joined([next(ids_of_pieces) for _ in range(len(seams) + 1)], seams)
        out.append(_one_by_one(text, encode) if ids is None else ids)
    return out


def _pieces(text: str, seams: list[_Seam]) -> list[str]:
    if not seams:
        return [text]
    starts = [0, *(seam.context for seam in seams)]
    ends = [*(seam.end for seam in seams), len(text)]
    return [text[start:end] for start, end in zip(starts, ends)]


def _joined(ids_of_pieces: list[list[int]], seams: list[_Seam]) -> list[int] | None:
    """The ids of the text, from those of its overlapping pieces; None if a piece is not as its seams expect."""
    out: list[int] = []
    for piece, left, right in zip(ids_of_pieces, [_START, *seams], [*seams, _START]):
        if piece[: len(left.before)] != left.before or not _agree(piece, right):
            return None
        out += piece[len(left.before) : len(piece) - len(right.after)]
    return out


def _agree(piece: list[int], seam: _Seam) -> bool:
    """Whether the ids of a piece end as the seam expects, from the middle of the context on.

    A library may treat the beginning of a context differently, as it does not see what comes before.
    """
    expected = seam.before[len(seam.before) // 2 :] + seam.after
    return piece[len(piece) - len(expected) :] == expected


def _limit(text: str, start: int) -> int | None:
    """Where the piece that begins at `start` must end at the latest; None: it takes the rest of the text."""
    end = min(start + PIECE_CHARS, len(text))
    # A piece of a run overlaps with its neighbours by up to three contexts.
    longest = RUN_CHARS - 3 * CONTEXT
    run = None
    if end - start > RUN_CHARS:
        run = re.compile(rf"\S{{{RUN_CHARS}}}|\s{{{RUN_CHARS}}}").search(text, start, end)
    if run:
        return max(run.start(), start) + longest
    return end if end < len(text) else None


def _guessed_seams(text: str, encode: Encode) -> list[_Seam]:
    """Seams chosen by the text around them alone, so that the pieces can be encoded in parallel."""
    seams, start = [], 0
    while (limit := _limit(text, start)) is not None:
        end = min(limit + CONTEXT, len(text))
        seams.append(_seam(text, limit, end, encode([text[limit - 3 * CONTEXT : end]], 1)[0], encode))
        start = limit
    return seams


def _one_by_one(text: str, encode: Encode) -> list[int]:
    """The ids of a text whose seams depend on all that is before them, such as those in a run of one character."""
    out: list[int] = []
    left = _START
    start = 0
    while (limit := _limit(text, start)) is not None:
        end = min(limit + CONTEXT, len(text))
        ids = encode([text[left.context : end]], 1)[0]
        right = _seam(text, limit, end, ids, encode)
        if right.end < end:  # no seam was found
            ids = encode([text[left.context : right.end]], 1)[0]
        out += ids[len(left.before) : len(ids) - len(right.after)]
        left, start = right, limit
    return out + encode([text[left.context :]], 1)[0][len(left.before) :]


def _seam(text: str, limit: int, end: int, ids: list[int], encode: Encode) -> _Seam:
    """A seam at `limit` or somewhat before.

    Args:
      end: position after the last character that the library sees.
      ids: of a longer part of the text that ends at `end`; those of the seam and its context must be among them.
    Returns: the seam. Where none is found, the text is cut at `limit` without a context, as by Llama 3's own tokenizer.
    """
    for context in range(limit - CONTEXT, limit - CONTEXT - _TRIES, -1):
        window = encode([text[context:end]], 1)[0]
        shared = _shared_end(window, ids)
        if 2 * shared < len(window):
            continue  # all tokens fall otherwise: the context must begin elsewhere
        for cut in _cuts(text, limit):
            before = encode([text[context:cut]], 1)[0]
            seam = _Seam(context, end, before, window[len(before) :])
            if window[: len(before)] == before and len(window) - len(before) // 2 <= shared:
                return seam
    return _Seam(limit, limit, [], [])


def _cuts(text: str, limit: int) -> list[int]:
    """Positions to try, the likeliest first: before white space, where most tokenizers begin a token."""
    first = limit - CONTEXT // 2
    words = [first + match.end() for match in re.finditer(r"\S(?=\s)", text[first : limit + 1])]
    return words[: -_TRIES // 2 : -1] + list(range(limit, limit - _TRIES // 2, -1))


def _shared_end(one: list[int], other: list[int]) -> int:
    """Number of ids at the end of both lists that are the same."""
    count = 0
    for a, b in zip(reversed(one), reversed(other)):
        if a != b:
            break
        count += 1
    return count
