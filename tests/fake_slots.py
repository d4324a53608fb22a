"""Stands in for `inference.slots.Slots` in tests of the scheduler: a model of one line, without JAX.

Its ids are bytes. The token after a sequence is a function of all of its ids, so that a token that reaches the wrong
sequence shows in every later one.
"""

import hashlib
import threading
import time
from typing import NamedTuple

import numpy as np

PIECE = 8


class Bytes:
    """A tokenizer whose ids are bytes."""

    vocab_size = 256

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def after(ids) -> int:
    """The model's token after these ids: a letter, or a byte of one of two characters of two bytes."""
    if ids[-1] == 0xC3:
        return 0xA9 if len(ids) % 2 else 0xAF  # é or ï
    choice = hashlib.sha256(bytes(ids)).digest()[0] % 5
    return b"abc\xc3 "[choice]


def alone(ids, count: int) -> list[int]:
    """The first `count` tokens after these ids."""
    ids = list(ids)
    for _ in range(count):
        ids.append(after(ids))
    return ids[len(ids) - count :]


class Stepped(NamedTuple):
    tokens_B: np.ndarray
    was_taken_B: np.ndarray


class Piece(NamedTuple):
    scores: tuple | None
    token: int | None


class Fake:
    """Slots of a model of one line.

    Attributes:
      log: the calls, as (name, arguments...) tuples.
      untaken: function of a step's number -> whether slot 0 does not take it.
      seconds: that a step takes, so that the event loop runs meanwhile.
      broken: an exception that the next step raises.
    """

    piece = PIECE

    def __init__(self, slots: int = 2, capacity: int = 64, untaken=lambda step: False, seconds: float = 0):
        self.slots, self.capacity, self.untaken, self.seconds = slots, capacity, untaken, seconds
        self.ids: list[list[int] | None] = [None] * slots  # what the cache holds
        self.is_running = [False] * slots
        self.settings = [None] * slots
        self.log: list[tuple] = []
        self.broken = None
        self.steps = 0
        self._may_step = threading.Event()
        self._held_from = None

    def hold(self, steps: int) -> None:
        """Has the engine wait after so many steps in all, until `go`."""
        self._may_step.clear()
        self._held_from = steps

    def go(self) -> None:
        self._held_from = None
        self._may_step.set()

    def begin(self, slot, settings):
        assert not self.is_running[slot]
        self.log.append(("begin", slot))
        self.ids[slot], self.settings[slot] = [], settings

    def prefill(self, slot, ids, start, scores, is_last):
        assert start == len(self.ids[slot]) and 1 <= len(ids) <= PIECE
        self.log.append(("prefill", slot, ids))
        self.ids[slot] += ids
        token = None
        if is_last:
            token = after(self.ids[slot])
            self.ids[slot].append(token)
            self.is_running[slot] = True
        ids = np.array(ids)
        return Piece((-ids.astype(float), ids[:, None] + [1, 2], ids[:, None] - [0.1, 0.2]) if scores else None, token)

    def read_piece(self, prefilled):
        return prefilled

    def step(self):
        if self._held_from is not None and self.steps >= self._held_from:
            assert self._may_step.wait(10)
        if self.broken:
            raise self.broken
        time.sleep(self.seconds)
        self.log.append(("step",))
        self.steps += 1
        drawn_B = np.full(self.slots, -1)
        for slot, ids in enumerate(self.ids):
            takes = self.is_running[slot] and not (slot == 0 and self.untaken(self.steps))
            if takes and len(ids) < self.settings[slot].end:
                drawn_B[slot] = after(ids)
                ids.append(drawn_B[slot])
        return Stepped(drawn_B, drawn_B >= 0)

    def read(self, stepped):
        self.log.append(("read",))
        return stepped

    def end(self, slot):
        self.is_running[slot], self.ids[slot] = False, None
