"""Passes over many token ids, a chunk at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Chunk(NamedTuple):
    """Consecutive token ids of a pass.

    Attributes:
      start: place of the chunk's first id in the pass.
      ids: int32 [size]. The last chunk is filled up with its last id, so that all chunks have one shape and a function
        of them compiles once.
      count: number of ids without those that fill up the chunk.
    """

    start: int
    ids: np.ndarray
    count: int

    @property
    def stop(self) -> int:
        """Place in the pass after the chunk's last id."""
        return self.start + self.count

    @property
    def real_ids(self) -> np.ndarray:
        """The ids without those that fill up the chunk, int32 [count]."""
        return self.ids[: self.count]


def chunks(ids: np.ndarray, size: int) -> Iterator[Chunk]:
    """Cuts token ids [N] into chunks of `size`."""
    for start in range(0, len(ids), size):
        piece = np.asarray(ids[start : start + size], np.int32)
        yield Chunk(start, np.pad(piece, (0, size - len(piece)), mode="edge"), len(piece))
