"""The description of a ToL file."""

import numpy as np
import pytest
from lab import opened
from tol_files import DIM, LAYERS, VOCAB, Reader

from memoryllm_jax.tol import summary


def test_lines_say_what_the_file_holds(mixed_file):
    path, _ = mixed_file
    with opened(path) as tol:
        text = "\n".join(summary.lines(tol))
    assert f"made from flex-3 at step 7, computed in float32: {LAYERS} layers of width {DIM}, {VOCAB} tokens" in text
    assert "with the input embedding\ndropped layers: 4, 6; rows in order of frequency\n" in text
    assert "tier 0: 110 rows of " in text and "tier 1: 190 rows of " in text
    assert "\n    ffn.0  64 at 8 bits + 20 at 5 bits + 5 at 3 bits  in a rotated basis\n" in text


def test_record_holds_the_norms_of_named_tokens(mixed_file):
    path, _ = mixed_file
    with opened(path) as tol:
        (norms,) = summary.token_norms(tol, ("#5",))
        record, without_tokens = summary.record(tol, [norms]), summary.record(tol, [])
    vectors = Reader(path).vectors()
    expected = [np.linalg.norm(vectors[f"ffn.{layer}"][5]) for layer in range(LAYERS)]
    assert record["tokens"] == {5: pytest.approx(expected, rel=1e-5)}
    assert "layout" not in record["metadata"] and record["layout"]["dim"] == DIM
    assert record["size"] == len(Reader(path).content)
    assert "tokens" not in without_tokens
    assert norms.line().startswith("#5 ") and f"row {norms.row}, norms by layer {norms.norms[0]:.3g} " in norms.line()
