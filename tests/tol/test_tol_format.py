"""The ToL file as docs/tol.md specifies it: read back by a reader that shares no code with the package."""

import copy
import itertools
import json
import os
import re
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import xxhash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax import config
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import dataset
from memoryllm_jax.model import sharding
from memoryllm_jax.tol import build, codec, edit
from memoryllm_jax.tol.codec import Band, Part
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.layout import Layout, Tier
from memoryllm_jax.tol.reader import RowReader

VOCAB, DIM, LAYERS, CHUNK = 300, 96, 7, 64
TYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "U64": "<u8", "F32": "<f4", "BF16": "<u2"}


class Reader:
    """Written from docs/tol.md alone: header, rows and values of a whole file."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.content = file.read()
        (length,) = struct.unpack("<Q", self.content[:8])
        self.header = json.loads(self.content[8 : 8 + length])
        self.meta = self.header.pop("__metadata__")
        self.layout = json.loads(self.meta["layout"])
        self.start = 8 + length

    def at(self, name):
        """First byte of a tensor in the file."""
        return self.start + self.header[name]["data_offsets"][0]

    def tensor(self, name):
        entry = self.header[name]
        begin, end = (self.start + offset for offset in entry["data_offsets"])
        return np.frombuffer(self.content[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])

    def raw(self, tier):
        """uint8 [rows, bytes of a row]."""
        rows = self.layout["tiers"][tier]["rows"]
        return self.tensor(f"rows.{tier}").reshape(rows, -1).view("u1")

    def tokens(self, tier):
        """Token ids in the order of the tier's rows."""
        first = sum(t["rows"] for t in self.layout["tiers"][:tier])
        return np.argsort(self.tensor("row_of_token"))[first : first + self.layout["tiers"][tier]["rows"]]

    def bands(self, tier):
        """Yields (part, band, its first element, values [rows, size], steps [rows, size] or None for floats)."""
        raw, at = self.raw(tier), 0
        for part in self.layout["tiers"][tier]["parts"]:
            first = 0
            for band in part["bands"]:
                values, steps, used = decode_band(raw[:, at:], band["size"], band["bits"])
                yield part, band, first, values, steps
                at, first = at + used, first + band["size"]
        assert at == raw.shape[1]  # the layout accounts for every byte

    def vectors(self):
        """{part name: float64 [V, D]}; zero where a row holds no such part."""
        dim, layers = self.layout["dim"], self.layout["layers"]
        names = ["x0"] * self.layout["has_x0"] + [f"ffn.{layer}" for layer in range(layers)]
        out = {name: np.zeros((len(self.tensor("row_of_token")), dim)) for name in names}
        for tier in range(len(self.layout["tiers"])):
            tokens = self.tokens(tier)
            for part, _, first, values, _ in self.bands(tier):
                if part["rotated"]:
                    basis = bfloat16(self.tensor(f"basis.{part['name']}"))
                    out[part["name"]][tokens] += values @ basis[first : first + values.shape[1]]
                else:
                    out[part["name"]][tokens, first : first + values.shape[1]] = values
        return out


def bfloat16(bits):
    return (bits.astype("<u4") << 16).view("<f4").astype(np.float64)


def decode_band(raw, size, bits):
    """(values, steps, bytes used) of the band that the rows begin with; one element after the other."""
    rows = len(raw)
    if bits >= 16:
        used = size * bits // 8
        stored = np.ascontiguousarray(raw[:, :used])
        return bfloat16(stored.view("<u2")) if bits == 16 else stored.view("<f4").astype(np.float64), None, used
    group = 64 if size >= 64 else (size + 7) // 8 * 8
    groups = (size + group - 1) // group
    scales = bfloat16(np.ascontiguousarray(raw[:, : 2 * groups]).view("<u2"))
    codes = raw[:, 2 * groups : 2 * groups + groups * group * bits // 8].astype(int)
    values, steps = np.empty((rows, size)), np.empty((rows, size))
    for i in range(size):
        code = codes[:, i] if bits == 8 else 0
        for plane in range(bits if bits < 8 else 0):
            code = code | (codes[:, plane * groups * group // 8 + i // 8] >> i % 8 & 1) << plane
        steps[:, i] = scales[:, i // group]
        values[:, i] = (code - 2 ** (bits - 1) + 0.5) * steps[:, i]
    return values, steps, 2 * groups + codes.shape[1]


class Source:
    """Rows from a fixed table, as `build` asks for them. Stops as if killed when `stop` calls were answered."""

    def __init__(self, tokenizer, devices=1, has_x0=True, stop=None):
        self.mesh = sharding.make_mesh(config.MeshConfig(1, -1, 1), jax.devices()[:devices])
        self.vocab_size, self.dim, self.layers, self.has_x0 = VOCAB, DIM, LAYERS, has_x0
        self.identity = build.Identity("flex-3", 7, "float32", "1" * 64, "2" * 64, tokenizer)
        self.calls, self.stop = 0, stop
        rng = np.random.default_rng(0)
        names = ["x0"] * has_x0 + [f"ffn.{layer}" for layer in range(LAYERS)]
        self.table = {name: rng.standard_t(4, (VOCAB, DIM)).astype(np.float32) for name in names}
        self.table["ffn.2"][5] = 0.0  # a group of zeros has no scale
        self.table["ffn.1"] *= 1e-6

    def vectors(self, ids_U):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        where = NamedSharding(self.mesh, P(self.mesh.axis_names))
        ids = np.asarray(ids_U)
        return {name: jax.device_put(rows[ids], where) for name, rows in self.table.items()}


def uniform(bits, has_x0=True, layers=range(LAYERS)):
    names = ["x0"] * has_x0 + [f"ffn.{layer}" for layer in layers]
    parts = tuple(Part(name, (Band(DIM, bits),)) for name in names)
    return Layout(DIM, LAYERS, has_x0, (Tier(VOCAB, parts),))


def tier(rows, *parts):
    """Of (name, rotated, (size, bits), ...)."""
    return Tier(rows, tuple(Part(name, tuple(Band(*b) for b in bands), rotated) for name, rotated, *bands in parts))


def mixed():
    """Two tiers: every number of bits, bands of groups and of less, rotated parts; no layer 4, layer 6 in one only."""
    first = tier(
        110,
        ("x0", False, (DIM, 16)),
        ("ffn.0", True, (64, 8), (20, 5), (5, 3)),
        ("ffn.1", False, (DIM, 7)),
        ("ffn.2", False, (DIM, 4)),
        ("ffn.3", True, (40, 6)),
        ("ffn.5", False, (DIM, 32)),
        ("ffn.6", False, (DIM, 16)),
    )
    second = tier(
        190,
        ("x0", False, (DIM, 8)),
        ("ffn.0", True, (70, 4)),
        ("ffn.1", False, (DIM, 2)),
        ("ffn.2", False, (DIM, 3)),
        ("ffn.3", True, (16, 16), (3, 2)),
        ("ffn.5", False, (31, 6), (65, 5)),
    )
    return Layout(DIM, LAYERS, True, (first, second))


def small():
    """As `mixed`, and sooner compiled."""
    rest = [(f"ffn.{layer}", False, (DIM, 16)) for layer in (1, 2, 5)]
    first = tier(110, ("x0", False, (DIM, 16)), ("ffn.0", True, (70, 16)), ("ffn.3", True, (40, 6)), *rest)
    second = tier(190, ("x0", False, (DIM, 8)), ("ffn.0", True, (89, 16)), ("ffn.3", True, (16, 3)), *rest)
    return Layout(DIM, LAYERS, True, (first, second))


def more():
    """Further arguments of `build` for `mixed` and `small`."""
    rng = np.random.default_rng(1)
    basis = lambda: np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)  # noqa: E731
    return {
        "order": rng.permutation(VOCAB),
        "counts": rng.integers(0, 1 << 40, VOCAB),
        "successors": rng.integers(0, VOCAB, (VOCAB, 4)).astype(np.int32),
        "bases": {"ffn.0": basis()[:89], "ffn.3": basis()[:40]},
    }


@pytest.fixture(scope="module")
def tokenizer(data_path):
    return dataset.Dataset(data_path).tokenizer()


@pytest.fixture(scope="module", autouse=True)
def small_work():
    """Several chunks a file, and fewer clips to choose from, which compile sooner; the format knows neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_CHUNK_ROWS", CHUNK)
        patch.setattr(codec, "_CLIPS", (1.0, 0.8, 0.5))
        yield


@pytest.fixture(scope="module")
def mixed_file(tokenizer, tmp_path_factory):
    """(path, source) of a file of `mixed`, built in several chunks on one device."""
    path, source = str(tmp_path_factory.mktemp("tol") / "mixed.safetensors"), Source(tokenizer)
    build.build(source, mixed(), path, **more())
    return path, source


def content(path):
    with open(path, "rb") as file:
        return file.read()


def test_float32_rows_are_one_exact_tensor(tokenizer, tmp_path):
    path, source, order = str(tmp_path / "f32.safetensors"), Source(tokenizer), np.arange(VOCAB)[::-1]
    build.build(source, uniform(32), path, order)
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
    build.build(source, uniform(16, has_x0=False, layers=[0, 1, 2, 3, 5, 6]), path, np.arange(VOCAB))
    reader = Reader(path)
    assert reader.header["rows.0"]["dtype"] == "BF16" and reader.header["rows.0"]["shape"] == [VOCAB, 6, DIM]
    assert json.loads(reader.meta["dropped_layers"]) == [4]
    assert json.loads(reader.meta["kept_layers"]) == [0, 1, 2, 3, 5, 6]
    vectors = reader.vectors()
    assert sorted(vectors) == [f"ffn.{layer}" for layer in range(LAYERS)] and not vectors.pop("ffn.4").any()
    for name, rows in vectors.items():
        np.testing.assert_array_equal(rows, source.table[name].astype(ml_dtypes.bfloat16).astype(np.float64))


def test_mixed_file_is_laid_out_as_specified(mixed_file, tokenizer):
    path, _ = mixed_file
    reader, extra = Reader(path), more()
    spans = sorted(entry["data_offsets"] for entry in reader.header.values())
    assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert reader.start + spans[-1][1] == len(reader.content)
    assert reader.start % 4096 == reader.at("rows.0") % 4096 == reader.at("rows.1") % 4096 == 0
    assert "padding.1" in reader.header  # 110 rows do not end where the next tier may begin
    assert all(reader.at(name) % np.dtype(TYPES[e["dtype"]]).itemsize == 0 for name, e in reader.header.items())
    np.testing.assert_array_equal(reader.tensor("row_of_token")[extra["order"]], np.arange(VOCAB))
    np.testing.assert_array_equal(reader.tensor("counts"), extra["counts"])
    np.testing.assert_array_equal(reader.tensor("successors"), extra["successors"])
    for name, basis in extra["bases"].items():
        np.testing.assert_array_equal(
            bfloat16(reader.tensor(f"basis.{name}")), basis.astype(ml_dtypes.bfloat16).astype(np.float64)
        )
    assert reader.tensor("tokenizer").tobytes() == tokenizer.content
    assert reader.meta["tokenizer_digest"] == tokenizer.digest and reader.meta["dropped_layers"] == "[4, 6]"
    assert reader.meta["kept_layers"] == "[0, 1, 2, 3, 5, 6]"
    assert (reader.meta["version"], reader.meta["vocab_size"], reader.meta["step"]) == ("1", str(VOCAB), "7")
    rows = [row.tobytes() for tier in range(2) for row in reader.raw(tier)]
    assert [xxhash.xxh3_64_intdigest(row) for row in rows] == reader.tensor("checksums").tolist()


def test_integers_are_within_half_a_step(mixed_file):
    """Of the value, or of the outermost value there is a code for, where a group was clipped."""
    path, source = mixed_file
    reader, seen = Reader(path), set()
    for tier in range(2):
        for part, band, first, values, steps in reader.bands(tier):
            size, bits = band["size"], band["bits"]
            want = source.table[part["name"]][reader.tokens(tier)].astype(np.float64)
            if part["rotated"]:
                want = want @ bfloat16(reader.tensor(f"basis.{part['name']}")).T
            want = want[:, first : first + size]
            largest = np.abs(want).max()
            if steps is None:
                np.testing.assert_allclose(values, want, rtol=2**-8 if bits == 16 else 1e-6, atol=1e-5 * largest)
                continue
            seen.add(bits)
            most = steps * 2 ** (bits - 1)
            error = np.abs(values - np.clip(want, -most, most))
            assert (error <= steps * (0.5 + 1e-3) + 1e-6 * largest).all(), (part, band)
            for start in range(0, size, 64):
                top = np.abs(want[:, start : start + 64]).max(1)
                assert (most[:, start] >= 0.49 * top).all() and (most[:, start] <= 1.01 * top).all(), (part, band)
    assert seen == {2, 3, 4, 5, 6, 7, 8}
    assert not reader.vectors()["ffn.2"][5].any()


def test_package_decodes_as_the_reader_here(mixed_file):
    path, source = mixed_file
    tol = TolFile(path)
    theirs = build.FileSource(tol, source.mesh).vectors(np.arange(VOCAB, dtype=np.int32))
    ours = Reader(path).vectors()
    assert set(ours) == set(theirs) == {"x0", *(f"ffn.{layer}" for layer in range(LAYERS))}
    for name, rows in ours.items():
        np.testing.assert_allclose(theirs[name], rows, rtol=1e-5, atol=1e-5 * np.abs(source.table[name]).max())
    assert not ours["ffn.4"].any() and ours["ffn.5"].any()
    np.testing.assert_array_equal(ours["ffn.6"].any(1), tol.row_of_token < 110)
    tol.close()


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


def test_bytes_in_the_specification():
    raw, elements = bytes.fromhex("00 3F AA CC F0"), np.arange(8) / 2 - 1.75
    np.testing.assert_array_equal(decode_band(np.frombuffer(raw, "u1")[None], 8, 3)[0][0], elements)
    np.testing.assert_array_equal(codec.decode_band(Band(8, 3), np.frombuffer(raw, "u1")[None])[0], elements)
    assert xxhash.xxh3_64_intdigest(raw) == 0xE09CEA25323886C0


def test_overlay_is_as_specified(mixed_file, tmp_path):
    path, tol = str(tmp_path / "overlay.safetensors"), TolFile(mixed_file[0])
    overlay = edit.Overlay(tol, [])
    editor, rng = edit.Editor(tol, overlay), np.random.default_rng(2)
    key = {"coefficients": rng.standard_normal(VOCAB, np.float32), "value": rng.standard_normal(DIM, np.float32)}
    editor.add("swap", "#9,#4")
    overlay.edits.append(edit.Edit("suppress layer 2 key 3", layer=2, **key))
    editor.add("blend", "#4,#8,0.25")
    overlay.save(path)
    with safetensors.safe_open(path, "numpy") as file:
        meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert meta["format"] == "memoryllm_overlay" and meta["rows_digest"] == tol.metadata["rows_digest"]
    before = Reader(mixed_file[0]).vectors()
    after = np.stack([before[f"ffn.{layer}"] for layer in range(LAYERS)], 1)
    swapped = after[[4, 9]]
    for k, entry in enumerate(json.loads(meta["edits"])):
        if entry["layer"] is None:
            after[tensors[f"{k}.ids"]] = tensors[f"{k}.rows"]
        else:
            after[:, entry["layer"]] -= tensors[f"{k}.coefficients"][:, None] * tensors[f"{k}.value"]
    swapped[:, 2] -= key["coefficients"][[9, 4], None] * key["value"]
    theirs = edit.read_rows(tol, np.arange(VOCAB, dtype=np.int32), edit.Overlay.open(path, tol))
    np.testing.assert_allclose(theirs, after, rtol=1e-5, atol=1e-5 * np.abs(after).max())
    np.testing.assert_allclose(after[9], swapped[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(after[4], 0.75 * swapped[1] + 0.25 * after[8], rtol=1e-5, atol=1e-4)
    tol.close()


@pytest.mark.parametrize("layout", [uniform(32), small()])
def test_eight_devices_write_the_same_file(tokenizer, tmp_path, layout):
    extra = more() if layout.rotated else {"order": np.arange(VOCAB)}
    for devices in (1, 8):
        source = Source(tokenizer, devices)
        for name in layout.rotated:  # sums of integers are exact, in whatever order a device adds them
            source.table[name] = np.round(source.table[name])
            extra["bases"][name] = np.sign(extra["bases"][name])
        build.build(source, layout, str(tmp_path / f"{devices}"), **extra)
    assert content(tmp_path / "1") == content(tmp_path / "8")
    assert xxhash.xxh3_64_intdigest(Reader(tmp_path / "8").raw(0)[-1]) in Reader(tmp_path / "8").tensor("checksums")


def test_killed_build_goes_on(tokenizer, tmp_path):
    path, source = str(tmp_path / "whole.safetensors"), Source(tokenizer)
    build.build(source, small(), path, **more())
    whole, work = content(path), source.calls
    assert work == 5  # 110 and 190 rows in chunks of 64
    os.remove(path)
    path = str(tmp_path / "killed.safetensors")
    with pytest.raises(KeyboardInterrupt):
        build.build(Source(tokenizer, stop=3), small(), path, **more())
    assert sorted(os.listdir(tmp_path)) == ["killed.safetensors.part", "killed.safetensors.part.0"]
    assert os.path.getsize(f"{path}.part") == len(whole)
    done = json.loads(content(f"{path}.part.0"))["chunks"]
    assert done == 2  # the third was computed, and not yet written
    source = Source(tokenizer)
    build.build(source, small(), path, **more())
    assert source.calls == work - done
    assert os.listdir(tmp_path) == ["killed.safetensors"] and content(path) == whole


def test_killed_build_of_another_layout_is_no_start(tokenizer, tmp_path):
    path, order = str(tmp_path / "other.safetensors"), np.arange(VOCAB)
    with pytest.raises(KeyboardInterrupt):
        build.build(Source(tokenizer, stop=3), uniform(16), path, order)
    source = Source(tokenizer)
    build.build(source, uniform(32), path, order)
    assert source.calls == -(-VOCAB // CHUNK) and os.listdir(tmp_path) == ["other.safetensors"]
    for name, rows in Reader(path).vectors().items():
        np.testing.assert_array_equal(rows, source.table[name])


def rewritten(reader, change):
    """The file's bytes with the header as `change(header)` leaves it."""
    header = copy.deepcopy({"__metadata__": reader.meta} | reader.header)
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    return struct.pack("<Q", len(text)) + text + reader.content[reader.start :]


def with_metadata(**values):
    return lambda reader: rewritten(reader, lambda header: header["__metadata__"].update(values))


def with_bytes(position, new):
    """`position(reader)`: where `new` goes."""

    def damage(reader):
        at = position(reader)
        return reader.content[:at] + new + reader.content[at + len(new) :]

    return damage


def one_row_twice(reader):
    at = reader.at("row_of_token")
    return reader.content[: at + 4] + reader.content[at : at + 4] + reader.content[at + 8 :]


def other_part(reader):
    """A layer's part under the name of one that the model does not have."""
    text = reader.meta["layout"].replace('"ffn.1"', '"ffn.9"')
    return with_metadata(layout=text)(reader)


def longer_rows(reader):
    tree = json.loads(reader.meta["layout"])
    tree["tiers"][0]["rows"] += 1
    return with_metadata(layout=json.dumps(tree))(reader)


@pytest.mark.parametrize(
    "damage, found",
    [
        (lambda reader: reader.content[:-1], "truncated"),
        (lambda reader: reader.content[: reader.start - 9], "expected a ToL file"),
        (lambda reader: b"", "expected a ToL file"),
        (with_bytes(lambda reader: 0, b"\xff" * 8), "expected a ToL file"),
        (with_bytes(lambda reader: 8, b"garbage\xff"), "expected a ToL file"),
        (lambda reader: rewritten(reader, lambda header: header.pop("__metadata__")), "expected a ToL file"),
        (lambda reader: rewritten(reader, lambda header: header.pop("checksums")), "checksums"),
        (one_row_twice, "row_of_token"),
        (with_bytes(lambda reader: reader.at("row_of_token"), b"\xff" * 4), "row_of_token"),
        (with_metadata(version="2"), "version '2'"),
        (with_metadata(format="memoryllm_overlay"), "memoryllm_overlay"),
        (other_part, "ffn.1"),
        (with_metadata(dropped_layers="[]"), "ffn.4"),
        (longer_rows, "rows.0"),
    ],
)
def test_bad_file_is_refused(mixed_file, tmp_path, damage, found):
    path = str(tmp_path / "bad.safetensors")
    with open(path, "wb") as file:
        file.write(damage(Reader(mixed_file[0])))
    with pytest.raises(UserError, match=re.escape(found)) as caught:
        TolFile(path)
    assert path in str(caught.value)


def test_flipped_bit_in_a_row_names_its_token(mixed_file, tmp_path):
    path, reader = str(tmp_path / "flipped.safetensors"), Reader(mixed_file[0])
    token = int(reader.tokens(1)[150])
    at = reader.at("rows.1") + 150 * reader.raw(1).shape[1] + 11
    with open(path, "wb") as file:
        file.write(with_bytes(lambda reader: at, bytes([reader.content[at] ^ 4]))(reader))
    tol = TolFile(path)
    rows = RowReader(tol, repair=None)
    with pytest.raises(UserError, match=rf"token {token}: the checksum") as caught:
        rows.read(np.arange(VOCAB, dtype=np.int32))
    assert path in str(caught.value)
    raw, tiers = rows.read(reader.tokens(1)[:150].astype(np.int32))
    np.testing.assert_array_equal(raw[:, : reader.raw(1).shape[1]], reader.raw(1)[:150])
    assert (tiers == 1).all()
    rows.close()
    tol.close()
