"""Token ids read by position: over borders of file shards, from many files and threads, and from damaged files."""

import concurrent.futures
import os
import resource

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.stream import Tokens
from memoryllm_jax.data.verification import FileShard, Verification


@pytest.fixture
def make(tmp_path):
    """make([3, 0, 5]) returns a Tokens over files of so many ids 0, 1, 2, ..., which are uint16 and uint32 in turn."""

    def make(counts):
        shards, start = [], 0
        for number, count in enumerate(counts):
            dtype = np.dtype(("<u2", "<u4")[number % 2])
            path = str(tmp_path / f"{number}.bin")
            np.arange(start, start + count).astype(dtype).tofile(path)
            shards.append(FileShard(path, LocalFileSystem(), path, dtype, count, "", ""))
            start += count
        return Tokens(shards, 0, 0, start, Verification())

    return make


@pytest.mark.parametrize("counts", [[40], [3, 0, 5, 0, 0, 32], [0, 39, 1, 0]])
def test_ranges_are_those_of_the_whole_stream(make, counts):
    tokens, whole = make(counts), np.arange(40)
    starts = list(range(42))
    for count in (1, 7, 40):
        for start, ids in zip(starts, tokens.read_each(starts, count), strict=True):
            assert ids.dtype == np.int32
            np.testing.assert_array_equal(ids, whole[start : start + count])


def test_more_files_than_a_process_may_open_are_read_by_several_threads(make):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 150  # 64 windows at a time, and a quarter of all stays open
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limit[1]))
    try:
        tokens = make([2] * (few + 100))
        draw = np.random.default_rng(0)
        orders = [draw.permutation(tokens.tokens).tolist() for _ in range(3)]
        for order in orders:  # one after the other, as each may have 64 files open
            np.testing.assert_array_equal(np.concatenate(tokens.read_each(order, 1)), order)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for start, ids in enumerate(pool.map(lambda start: tokens.read(start, 3), range(tokens.tokens - 3))):
                np.testing.assert_array_equal(ids, np.arange(start, start + 3))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_a_file_that_is_cut_short_or_removed_while_it_is_read_is_named(make, tmp_path):
    tokens = make([8, 8])
    tokens.read(0, 16)  # opens both files
    os.truncate(tmp_path / "1.bin", 18)
    np.testing.assert_array_equal(tokens.read(10, 2), [10, 11])  # what is left can be read
    with pytest.raises(UserError, match=r"/1\.bin: expected 32 bytes, as when it was opened, found 18$"):
        tokens.read_each([0, 8], 8)
    tokens = make([8, 8])
    os.remove(tmp_path / "0.bin")
    with pytest.raises(UserError, match=r"/0\.bin: cannot be opened: No such file or directory$"):
        tokens.read(0, 8)
