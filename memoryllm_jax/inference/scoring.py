"""Log-probabilities of token sequences under a trained model, batched by length.

Sequences of similar length share a batch and are padded on the right. The model is causal, so no position sees padding
after it and no mask is needed. Shapes are those of decoder.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference.decoder import Decoder, bucket, next_power_of_two
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.model import bigrams, memories

POSITIONS = 8192  # positions of each batch shard that are scored at a time


class Scores(NamedTuple):
    """Scores of a sequence's ids from the second on.

    Attributes:
      log_probs_T: log-probabilities in nats, float32.
      greedy_T: whether each is the likeliest id, bool.
    """

    log_probs_T: np.ndarray
    greedy_T: np.ndarray


def score(
    decoder: Decoder,
    rows: RowSource,
    sequences: Sequence[Sequence[int]],
    context: int,
    progress: Progress | None = None,
    positions: int = POSITIONS,
) -> list[Scores]:
    """Scores sequences of 2 to context + 1 token ids.

    Args:
      sequences: token ids of each sequence.
      context: most positions of a sequence. The last id is only predicted, so it takes none.
      progress: counts scored tokens.
      positions: positions of each batch shard that are scored at a time; they decide how much memory a batch needs.
    Returns: the scores of each sequence, in the order of `sequences`.
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

    # Reading a batch's scores waits for the device, so the next batch is dispatched first. Long sequences come first,
    # because they need most memory: if it does not suffice, that is known at once.
    unread = None
    for length, members in sorted(members_of_length.items(), reverse=True):
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
    """Sequences of a batch: for each shard the power of two that these sequences need, but at most `most`."""
    needed = -(-sequences // shards)
    return shards * min(next_power_of_two(needed), most)


def _score_batch(decoder, rows, sequences, batch, length):
    """Dispatches one batch of at most `batch` sequences. Returns: `TargetScores` [batch, length] on the device."""
    inputs_BT, targets_BT = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for i, sequence in enumerate(sequences):
        T = len(sequence) - 1
        inputs_BT[i] = np.pad(sequence[:-1], (0, length - T), mode="edge")
        targets_BT[i, :T] = sequence[1:]
    inputs_BT[len(sequences) :] = inputs_BT[0]  # padding repeats ids, so that no more rows are fetched
    fetched, index_BT = _fetch(decoder.config, rows, inputs_BT)
    return decoder.log_probs(fetched, index_BT, targets_BT)


def _fetch(config, rows, inputs_BT):
    """(the rows of the distinct ids, or bigrams, of the inputs; the place of each position's among them)."""

    def padded(ids_U):
        return np.pad(ids_U, (0, bucket(len(ids_U), inputs_BT.size) - len(ids_U)), mode="edge")

    if memories.of(config).by_bigram:
        ids, row_ids, index_BT = bigrams.distinct(inputs_BT, bigrams.row_ids(inputs_BT, config.vocab_size))
        return rows.fetch(padded(ids), padded(row_ids)), index_BT
    ids, index = np.unique(inputs_BT, return_inverse=True)
    return rows.fetch(padded(ids)), index.reshape(inputs_BT.shape).astype(np.int32)
