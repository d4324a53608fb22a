"""Work on arrays in several threads: NumPy lets go of Python's lock while it computes."""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")

# The work is bound by memory bandwidth, which a few cores use up.
_MOST_THREADS = 16


def in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """[function(item) for item in items], computed in threads. The function must not call this one."""
    return list(_pool().map(function, items))


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "arrays")
