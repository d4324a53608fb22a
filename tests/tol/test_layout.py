"""What a layout says about its rows."""

import dataclasses
import json

import numpy as np
from tol_files import DIM, LAYERS, VOCAB, mixed, uniform

from memoryllm_jax.tol.layout import Layout


def test_layout_is_the_same_after_json():
    assert Layout.from_json(json.dumps(mixed().to_json()), "file") == mixed()


def test_sizes_of_rows_and_bases():
    layout = mixed()
    assert layout.rows == VOCAB and layout.first_rows == [0, 110]
    assert layout.rotated == {"ffn.0": 89, "ffn.3": 40} and layout.kept_layers() == [0, 1, 2, 3, 5, 6]
    assert layout.stride == max(tier.stride for tier in layout.tiers)
    assert layout.total_bytes - layout.row_bytes == (89 + 40) * DIM * 2


def test_rows_of_one_kind_of_float_are_a_tensor():
    parts = LAYERS + 1
    assert uniform(32).row_type == (np.float32, (parts, DIM))
    assert uniform(16).row_type == (np.uint16, (parts, DIM))
    assert uniform(8).row_type == (np.uint8, (uniform(8).stride,))
    (tier,) = uniform(16).tiers
    rotated = dataclasses.replace(tier, parts=tuple(dataclasses.replace(part, rotated=True) for part in tier.parts))
    assert (tier.float_bits, rotated.float_bits, mixed().tiers[0].float_bits) == (16, 0, 0)


def test_codec_in_words():
    assert [uniform(bits).codec() for bits in (32, 16, 8, 3)] == ["float32", "bfloat16", "int8", "int3"]
    assert mixed().codec() == "float32+bfloat16+int8+int7+int6+int5+int4+int3+int2, low rank"
