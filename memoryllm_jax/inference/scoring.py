"""Log-probabilities of token sequences under a trained model, batched by length.

A causal model needs no mask for what pads a sequence on the right, so sequences of similar length share a batch. Shapes
as in decoder.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference.decoder import Decoder, bucket
from memoryllm_jax.inference.rows import RowSource

_POSITIONS = 8192  # scored at a time, in one batch shard


class Scores(NamedTuple):
    """The log-probabilities in nats of a sequence's ids from the second on, and whether each is the likeliest id."""

    log_probs_T: np.ndarray  # float32
    greedy_T: np.ndarray  # bool


def score(
    decoder: Decoder,
    rows: RowSource,
    sequences: Sequence[Sequence[int]],
    context: int,
    progress: Progress | None = None,
    positions: int = _POSITIONS,
) -> list[Scores]:
    """Scores sequences of 2 to context + 1 token ids. Returns: their scores, in their order.

    Args:
      context: positions that a sequence may have; the last id is only predicted.
      progress: counts scored tokens.
      positions: of a batch shard that are scored at a time, which decides how much memory a batch needs.
    Raises: ArgumentError for a sequence that is too short or too long.
    """
    members_of_length: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        if not 2 <= len(sequence) <= context + 1:
            problem = f"expected 2 to {context + 1} ids in each, found {len(sequence)} in sequence {number}"
            raise ArgumentError("sequences", problem)
        members_of_length.setdefault(bucket(len(sequence) - 1, context), []).append(number)
    out: list[Scores] = [None] * len(sequences)

    def read(members, scores):
        log_probs_BT, greedy_BT = np.asarray(scores.log_probs), np.asarray(scores.is_likeliest)
        for number, log_probs_T, greedy_T in zip(members, log_probs_BT, greedy_BT):
            T = len(sequences[number]) - 1
            out[number] = Scores(log_probs_T[:T], greedy_T[:T])
            if progress:
                progress.update(progress.done + T)

    # To read a batch is to wait for it, so the next is dispatched first.
    unread = None
    for length, members in sorted(members_of_length.items(), reverse=True):  # what needs most memory comes first
        batch = _batch_size(len(members), decoder.shards, max(1, positions // length))
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            scores = _score_batch(decoder, rows, [sequences[number] for number in chosen], batch, length)
            if unread:
                read(*unread)
            unread = chosen, scores
    if unread:
        read(*unread)
    return out


def _batch_size(sequences, shards, most):
    """Sequences of a batch: a power of two for each shard, no larger than these sequences need, or `most` if less."""
    needed = -(-sequences // shards)
    return shards * min(1 << (needed - 1).bit_length(), most)


def _score_batch(decoder, rows, sequences, batch, length):
    """Scores [batch, length], on the devices. The sequences come first; the rest fills up the shape."""
    inputs_BT, targets_BT = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for i, sequence in enumerate(sequences):
        T = len(sequence) - 1
        inputs_BT[i] = np.pad(sequence[:-1], (0, length - T), mode="edge")
        targets_BT[i, :T] = sequence[1:]
    inputs_BT[len(sequences) :] = inputs_BT[0]  # ids that are there already need no rows of their own
    ids, index = np.unique(inputs_BT, return_inverse=True)
    ids = np.pad(ids, (0, bucket(len(ids), inputs_BT.size) - len(ids)), mode="edge")
    return decoder.log_probs(rows.fetch(ids), index.reshape(batch, length).astype(np.int32), targets_BT)
