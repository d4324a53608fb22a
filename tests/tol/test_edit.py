"""Edits of rows: what they do to rows and logits, and files with the edits in them."""

import dataclasses
import functools
import json
import os
import shutil
import struct
import types

import numpy as np
import pytest
import safetensors
from lab import opened, step_logits, written
from tol_files import DIM, LAYERS, VOCAB, Reader, content, damaged_copy, missed_flips, relative, rows_of, sealed

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import records
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol import edit, memory, verify
from memoryllm_jax.tol.edit_spec import EditSpec, Suppress, from_text
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.memory import FileMemory
from memoryllm_jax.tol.overlay import Edit, Overlay
from memoryllm_jax.tol.sources import FileSource, RowWeights


def test_overlay_is_as_specified(mixed_file, tmp_path):
    path, tol = str(tmp_path / "overlay.safetensors"), TolFile(mixed_file[0])
    overlay = Overlay(FileMemory(tol))
    editor, rng = edit.Editor(overlay), np.random.default_rng(2)
    key = {"coefficients": rng.standard_normal(VOCAB, np.float32), "value": rng.standard_normal(DIM, np.float32)}
    editor.add(from_text("swap", "#9,#4"))
    overlay.add(Edit("suppress layer 2 key 3", layer=2, **key))
    editor.add(from_text("blend", "#4,#8,0.25"))
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
    theirs = rows_of(Overlay.open(path, FileMemory(tol)))
    np.testing.assert_allclose(theirs, after, rtol=1e-5, atol=1e-5 * np.abs(after).max())
    np.testing.assert_allclose(after[9], swapped[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(after[4], 0.75 * swapped[1] + 0.25 * after[8], rtol=1e-5, atol=1e-4)
    tol.close()


@pytest.fixture
def overlay_file(lab, tmp_path):
    """(the ToL file, path of an overlay of it with both kinds of edits)."""
    path = str(tmp_path / "overlay")
    with opened(lab.tol("flex-3")) as tol:
        key = {"coefficients": np.ones(512, np.float32), "value": np.ones(32, np.float32)}
        edits = edited(tol, "", ("swap", "#40,#41")).edits
        Overlay(FileMemory(tol), [*edits, Edit("suppress layer 1 key 3", layer=1, **key)]).save(path)
        yield tol, path


def test_every_flipped_bit_of_an_overlay_is_found(overlay_file):
    tol, path = overlay_file
    bits = range(0, 8 * os.path.getsize(path), 37)  # 37 and 8 have no common divisor: every bit of a byte is among them
    assert missed_flips(path, bits, lambda path: Overlay.open(path, FileMemory(tol))) == []


def header_and_data(path):
    raw = content(path)
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_unsealed(path, header, data):
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def test_overlay_without_checksums_opens(overlay_file):
    """Overlays of earlier versions have none."""
    tol, path = overlay_file
    header, data = header_and_data(path)
    texts = [edit.text for edit in Overlay.open(path, FileMemory(tol)).edits]
    del header["__metadata__"]["header_checksum"], header["__metadata__"]["tensor_checksums"]
    write_unsealed(path, header, data)
    assert [edit.text for edit in Overlay.open(path, FileMemory(tol)).edits] == texts


def deep(entries):
    entries[0]["mix"] = functools.reduce(lambda inner, _: [inner], range(500), [])


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda entries: entries[0].update(text=None), r"edits: \[0\].text: expected str, found null"),
        (lambda entries: entries[0].update(layer=1.5), r"edits: \[0\].layer: expected int \| null, found float"),
        (lambda entries: entries[0].update(layer=0), "tensor 0.coefficients: expected float32 .512,. .*, found none"),
        (lambda entries: entries[1].update(layer=2), r"edits\[1\]: expected a layer below 2, found 2"),
        (lambda entries: entries[1].update(layer=-1), r"edits: \[1\].layer: expected int >= 0"),
        (lambda entries: entries[0]["mix"].pop(), r"tensor 0.ids: expected int32 \(1,\) .*, found int32 \(2,\)"),
        (lambda entries: entries[0]["mix"][0].append([512, 1.0]), "mix of tokens below 512 .*, found 512 with 1.0"),
        (lambda entries: entries[0]["mix"][0].extend([[1, 0.0]] * 512), "from at most 512 tokens, found 513"),
        (deep, "edits: "),
        (
            lambda entries: entries[0].update(layers=[1, 0]),
            r"edits\[0\]: expected rising layers below 2, found \[1, 0\]",
        ),
        (
            lambda entries: entries[0].update(layers=[1]),
            r"tensor 0.rows: expected float32 \(2, 1, 32\) .*, found float32 \(2, 2",
        ),
        (
            lambda entries: entries[1].update(layers=[1]),
            r"edits\[1\]: expected a layer or a list of layers, found both",
        ),
        (lambda entries: entries.pop(), "expected no tensor but those of its edits, found '1.coefficients'"),
    ],
)
def test_overlay_that_does_not_fit_is_refused(overlay_file, change, found):
    tol, path = overlay_file
    header, data = header_and_data(path)
    entries = json.loads(header["__metadata__"]["edits"])
    change(entries)
    header["__metadata__"]["edits"] = json.dumps(entries)
    with open(path, "wb") as file:
        file.write(sealed(header) + data)
    with pytest.raises(UserError, match=f"{path}: .*{found}"):
        Overlay.open(path, FileMemory(tol))


def edited(tol, workdir, *operations):
    overlay = Overlay(FileMemory(tol, TrainedModel(workdir) if workdir else None))
    editor = edit.Editor(overlay)
    for operation, text in operations:
        editor.add(from_text(operation, text))
    return overlay


def test_swap_shows_in_rows_and_is_undone(lab, tmp_path):
    path, overlay_path = lab.tol("flex-3"), str(tmp_path / "swap")
    with opened(path) as tol:
        text = next(t for t in ("a", "the", ".") if len(tol.tokenizer().encode(t)) == 1)
        a, b = tol.tokenizer().encode(text)[0], 300
        overlay = edited(tol, "", ("swap", f"{text},#{b}"))
        overlay.save(overlay_path)
        before, after = rows_of(tol), rows_of(Overlay.open(overlay_path, FileMemory(tol)))
        permuted = np.arange(512)
        permuted[[a, b]] = b, a
        np.testing.assert_array_equal(after, before[permuted])
        assert (after != before).any()
        editor = edit.Editor(overlay)
        assert editor.undo(1)[0].startswith("swap #") and overlay.edits == ()
        with pytest.raises(UserError, match=r"undo: expected from 1 to 0, .* found 1"):
            editor.undo(1)
        np.testing.assert_array_equal(rows_of(overlay), before)


def test_swap_shows_in_the_logits(lab, tmp_path):
    path, overlay_path, tokens = lab.tol("flex-3"), str(tmp_path / "swap"), [40, 17, 300, 30]
    with opened(path) as tol:
        edited(tol, "", ("swap", "#40,#300")).save(overlay_path)
    with lab.model("flex-3") as model:
        expected = step_logits(model.decoder, SwappedRows(model.rows, 40, 300), tokens)
        assert np.abs(step_logits(model.decoder, model.rows, tokens) - expected)[0].max() > 1e-3
    for tol in ({"tol": path, "cache": 1 << 10}, {}):  # an overlay of the file edits live rows too
        with lab.model("flex-3", **tol, overlay=overlay_path) as model:
            found = step_logits(model.decoder, model.rows, tokens)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


class SwappedRows:
    """Live rows in which two tokens have each other's FFN-M, and keep their embeddings."""

    def __init__(self, live, a, b):
        self.live, self.of = live, np.arange(512, dtype=np.int32)
        self.of[[a, b]] = b, a

    def fetch(self, ids):
        return self.live.fetch(ids)._replace(rows_LSUP=self.live.fetch(self.of[ids]).rows_LSUP)


def test_zero_replace_and_blend_apply_in_order(lab):
    with opened(lab.tol("flex-3")) as tol:
        expected = rows_of(tol).copy()
        operations = [("zero", "#9"), ("replace", "#11,#12"), ("blend", "#13,#14,0.25"), ("swap", "#13,#9")]
        found = rows_of(edited(tol, "", *operations))
    expected[9] = 0
    expected[11] = expected[12]
    expected[13] = 0.75 * expected[13] + 0.25 * expected[14]
    expected[[9, 13]] = expected[[13, 9]]
    np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("layers, there", [((1,), [1]), ((0, 1), [0, 1])])
def test_edits_change_the_chosen_layers_alone(lab, tmp_path, layers, there):
    """Mixed in one layer and then suppressed in both: the key is gone from the rows, however they were mixed."""
    path, keys = str(tmp_path / "overlay"), [(0, 7), (1, 5)]
    expected = lab.memory("flex-3", without(keys)).swapaxes(0, 1).copy()
    for layer in there:
        expected[[9, 300], layer] = expected[[300, 9], layer]
        expected[11, layer] = 0.25 * expected[11, layer] + 0.75 * expected[12, layer]
        expected[13, layer] = 0
    with opened(lab.tol("flex-3")) as tol:
        overlay = Overlay(FileMemory(tol, TrainedModel(lab.workdir("flex-3"))))
        specs = [
            {"operation": "swap", "token": 9, "by": "#300", "layers": layers},
            {"operation": "blend", "token": "#11", "by": 12, "share": 0.75, "layers": layers},
            {"operation": "zero", "token": 13, "layers": layers},
            *({"operation": "suppress", "layer": layer, "key": key} for layer, key in keys),
        ]
        for spec in records.parse(list[EditSpec], json.dumps(specs), "edits"):
            edit.Editor(overlay).add(spec)
        overlay.save(path)
        read = Overlay.open(path, FileMemory(tol))
        assert [entry.layers for entry in read.edits[:3]] == [None if len(layers) == 2 else layers] * 3
        assert read.edits[2].text.endswith("in layers 1") == (layers == (1,))
        assert relative(rows_of(read), expected) < 2e-6
        edit.write_edited(tol, read, str(tmp_path / "edited"))
    with opened(str(tmp_path / "edited")) as tol:
        assert relative(rows_of(tol), expected) < 1e-2  # of 16 bits


def test_a_key_leaves_a_learned_row_as_it_left_its_tokens_own(lab):
    with opened(lab.tol("flex-3")) as tol:
        overlay = Overlay(FileMemory(tol, TrainedModel(lab.workdir("flex-3"))))
        editor, before = edit.Editor(overlay), rows_of(tol)
        change = np.random.default_rng(0).standard_normal((1, 32), np.float32)
        texts = []
        for factor in (1, 2):
            editor.give("learned", {9: before[9, 1:] + factor * change}, (1,))
            texts += [overlay.edits[-1].text]
        assert len(set(texts)) == 2, "texts determine what an edited file's digest stands for"
        editor.add(Suppress(layer=1, key=5))
        found = rows_of(overlay)
    expected = lab.memory("flex-3", without([(1, 5)])).swapaxes(0, 1).copy()
    expected[9, 1] += 2 * change[0]
    assert relative(found, expected) < 2e-6


@pytest.mark.parametrize(
    "spec, found",
    [
        ({"operation": "add"}, r"edits: \[0\].operation: expected a known value, found 'add'"),
        ({"operation": "zero", "token": 4, "by": 5}, r"edits: \[0\]: expected known fields only, found 'by'"),
        (
            {"operation": "blend", "token": 4, "by": 5, "share": 1.5},
            r"edits: \[0\].share: expected float <= 1.0, found",
        ),
        ({"operation": "zero", "token": 512}, "zero: expected an id below 512, found #512"),
        ({"operation": "zero", "token": 4, "layers": [0, 2]}, "layers: expected layers from 0 to 1, found 2"),
    ],
)
def test_edits_as_json_are_refused_by_field(lab, spec, found):
    with opened(lab.tol("flex-3")) as tol, pytest.raises(UserError, match=found):
        (edit_spec,) = records.parse(list[EditSpec], json.dumps([spec]), "edits")
        edit.Editor(Overlay(FileMemory(tol))).add(edit_spec)


def test_bad_edits_are_refused(lab):
    with opened(lab.tol("flex-3")) as tol:
        workdir = lab.workdir("flex-3")
        for directory, operation, spec, message in [
            ("", "zero", "several tokens here", "zero: expected one token, found 'several tokens here' = #.*#ID"),
            ("", "zero", "#9999999", "zero: expected an id below 512, found #9999999"),
            ("", "swap", "#9,#9", "swap: expected two different tokens, .* #9"),
            ("", "swap", "#9", "swap: expected 2 values .* found '#9'"),
            ("", "blend", "#9,#8,2", "blend: expected a share from 0 to 1, found '2'"),
            ("", "suppress", "1:2", "suppress: expected a workdir too"),
            ("", "suppress", "x", "suppress: expected LAYER:KEY"),
            (workdir, "suppress", "3:1", "suppress: expected a layer below 2 and a key below [0-9]+, found 3:1"),
            (workdir, "suppress", "1:999", "suppress: expected a layer below 2 and a key below [0-9]+, found 1:999"),
        ]:
            with pytest.raises(UserError, match=message):
                edited(tol, directory, (operation, spec))


def without(keys):
    """For `Lab.memory`: the values of (layer, key) pairs set to zero."""

    def change(layer, p):
        down = p["ffn"]["down"]
        for at, key in keys:
            down = down.at[key].set(0) if at == layer else down
        return p | {"ffn": p["ffn"] | {"down": down}}

    return change


def test_suppressed_keys_are_values_set_to_zero(lab):
    keys = [(1, 5), (0, 7)]
    expected = lab.memory("flex-3", without(keys)).swapaxes(0, 1)
    assert relative(lab.memory("flex-3").swapaxes(0, 1), expected) > 1e-3
    with opened(lab.tol("flex-3")) as tol:
        operations = [("suppress", f"{layer}:{key}") for layer, key in keys]
        found = rows_of(edited(tol, lab.workdir("flex-3"), *operations))
        assert relative(found, expected) < 2e-6
        with pytest.raises(UserError, match="suppress: expected a key that is not suppressed yet, found 1:5"):
            edited(tol, lab.workdir("flex-3"), *operations, ("suppress", "1:5"))


def test_suppressed_key_is_also_gone_from_rows_that_were_swapped(lab):
    expected = lab.memory("flex-3", without([(1, 5)])).swapaxes(0, 1).copy()
    expected[[9, 300]] = expected[[300, 9]]
    with opened(lab.tol("flex-3")) as tol:
        for operations in ([("suppress", "1:5"), ("swap", "#9,#300")], [("swap", "#9,#300"), ("suppress", "1:5")]):
            found = rows_of(edited(tol, lab.workdir("flex-3"), *operations))
            assert relative(found, expected) < 2e-6, operations


@pytest.fixture(scope="module")
def edited_file(lab, tmp_path_factory):
    """(path of a copy of flex-3's ToL file with two edits in it, path of the overlay with these edits)."""
    folder = tmp_path_factory.mktemp("edited")
    path, overlay_path = str(folder / "edited.safetensors"), str(folder / "overlay")
    with opened(lab.tol("flex-3")) as tol:
        overlay = edited(tol, "", ("swap", "#40,#41"), ("zero", "#500"))
        overlay.save(overlay_path)
        edit.write_edited(tol, overlay, path)
    assert sorted(os.listdir(folder)) == ["edited.safetensors", "overlay"]
    return path, overlay_path


def test_edited_file_differs_in_those_tokens(lab, edited_file):
    path, overlay_path = edited_file
    with opened(lab.tol("flex-3")) as tol, opened(path) as after:
        np.testing.assert_array_equal(rows_of(after), rows_of(Overlay.open(overlay_path, FileMemory(tol))))
        result = verify.compare(FileSource(tol), FileSource(after))
    assert result.changed == 3 and {token for token, _, _ in result.most(10)} == {40, 41, 500}
    assert result.by_part["x0"] == 0


def test_the_model_takes_the_edited_file(lab, edited_file):
    with lab.model("flex-3", edited_file[0]) as model:
        assert len(written(model, [[40]])[0]) == 12


def test_an_overlay_of_other_rows_is_refused(edited_file):
    path, overlay_path = edited_file
    with opened(path) as after, pytest.raises(UserError, match="made for other rows"):
        Overlay.open(overlay_path, FileMemory(after))


def test_weights_of_other_rows_are_read_once_and_refused(lab, edited_file, monkeypatch):
    with opened(edited_file[0]) as after:
        of_file = FileMemory(after, TrainedModel(lab.workdir("flex-3")))
        for _ in range(2):
            with pytest.raises(UserError, match=r"suppress: expected the weights that the rows of .* were made from"):
                of_file.key(1, 5)
            monkeypatch.setattr(memory, "row_weights_for", None)


def test_the_file_that_is_edited_is_not_overwritten(lab, edited_file):
    with opened(lab.tol("flex-3")) as tol:
        overlay = Overlay.open(edited_file[1], FileMemory(tol))
        with pytest.raises(UserError, match="output: expected another file than the one that is edited"):
            edit.write_edited(tol, overlay, tol.path)


def test_only_an_edited_file_is_replaced(lab, edited_file, tmp_path):
    out = str(tmp_path / "out")
    with opened(lab.tol("flex-3")) as tol:
        overlay = Overlay.open(edited_file[1], FileMemory(tol))
        for there in (tol.path, lab.tol("memory"), edited_file[1]):
            shutil.copy(there, out)
            with pytest.raises(UserError, match="output: expected a name that is free, or "):
                edit.write_edited(tol, overlay, out)
            assert content(out) == content(there)
        shutil.copy(edited_file[0], out)
        edit.write_edited(tol, overlay, out)
    assert content(out) == content(edited_file[0])


def test_overlay_is_not_the_output(lab, tmp_path):
    name = str(tmp_path / "same")
    with opened(lab.tol("flex-3")) as tol, pytest.raises(UserError, match="expected another file than the overlay"):
        edit.fulfil(tol, edit.Request(overlay=name, zero=("#7",), output=name))
    assert os.listdir(tmp_path) == []


def test_edit_of_a_layer_that_a_tier_drops_is_not_written(lab, tmp_path):
    with opened(lab.tol("flex-3", drop_layers=("1",))) as tol:
        rows = np.ones((1, 2, 32), np.float32)
        overlay = Overlay(FileMemory(tol), [Edit("by hand", ids=np.array([7], np.int32), rows=rows, mix=[[]])])
        with pytest.raises(UserError, match=r"output: .* layer 1 of token #7, whose tier 0 drops that layer"):
            edit.write_edited(tol, overlay, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_a_key_is_suppressed_where_tiers_hold_its_layer(mixed_file, monkeypatch):
    config = types.SimpleNamespace(layers=LAYERS, memory_dim=4)
    with opened(mixed_file[0]) as tol:
        weights = RowWeights(config, {}, tol.metadata["rows_digest"])
        monkeypatch.setattr(memory, "row_weights_for", lambda *_: weights)
        ones = memory.Key(np.ones(VOCAB, np.float32), np.ones(DIM, np.float32))
        monkeypatch.setattr(memory, "read_key", lambda *_: ones)
        overlay = Overlay(FileMemory(tol, types.SimpleNamespace(config=config, mesh=None)))
        edit.Editor(overlay).add(Suppress(layer=6, key=3))
        (found,) = overlay.edits
        np.testing.assert_array_equal(found.coefficients == 1, tol.row_of_token < 110)


def test_a_key_of_a_layer_that_the_file_drops_is_not_suppressed(lab, overlay_file):
    """Overlays of the full file fit the compressed one, whose rows may lack what an edit takes away."""
    _, path = overlay_file
    with opened(lab.tol("flex-3", drop_layers=("1",))) as tol:
        with pytest.raises(
            UserError, match=r"o.*: edits\[1\]: expected coefficients of 0 .* drop layer 1, found 1 .* #0"
        ):
            Overlay.open(path, FileMemory(tol))
        coefficients = np.zeros(512, np.float32)
        coefficients[40] = 1  # a token to which the edit before gives a row of all layers
        edits = Overlay.open(path, FileMemory(TolFile(lab.tol("flex-3")))).edits
        Overlay(FileMemory(tol), [edits[0], dataclasses.replace(edits[1], coefficients=coefficients)]).save(path)
        assert len(Overlay.open(path, FileMemory(tol)).edits) == 2


def test_edited_copy_of_a_file_of_an_earlier_version(lab, edited_file, tmp_path):
    """Without a checksum, and with a header of another length, so that the copy's rows lie elsewhere."""
    path, out = str(tmp_path / "earlier"), str(tmp_path / "out")
    header, data = header_and_data(lab.tol("flex-3"))
    del header["__metadata__"]["header_checksum"]
    write_unsealed(path, header, data)
    with opened(path) as tol:
        edit.write_edited(tol, Overlay.open(edited_file[1], FileMemory(tol)), out)
    with opened(out) as tol:
        verify.check_file(tol)
    assert header_and_data(out)[1] == header_and_data(edited_file[0])[1]


def test_a_damaged_row_is_refused_or_computed_again(lab, edited_file, tmp_path):
    damaged = damaged_copy(lab.tol("flex-3"), 40, tmp_path / "damaged")
    asked = {"overlay": str(tmp_path / "overlay"), "output": str(tmp_path / "out")}
    edits = {"swap": ("#40,#41",), "zero": ("#500",)}
    with opened(damaged) as tol:
        for mended in (
            lambda: edit.write_edited(tol, Overlay.open(edited_file[1], FileMemory(tol)), asked["output"]),
            lambda: edit.fulfil(tol, edit.Request(**asked, **edits)),
        ):
            with pytest.raises(UserError, match="token 40: the checksum of its row differs"):
                mended()
            assert os.listdir(tmp_path) == ["damaged"]
        edit.fulfil(tol, edit.Request(**asked, **edits, workdir=lab.workdir("flex-3")))
    with opened(asked["output"]) as tol, opened(edited_file[0]) as whole:
        verify.check_file(tol)
        assert relative(rows_of(tol), rows_of(whole)) < 1e-2  # of 16 bits
