"""Passes over many token ids, a chunk at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Chunk(NamedTuple):
    """Consecutive token ids of a pass.

    Attributes:
      start: of the chunk in the pass.
      ids: int32 [size]; the last chunk repeats its last id, so that all chunks have one shape and compile once.
      count: ids that are not such repeats.
    """

    start: int
    ids: np.ndarray
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def real_ids(self) -> np.ndarray:
        """int32 [count]: without repeats."""
        return self.ids[: self.count]


def chunks(ids: np.ndarray, size: int) -> Iterator[Chunk]:
    """The token ids in chunks of `size`."""
    for start in range(0, len(ids), size):
        piece = np.asarray(ids[start : start + size], np.int32)
        yield Chunk(start, np.pad(piece, (0, size - len(piece)), mode="edge"), len(piece))
