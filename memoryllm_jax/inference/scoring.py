"""Log-probabilities of token sequences under a trained model, batched by length.

A causal model needs no mask for what pads a sequence on the right, so sequences of like length share a batch. Shapes as
in model.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference.decoder import Decoder, bucket

_POSITIONS = 8192  # of a batch shard that are scored at a time


class Scores(NamedTuple):
    """Of a sequence's ids but the first: their log-probabilities in nats, and whether each is the likeliest id."""

    log_probs_T: np.ndarray  # float32
    greedy_T: np.ndarray  # bool


def score(
    decoder: Decoder, rows, sequences: Sequence[Sequence[int]], context: int, progress: Progress | None = None
) -> list[Scores]:
    """Scores of sequences of 2 to context + 1 ids, in their order.

    Args:
      rows: where rows of the token memory come from (`decoder.LiveRows`, or one of tol/serve.py).
      progress: counts scored tokens.
    """
    groups: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        if not 2 <= len(sequence) <= context + 1:
            raise ValueError(f"sequence {number}: expected 2 to {context + 1} ids, found {len(sequence)}")
        groups.setdefault(bucket(len(sequence) - 1, context), []).append(number)
    out: list[Scores] = [None] * len(sequences)

    def read(members, log_probs_BT, greedy_BT):
        for number, log_probs_T, greedy_T in zip(members, np.asarray(log_probs_BT), np.asarray(greedy_BT)):
            T = len(sequences[number]) - 1
            out[number] = Scores(log_probs_T[:T], greedy_T[:T])
            if progress:
                progress.update(progress.done + T)

    unread = None  # a batch is read when the next is on its way
    for length, members in sorted(groups.items(), reverse=True):  # what needs most memory comes first
        most = 1 << (-(-len(members) // decoder.shards) - 1).bit_length()
        batch = decoder.shards * min(most, max(1, _POSITIONS // length))
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            found = _score_batch(decoder, rows, [sequences[number] for number in chosen], batch, length)
            if unread:
                read(*unread)
            unread = chosen, *found
    if unread:
        read(*unread)
    return out


def _score_batch(decoder, rows, sequences, batch, length):
    """(log-probabilities, greedy), each [batch, length] on the devices, of which the sequences fill a part."""
    inputs_BT, targets_BT = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for row, sequence in enumerate(sequences):
        T = len(sequence) - 1
        inputs_BT[row] = np.pad(sequence[:-1], (0, length - T), mode="edge")
        targets_BT[row, :T] = sequence[1:]
    inputs_BT[len(sequences) :] = inputs_BT[0]
    ids, index = np.unique(inputs_BT, return_inverse=True)
    ids = np.pad(ids, (0, bucket(len(ids), inputs_BT.size) - len(ids)), mode="edge")
    return decoder.log_probs(rows.fetch(ids), index.reshape(batch, length).astype(np.int32), targets_BT)
