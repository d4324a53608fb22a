"""Reads of single rows: damage, disks that fail, and kernels that read less than asked for."""

import errno
import os

import numpy as np
import pytest
from lab import opened, written
from tol_files import VOCAB, Reader, damaged_copy, file_rows

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.reader import RowReader


def test_flipped_bit_in_a_row_names_its_token(mixed_file, tmp_path):
    reader = Reader(mixed_file[0])
    token = int(reader.tokens(1)[150])
    tol = TolFile(damaged_copy(mixed_file[0], token, tmp_path / "flipped.safetensors"))
    rows = RowReader(tol)
    with pytest.raises(UserError, match=f"{tol.path}: token {token}: the checksum of its row differs"):
        rows.read(np.arange(VOCAB, dtype=np.int32))
    raw, tiers = rows.read(reader.tokens(1)[:150].astype(np.int32))
    np.testing.assert_array_equal(raw[:, : reader.raw(1).shape[1]], reader.raw(1)[:150])
    assert (tiers == 1).all()
    rows.close()
    tol.close()


def test_disk_that_fails_names_token_and_file(lab, monkeypatch):
    path, real = lab.tol("flex-3"), os.preadv
    with lab.model("flex-3", path, cache=1 << 10) as model:
        tol = model.rows.tol
        start = int(tol.start_of_row[tol.row_of_token[77]])

        def preadv(fd, views, at):
            if at <= start < at + sum(map(len, views)):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, views, at)

        monkeypatch.setattr(os, "preadv", preadv)
        assert len(written(model, [[5, 6]], 2)[0]) == 2
        with pytest.raises(UserError, match=f"{path}: token 77: its row cannot be read: Input/output error"):
            written(model, [[5, 77, 200]])


def test_short_reads_are_continued(lab, monkeypatch):
    """A kernel may give fewer bytes than asked for, also in the middle of a row of several read at once."""
    real = os.preadv
    with opened(lab.tol("flex-3")) as tol:
        expected = file_rows(tol)
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][: max(1, len(views[0]) // 3)]], at))
        for name, rows in file_rows(tol).items():
            np.testing.assert_array_equal(rows, expected[name])
