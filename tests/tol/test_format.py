"""The ToL file as docs/tol.md specifies it, read back by a reader that shares no code with the package."""

import copy
import itertools
import json
import os
import re
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import xxhash
from lab import opened
from tol_files import CHUNK, DIM, LAYERS, TYPES, VOCAB, Reader, Source, bfloat16, missed_flips, more, sealed, uniform

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol import build, verify
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.memory import FileMemory
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.sources import FileSource


def test_float32_rows_are_one_exact_tensor(tokenizer, tmp_path):
    path, source, order = str(tmp_path / "f32.safetensors"), Source(tokenizer), np.arange(VOCAB)[::-1]
    build.build(source, uniform(32), path, order, chunk_rows=CHUNK)
    expected = np.stack([source.table[name] for name in ("x0", *(f"ffn.{i}" for i in range(LAYERS)))], 1)[order]
    loaded = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(loaded["rows.0"], expected)
    assert loaded["rows.0"].dtype == np.float32
    with safetensors.safe_open(path, "numpy") as file:
        np.testing.assert_array_equal(file.get_slice("rows.0")[17:19], expected[17:19])
        assert file.metadata() == Reader(path).meta
    for name, rows in Reader(path).vectors().items():
        np.testing.assert_array_equal(rows, source.table[name])
    assert bytes(loaded["tokenizer"]) == tokenizer.content


def test_bfloat16_rows_round_as_numpy_and_hold_no_x0(tokenizer, tmp_path):
    path, source = str(tmp_path / "bf16.safetensors"), Source(tokenizer, has_x0=False)
    build.build(source, uniform(16, has_x0=False, layers=[0, 1, 2, 3, 5, 6]), path, np.arange(VOCAB), chunk_rows=CHUNK)
    reader = Reader(path)
    assert reader.header["rows.0"]["dtype"] == "BF16" and reader.header["rows.0"]["shape"] == [VOCAB, 6, DIM]
    assert json.loads(reader.meta["dropped_layers"]) == [4]
    assert json.loads(reader.meta["kept_layers"]) == [0, 1, 2, 3, 5, 6]
    vectors = reader.vectors()
    assert sorted(vectors) == [f"ffn.{layer}" for layer in range(LAYERS)] and not vectors.pop("ffn.4").any()
    for name, rows in vectors.items():
        np.testing.assert_array_equal(rows, source.table[name].astype(ml_dtypes.bfloat16).astype(np.float64))


def test_tensors_fill_the_file_without_gaps(mixed_file):
    reader = Reader(mixed_file[0])
    spans = sorted(entry["data_offsets"] for entry in reader.header.values())
    assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert reader.start + spans[-1][1] == len(reader.content)


def test_tensors_and_tiers_are_aligned(mixed_file):
    reader = Reader(mixed_file[0])
    assert reader.start % 4096 == reader.at("rows.0") % 4096 == reader.at("rows.1") % 4096 == 0
    assert "padding.1" in reader.header  # 110 rows do not end where the next tier may begin
    assert all(reader.at(name) % np.dtype(TYPES[e["dtype"]]).itemsize == 0 for name, e in reader.header.items())


def test_file_holds_the_order_counts_bases_and_tokenizer_it_was_built_with(mixed_file, tokenizer):
    reader, extra = Reader(mixed_file[0]), more()
    np.testing.assert_array_equal(reader.tensor("row_of_token")[extra["order"]], np.arange(VOCAB))
    np.testing.assert_array_equal(reader.tensor("counts"), extra["counts"])
    for name, basis in extra["bases"].items():
        np.testing.assert_array_equal(
            bfloat16(reader.tensor(f"basis.{name}")), basis.astype(ml_dtypes.bfloat16).astype(np.float64)
        )
    assert reader.tensor("tokenizer").tobytes() == tokenizer.content
    assert reader.meta["tokenizer_digest"] == tokenizer.digest


def test_metadata_names_version_model_and_layers(mixed_file):
    meta = Reader(mixed_file[0]).meta
    assert (meta["version"], meta["vocab_size"], meta["step"]) == ("1", str(VOCAB), "7")
    assert (meta["dropped_layers"], meta["kept_layers"]) == ("[4, 6]", "[0, 1, 2, 3, 5, 6]")


def test_each_row_has_its_checksum(mixed_file):
    reader = Reader(mixed_file[0])
    rows = [row.tobytes() for tier in range(2) for row in reader.raw(tier)]
    assert [xxhash.xxh3_64_intdigest(row) for row in rows] == reader.tensor("checksums").tolist()


def test_example_in_the_specification_reads_a_file(mixed_file):
    path, _ = mixed_file
    with open(os.path.join(os.path.dirname(__file__), "..", "..", "docs", "tol.md"), encoding="utf-8") as file:
        (example,) = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    space = {}
    exec(example, space)  # defines the class Tol
    tol, ours = space["Tol"](path), Reader(path).vectors()
    for token in (0, 5, 123, VOCAB - 1):
        row = tol.row(token)
        for name, vectors in ours.items():
            np.testing.assert_allclose(row.get(name, np.zeros(DIM)), vectors[token], rtol=1e-5, atol=1e-5)


def rewritten(reader, change):
    """The file's bytes with the header as `change(header)` leaves it, and the right checksum of this header."""
    header = copy.deepcopy({"__metadata__": reader.meta} | reader.header)
    change(header)
    return sealed(header) + reader.content[reader.start :]


def with_metadata(**values):
    return lambda reader: rewritten(reader, lambda header: header["__metadata__"].update(values))


def with_bytes(position, new):
    """Damage that puts `new` at the byte `position(reader)`."""

    def damage(reader):
        at = position(reader)
        return reader.content[:at] + new + reader.content[at + len(new) :]

    return damage


def one_row_twice(reader):
    at = reader.at("row_of_token")
    return reader.content[: at + 4] + reader.content[at : at + 4] + reader.content[at + 8 :]


def other_part(reader):
    """Renames a layer's part to a layer that the model does not have."""
    text = reader.meta["layout"].replace('"ffn.1"', '"ffn.9"')
    return with_metadata(layout=text)(reader)


def with_layout(change):
    """Damage to the tree of the layout, by `change(tree)`."""

    def damage(reader):
        tree = json.loads(reader.meta["layout"])
        change(tree)
        return with_metadata(layout=json.dumps(tree))(reader)

    return damage


def part(tree):
    """The first rotated part of the layout `mixed`."""
    return tree["tiers"][0]["parts"][1]


def with_entry(name, **values):
    return lambda reader: rewritten(reader, lambda header: header[name].update(values))


@pytest.mark.parametrize(
    "damage, found",
    [
        (lambda reader: reader.content[:-1], "truncated"),
        (lambda reader: reader.content[: reader.start - 9], "expected a ToL file"),
        (lambda reader: b"", "expected a ToL file"),
        (with_bytes(lambda reader: 0, b"\xff" * 8), "expected a ToL file"),
        (with_bytes(lambda reader: 8, b"garbage\xff"), "expected a ToL file"),
        (lambda reader: sealed(dict(reader.header, __metadata__={})) + reader.content[reader.start :], "a ToL file of"),
        (lambda reader: rewritten(reader, lambda header: header.pop("checksums")), "expected its data to begin"),
        (one_row_twice, "row_of_token"),
        (with_bytes(lambda reader: reader.at("row_of_token"), b"\xff" * 4), "row_of_token"),
        (with_metadata(version="2"), "version '2'"),
        (with_metadata(format="memoryllm_overlay"), "memoryllm_overlay"),
        (with_metadata(step="7.5"), "step: expected int, found float"),
        (with_metadata(vocab_size="301"), "vocab_size: expected 300, the rows of the layout, found 301"),
        (with_metadata(vocab_size=str(2**40)), "vocab_size: expected int <= 2147483647, found 1099511627776"),
        (with_metadata(tensor_checksums="[]"), "tensor_checksums: expected object, found array"),
        (with_metadata(tensor_checksums="{}"), "tensor_checksums: expected one for each of 5 tensors"),
        (with_metadata(decoder_digest="x"), "decoder_digest: expected hexadecimal digits, found 'x'"),
        (
            with_metadata(dropped_layers="[]"),
            "dropped_layers: expected 2 layers, as many as some tier",
        ),
        (with_metadata(dropped_layers="[4, 5]"), "dropped_layers: expected [4, 6], as in the layout, found [4, 5]"),
        (with_metadata(kept_layers="null"), "kept_layers: expected array, found null"),
        (with_metadata(layout="[" * 50_000), "layout: "),
        (other_part, "layout: tiers[0]: expected x0 and then layers upwards, each once, found ffn.2"),
        (with_layout(lambda tree: tree.update(layers=6)), "layout: tiers[0]: expected layers below 6, found ffn.6"),
        (with_layout(lambda tree: tree.update(layers=5_000_000)), "layout: layers: expected int <= 4096"),
        (with_layout(lambda tree: tree.update(dim=96.0)), "layout: dim: expected int, found float"),
        (with_layout(lambda tree: tree.update(tiers=None)), "layout: tiers: expected array, found null"),
        (with_layout(lambda tree: tree.update(tiers=tree["tiers"] * 33)), "tiers: expected array of length <= 64"),
        (with_metadata(codec=" " * (16 << 20)), "expected a ToL file with a header of at most 16777216 bytes, found "),
        (with_layout(lambda tree: tree["tiers"][0].update(rows=111)), "found 300"),
        (with_layout(lambda tree: tree["tiers"][1].update(rows=-190)), "tiers[1].rows: expected int >= 1"),
        (with_layout(lambda tree: part(tree).update(bands=[])), "expected array of length >= 1"),
        (with_layout(lambda tree: part(tree).update(rotated=False)), "ffn.0: expected 96 elements, found 89"),
        (with_layout(lambda tree: part(tree).update(name="x0")), "each once, found x0 too late"),
        (with_layout(lambda tree: part(tree)["bands"][0].update(bits=9)), "bits: expected a known value, found '9'"),
        (with_layout(lambda tree: part(tree)["bands"][0].update(size=63)), "basis.ffn.0: expected"),
        (
            with_entry("row_of_token", dtype="F32"),
            "tensor row_of_token: expected ('I32', (300,)), found ('F32', (300,))",
        ),
        (with_entry("checksums", shape=[-300]), "tensor checksums: shape[0]: expected int >= 0, found -300"),
    ],
)
def test_bad_file_is_refused(mixed_file, tmp_path, damage, found):
    path = str(tmp_path / "bad.safetensors")
    with open(path, "wb") as file:
        file.write(damage(Reader(mixed_file[0])))
    with pytest.raises(UserError, match=re.escape(found)) as caught:
        TolFile(path)
    assert path in str(caught.value)


def verified(path):
    with opened(path) as tol:
        verify.check_file(tol)


def test_every_flipped_bit_of_the_header_is_found(mixed_file, tmp_path):
    path, reader, rng = shutil.copy(mixed_file[0], tmp_path), Reader(mixed_file[0]), np.random.default_rng(0)
    field = reader.content.index(b'"header_checksum"')
    own = range(8 * field, 8 * (field + len('"header_checksum": "0123456789abcdef"')))
    bits = [*own, *rng.integers(0, 8 * reader.start, 300)]
    assert missed_flips(path, bits, lambda path: TolFile(path).close()) == []


def test_every_flipped_bit_of_the_data_is_found(mixed_file, tmp_path):
    path, reader, rng = shutil.copy(mixed_file[0], tmp_path), Reader(mixed_file[0]), np.random.default_rng(0)
    bits = rng.integers(8 * reader.start, 8 * len(reader.content), 50)
    bits = [*bits, *(8 * reader.at(name) + 3 for name in reader.header)]
    missed = {reader.tensor_at(bit // 8) for bit in missed_flips(path, bits, verified)}
    assert missed == {"padding", "padding.1"}  # nobody uses them


def test_folder_and_pipe_are_refused(mixed_file, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with opened(mixed_file[0]) as tol:
        for path in (str(tmp_path), str(tmp_path / "pipe")):
            for read in (TolFile, lambda path: Overlay.open(path, FileMemory(tol))):
                with pytest.raises(UserError, match=f"{path}: expected .*, found a folder or a special file"):
                    read(path)


def test_url_is_refused():
    with pytest.raises(UserError, match="gs://b/t: expected a ToL file on a disk, found a URL"):
        TolFile("gs://b/t")


def test_file_without_a_header_checksum_opens(mixed_file, tmp_path):
    """Files of earlier versions have none."""
    reader, path = Reader(mixed_file[0]), str(tmp_path / "earlier")
    header = {"__metadata__": {k: v for k, v in reader.meta.items() if k != "header_checksum"}} | reader.header
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + reader.content[reader.start :])
    verified(path)


def test_file_with_the_tensor_of_earlier_versions_opens(mixed_file, tmp_path):
    """Files made with text once held each token's likely successors, which nothing reads now."""
    reader, path = Reader(mixed_file[0]), str(tmp_path / "old.safetensors")
    successors = np.zeros((VOCAB, 4), "<i4").tobytes()
    sums = json.loads(reader.meta["tensor_checksums"])
    sums["successors"] = f"{xxhash.xxh3_64_intdigest(successors):016x}"
    end = len(reader.content) - reader.start

    def add(header):
        header["__metadata__"]["tensor_checksums"] = json.dumps(sums)
        header["successors"] = {"dtype": "I32", "shape": [VOCAB, 4], "data_offsets": [end, end + len(successors)]}

    with open(path, "wb") as file:
        file.write(rewritten(reader, add) + successors)
    ids = np.arange(VOCAB, dtype=np.int32)
    found, expected = (FileSource(TolFile(p)).vectors(ids) for p in (path, mixed_file[0]))
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name], rows)
