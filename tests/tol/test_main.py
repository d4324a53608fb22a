"""The commands `precompute` and `tol`."""

import json
import os
import subprocess
import sys

import pytest
from lab import opened

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol import compress, edit
from memoryllm_jax.tol.__main__ import compress_file, diff_files, edit_rows, inspect_file, verify_file


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120, env=os.environ
    )


def test_precompute_and_inspect_from_the_command_line(lab, tmp_path):
    out = str(tmp_path / "t.safetensors")
    line = [f"--workdir={lab.workdir('flex-3')}", f"--output={out}", "--bits=8", f"--data={lab.data_path}"]
    made = command("memoryllm_jax.precompute", *line)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip().splitlines()[-1].startswith(f"{out}: int8, 512 rows, ")
    looked = command("memoryllm_jax.tol", "inspect", out, "--token=#40", f"--json={tmp_path}/record.json")
    assert looked.returncode == 0, looked.stderr
    for words in ("int8", "flex-3 at step 16", "2 layers of width 32, 512 tokens", "order of frequency", "#40 "):
        assert words in looked.stdout
    record = json.load(open(tmp_path / "record.json"))
    assert record["metadata"]["codec"] == "int8" and len(record["tokens"]["40"]) == 2


def test_inspect_names_what_a_file_lacks(lab):
    text = inspect_file(lab.tol("tied"), ("#3",))
    assert "rows in order of token id" in text and "with the input embedding" not in text
    with pytest.raises(UserError, match="token: expected an id below 512, found #9999"):
        inspect_file(lab.tol("tied"), ("#9999",))


def test_verify_prints_errors_against_the_weights(lab, tmp_path, capsys):
    verify_file(lab.tol("flex-3"), lab.workdir("flex-3"), str(tmp_path / "record"))
    assert "all 512 rows match their checksums" in capsys.readouterr().out
    record = json.load(open(tmp_path / "record"))
    assert record["damaged"] == 0 and max(record["relative_error"].values()) < 1e-5


def test_compress_writes_a_smaller_file(lab, tmp_path):
    out = str(tmp_path / "small")
    line = compress_file(lab.tol("flex-3"), out, compress.Options(bits="4"))
    assert line.startswith(f"{out}: int8+int4, 512 rows, ")
    with opened(out) as small, opened(lab.tol("flex-3")) as whole:
        assert small.layout.row_bytes < whole.layout.row_bytes / 3


def test_edit_lists_undoes_and_applies(lab, tmp_path):
    tol, overlay, output = lab.tol("flex-3"), str(tmp_path / "o"), str(tmp_path / "edited")
    text = edit_rows(tol, request=edit.Request(overlay, swap=("#40,#41",), zero=("#50",), layers=("1",), output=output))
    assert [line.partition("#")[0] for line in text.splitlines()[:2]] == ["1: swap ", "2: zero "]
    assert text.splitlines()[1].endswith(" in layers 1")
    assert text.splitlines()[2] == f"{output}: a copy of {tol} with these edits"
    assert "3 of 512 tokens differ" in diff_files(tol, output) == diff_files(tol, overlay=overlay)
    assert edit_rows(tol, request=edit.Request(overlay), list=True) == "\n".join(text.splitlines()[:2])
    undone = edit_rows(tol, request=edit.Request(overlay, undo=2)).splitlines()
    assert [line[:12] for line in undone] == ["undone: swap", "undone: zero", f"{overlay}: no edits"[:12]]


def test_edit_without_a_file_edits_the_rows_of_the_checkpoint(lab, tmp_path):
    overlay, workdir = str(tmp_path / "o"), lab.workdir("flex-3")
    edit_rows(request=edit.Request(overlay, zero=("#50",), workdir=workdir))
    text = edit_rows(request=edit.Request(overlay, suppress=("1:5",), workdir=workdir))
    assert [line.partition("#")[0] for line in text.splitlines()] == ["1: zero ", "2: suppress layer 1 key 5"]
    assert edit_rows(lab.tol("flex-3"), request=edit.Request(overlay), list=True) == text


@pytest.mark.parametrize(
    "wrong, found",
    [
        ({"file": "", "zero": ("#3",)}, "edit: expected a ToL file or --workdir, found neither"),
        ({"file": "", "zero": ("#3",), "workdir": "w", "output": "x"}, "output: expected a ToL file too"),
        ({"overlay": "gs://b/o", "zero": ("#3",)}, "gs://b/o: expected an overlay .* on a disk, found a URL"),
        ({"zero": (f"#{'9' * 5000}",)}, "zero: expected an id below 512, found #9"),
        ({"suppress": (f"1:{'9' * 5000}",)}, "suppress: expected LAYER:KEY, two numbers, found '1:9"),
        ({"undo": 1, "zero": ("#3",)}, "undo: expected no edit on the same line, found zero"),
        ({"undo": 1, "list": True}, "list: expected no edit, undo or output on the same line"),
        ({"zero": ("#9999",)}, "zero: expected an id below 512, found #9999"),
        ({"zero": ("#9",), "layers": ("2",)}, "layers: expected layers from 0 to 1, such as 0,1, found '2'"),
        ({"suppress": ("1:2",), "layers": ("1",)}, "layers: expected an edit of rows on the same line, found none"),
        ({"zero": ("#9",), "suppress": ("1:2",), "layers": ("1",)}, "layers: expected no suppressed key on the same"),
    ],
)
def test_edit_that_fails_saves_nothing(lab, tmp_path, wrong, found):
    chosen = {"overlay": str(tmp_path / "o"), "file": lab.tol("flex-3"), "list": False} | wrong
    file, listed = chosen.pop("file"), chosen.pop("list")
    with pytest.raises(UserError, match=found):
        edit_rows(file, request=edit.Request(**chosen), list=listed)
    assert os.listdir(tmp_path) == []


def test_diff_needs_something_to_compare_with(lab):
    for other, overlay in (("", ""), (lab.tol("flex-3"), "o")):
        with pytest.raises(UserError, match="diff: expected a second file or --overlay=FILE"):
            diff_files(lab.tol("flex-3"), other, overlay)
