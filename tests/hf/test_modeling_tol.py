"""The reader of ToL files in exported models: what is damaged is refused by file and field. It needs PyTorch alone."""

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest


class Opener:
    """Opens copies of a ToL file in which something was changed.

    Attributes:
      raw: the file's content.
      length: bytes of its header.
    """

    def __init__(self, source, folder):
        self.raw = open(source, "rb").read()
        (self.length,) = struct.unpack_from("<Q", self.raw)
        self._path = folder / "changed"

    def open(self, content):
        """A copy with this content."""
        from memoryllm_jax.hf.modeling_tol import Tol

        self._path.write_bytes(content)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 512, "tie_word_embeddings": False}
        return Tol(str(self._path), SimpleNamespace(**sizes))

    def open_earlier(self, keys=(), value=None):
        """A copy as of version 0.1.0, whose header has no checksum, with the value at the end of the keys set.

        The first key is `header`, `metadata` or `layout`.
        """
        header = json.loads(self.raw[8 : 8 + self.length])
        metadata = header["__metadata__"]
        del metadata["header_checksum"]
        tree = {"header": header, "metadata": metadata, "layout": json.loads(metadata["layout"])}
        place = tree
        for key in keys[:-1]:
            place = place[key]
        if keys:
            place[keys[-1]] = value
        metadata["layout"] = json.dumps(tree["layout"])
        text = json.dumps(header).encode()
        return self.open(struct.pack("<Q", len(text)) + text + self.raw[8 + self.length :])


@pytest.fixture
def opener(tol_of, tmp_path):
    pytest.importorskip("torch")
    return Opener(tol_of("memory"), tmp_path)


PART = ("layout", "tiers", 0, "parts", 1)


@pytest.mark.parametrize(
    "keys, value, message",
    [
        (("layout", "layers"), 5_000_000, "layers: expected a whole number from 2 to 2, found 5000000"),
        (("layout", "dim"), 2.0**40, "dim: expected a whole number from 32 to 32, found 1099511627776.0"),
        (("layout", "has_x0"), False, "has_x0: expected True, as the model's embeddings demand, found False"),
        (("layout", "tiers"), {}, "tiers: expected a list, found a dict"),
        (("layout", "tiers", 0, "rows"), -512, "rows: expected a whole number from 1 to 512, found -512"),
        ((*PART, "bands", 0, "bits"), 9, "bits: expected 2 to 8, 16 or 32"),
        ((*PART, "name"), "x0", "parts: expected some of x0 to ffn.1"),
        ((*PART, "bands"), [], "bands: expected 32 elements, found 0"),
        (("header", "rows.0", "shape"), [-512, 96], r"shape\[0\]: expected a whole number from 0"),
        (("header", "checksums", "data_offsets"), [0, 4096], "data_offsets: expected .* first, found 0"),
        (("header", "checksums", "dtype"), "F8", "dtype: expected one of U8, BF16"),
        (("header", "checksums"), None, "checksums: expected an object, found None"),
        (("metadata", "dropped_layers"), "[1]", r"dropped_layers: expected \[\], as in the layout"),
        (("metadata", "dropped_layers"), "[" * 10**5, "dropped_layers: expected JSON, found what cannot"),
        (("metadata", "vocab_size"), "513", "vocab_size: expected 512, found 513"),
        (("metadata", "version"), "2", "version: expected 1, found 2"),
        (("metadata", "step"), 3, "step: expected a text, found 3"),
        (("metadata", "more"), "3", "header_checksum: expected a checksum, found none"),
        (("metadata", "header_checksum"), "", "header_checksum: expected 16 hexadecimal digits, found ''"),
    ],
)
def test_headers_of_other_values_are_refused_by_file_and_field(opener, keys, value, message):
    with pytest.raises(ValueError, match=f"/changed.*{message}"):
        opener.open_earlier(keys, value)


def test_a_file_of_an_earlier_version_opens_and_every_flip_in_a_header_is_found(opener):
    opener.open_earlier()
    opener.open(opener.raw)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, 8 + opener.length, 100):
        flipped = bytearray(opener.raw)
        flipped[at] ^= 1 << rng.integers(8)
        with pytest.raises(ValueError, match="/changed"):
            opener.open(bytes(flipped))


def test_a_damaged_row_is_refused(opener):
    import torch

    start, end = json.loads(opener.raw[8 : 8 + opener.length])["rows.0"]["data_offsets"]
    data = 8 + opener.length
    tol = opener.open(opener.raw[: data + start] + bytes(end - start) + opener.raw[data + end :])
    with pytest.raises(ValueError, match=r"/changed: the row of token 3 is damaged"):
        tol(torch.tensor([[3]]), torch.float32)
