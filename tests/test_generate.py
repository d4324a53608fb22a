"""The command `generate`: where texts and statistics go, and where prompts come from."""

import json
import os
import subprocess
import sys

import pytest
from lab import written

from memoryllm_jax import generate
from memoryllm_jax.common.errors import UserError


def test_text_goes_to_stdout_statistics_to_stderr_and_both_to_a_file(lab, tmp_path):
    line = [f"--workdir={lab.workdir('flex-3')}", f"--tol={lab.tol('flex-3')}", "--cache=1KiB", "--prompt=The file"]
    line += ["--max_tokens=8", "--temperature=0", "--stats", f"--output={tmp_path}/texts.json"]
    done = subprocess.run(
        [sys.executable, "-m", "memoryllm_jax.generate", *line],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    found = json.load(open(tmp_path / "texts.json"))
    (result,) = found["results"]
    assert done.stdout == "The file" + result["text"] + "\n" and len(result["tokens"]) == 8
    for name in ("hit_rate", "bytes_per_token", "fetch_ms_p50", "fetch_ms_p99"):
        assert name in done.stderr and name in found["stats"]
    with lab.model("flex-3") as model:
        assert written(model, [model.prompt("The file")], 8) == [result["tokens"]]


def test_prompts_come_from_flags_and_then_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("b\nc\n")
    assert generate.read_prompts(("a",), str(path)) == ["a", "b", "c"]
    for prompts, file, message in (
        (("a", " "), "", "prompt: expected some text, found none in prompt 2"),
        ((), "", "expected --prompt=TEXT or --prompts=FILE, found neither"),
        ((), str(tmp_path / "none"), "prompts: expected a text file with one prompt a line: .*No such file"),
    ):
        with pytest.raises(UserError, match=message):
            generate.read_prompts(prompts, file)
