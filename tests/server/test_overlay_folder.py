"""The folder of overlays that requests name: which files it gives, and what it writes."""

import os

import numpy as np
import pytest

from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.overlay_folder import OverlayFolder
from memoryllm_jax.tol import serving
from memoryllm_jax.tol.edit import Editor
from memoryllm_jax.tol.edit_spec import Zero
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.overlay_file import Edit


@pytest.fixture(scope="module")
def memory(lab):
    with lab.model("flex-3") as engine:
        yield serving.memory_of(engine)


@pytest.fixture
def folder(memory, tmp_path):
    path = tmp_path / "kept"
    path.mkdir()
    return OverlayFolder(str(path), memory)


def zeroed(memory, token):
    overlay = Overlay(memory)
    Editor(overlay).add(Zero(token=token))
    return overlay


def test_only_regular_files_of_the_folder_have_names(folder, memory, tmp_path):
    outside = str(tmp_path / "outside.safetensors")
    zeroed(memory, 4).save(outside)
    zeroed(memory, 5).save(f"{folder.path}/b-1.safetensors")
    zeroed(memory, 6).save(f"{folder.path}/not a name.safetensors")
    zeroed(memory, 7).save(f"{folder.path}/other.file")
    os.symlink(outside, f"{folder.path}/link.safetensors")
    os.mkdir(f"{folder.path}/folder.safetensors")
    os.mkfifo(f"{folder.path}/pipe.safetensors")
    assert folder.names() == ["b-1"]
    assert [edit.ids.tolist() for edit in folder.open("b-1").edits] == [[5]]
    for name in ("link", "folder", "pipe", "none"):
        with pytest.raises(ApiError, match=f"overlay: expected one .* found '{name}'") as error:
            folder.open(name)
        assert (error.value.status, error.value.code) == (404, "overlay_not_found")
    for name in ("", ".", "..", "../outside", outside, "not a name", "b-1.safetensors", "b\n", "b\0", "é", "a" * 101):
        with pytest.raises(ApiError, match="overlay: expected a name of 1 to 100 letters") as error:
            folder.open(name)
        assert error.value.status == 400 and len(error.value.message) < 200


def test_a_file_is_read_again_only_after_it_has_changed(folder, memory):
    folder.keep("kept", zeroed(memory, 4), replace=False)
    first = folder.open("kept")
    assert folder.open("kept") is first
    folder.keep("kept", zeroed(memory, 5), replace=True)
    assert folder.open("kept").edits[0].ids.tolist() == [5]
    os.remove(f"{folder.path}/kept.safetensors")
    with pytest.raises(ApiError, match="found 'kept'"):
        folder.open("kept")


def test_files_that_cannot_be_used_are_refused_without_their_path(folder, memory, lab):
    with lab.model("memory") as engine:
        zeroed(serving.memory_of(engine), 4).save(f"{folder.path}/other.safetensors")
    folder.keep("damaged", zeroed(memory, 4), replace=False)
    with open(f"{folder.path}/damaged.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    rows = np.full((1, memory.layers, memory.dim), np.inf, np.float32)
    infinite = Edit("rows", ids=np.array([4], np.int32), rows=rows, mix=[[(4, 1.0)]])
    folder.keep("infinite", Overlay(memory, [infinite]), replace=False)
    unusable = {
        "other": "made for other rows than those of",
        "damaged": "its checksum differs",
        "infinite": "expected finite numbers",
    }
    for name, found in unusable.items():
        with pytest.raises(ApiError, match=f"overlay: '{name}': .*{found}") as error:
            folder.open(name)
        assert error.value.status == 400 and folder.path not in error.value.message


def test_an_overlay_is_replaced_only_on_request(folder, memory, tmp_path):
    folder.keep("kept", zeroed(memory, 4), replace=False)
    with pytest.raises(ApiError, match=r"expected a name that is free, .* found 'kept'") as error:
        folder.keep("kept", zeroed(memory, 5), replace=False)
    assert error.value.status == 409 and folder.open("kept").edits[0].ids.tolist() == [4]
    # A link is not followed, not even to replace what it names.
    os.symlink(tmp_path / "outside", f"{folder.path}/link.safetensors")
    with pytest.raises(ApiError, match="expected a name that is free"):
        folder.keep("link", zeroed(memory, 5), replace=True)
    with pytest.raises(ApiError, match="expected a name of 1 to 100"):
        folder.keep("../kept", zeroed(memory, 5), replace=True)
    assert sorted(os.listdir(folder.path)) == ["kept.safetensors", "link.safetensors"]
