"""Checks of whole files, and comparisons of two."""

import numpy as np
import pytest
from lab import opened
from tol_files import damaged_copy

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol import verify
from memoryllm_jax.tol.rows import HostTable


def test_damaged_row_is_named(lab, tmp_path):
    path = damaged_copy(lab.tol("memory"), 77, tmp_path / "damaged.safetensors")
    with opened(path) as tol:
        assert verify.damaged_tokens(tol) == [77]
        with pytest.raises(UserError, match=rf"{path}: the checksums of 1 of 512 rows differ: tokens #77$"):
            verify.check_file(tol)
        with pytest.raises(UserError, match=f"{path}: token 77: the checksum of its row differs"):
            HostTable(tol)


def test_damaged_tensor_is_named(lab, tmp_path):
    path = damaged_copy(lab.tol("flex-3", bits="32", rank="0.5,1:1.0"), "basis.ffn.0", tmp_path / "basis.safetensors")
    with opened(path) as tol, pytest.raises(UserError, match=rf"{path}: basis\.ffn\.0: its checksum differs"):
        verify.check_file(tol)


def test_comparison_with_the_weights(lab):
    with opened(lab.tol("flex-3", bits="8")) as tol:
        verify.check_file(tol)
        errors = verify.compare_with_weights(tol, lab.workdir("flex-3")).by_part
        assert list(errors) == ["x0", "ffn.0", "ffn.1"] and all(1e-4 < error < 0.01 for error in errors.values())
        with pytest.raises(UserError, match="made for another model"):
            verify.compare_with_weights(tol, lab.workdir("memory"))


def test_files_that_do_not_fit_each_other_are_refused(lab):
    with opened(lab.tol("flex-3")) as tol, opened(lab.tol("tied")) as other:
        with pytest.raises(UserError, match="both with or both without the embedding"):
            verify.compare_files(tol, other)
        same = verify.compare_files(tol, tol)
        assert same.changed == 0 and same.most(3) == [] and not np.any(list(same.by_part.values()))
