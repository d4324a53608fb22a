"""A cache of the values that were used last, bounded by their sizes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The values that were used last, for any thread. A value larger than all of the room is made each time.

    Args:
      room: most that the sizes of all values come to, in the unit of `size`, such as bytes.
    """

    def __init__(self, room: int):
        self._room, self._used = room, 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K, make: Callable[[], V], size: Callable[[V], int]) -> V:
        """The value of a key, made if it is not here. An error of `make` is passed on, and nothing is kept."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]
        value = make()  # without the lock, as it may take long
        with self._lock:
            if key in self._entries:  # another thread was quicker; all are given the same value
                return self._entries[key][0]
            self._entries[key] = value, size(value)
            self._used += self._entries[key][1]
            while self._used > self._room:
                _, (_, freed) = self._entries.popitem(last=False)
                self._used -= freed
        return value
