"""The command `evaluate`: its record, its page, and its refusals."""

import json
import os
import subprocess
import sys

import pytest
from lab import CONTEXT, run_lines, with_devices

from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.evaluation.perplexity import Windows
from memoryllm_jax.inference.engine import Contribution


def test_the_command_writes_record_and_page_of_a_text(lab, tmp_path):
    workdir, out, page = f"--workdir={lab.workdir('memory')}", tmp_path / "out.json", tmp_path / "page"
    where = (f"--data={lab.data_path}", f"--tol={lab.tol('memory')}", "--rows=host", "--alpha=0.9", "--drop_layers=1")
    line = [sys.executable, "-m", "memoryllm_jax.evaluate", workdir, *where]
    line += ["--stride=16", "--max_tokens=400", f"--output={out}", f"--page={page}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, env=with_devices(2))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    windows = Windows(CONTEXT, 16, 400)
    with lab.model("memory") as model:
        model.contribute(Contribution(alpha=0.9, drop_layers=(1,)))
        text = perplexity.prepared_text(lab.data_path, "validation", model.tokenizer, windows)
        expected = perplexity.perplexity(model, text, windows)["loss"]
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
    about = {"path": lab.workdir("memory"), "step": 16, "architecture": "memory", "dtype": "float32"}
    about |= {"tol": lab.tol("memory"), "overlay": "", "alpha": 0.9, "drop_layers": ["1"]}
    assert result["model"] == about and result["rows"]["rows"] == "host" and result["split"] == "validation"
    assert f"{result['bits_per_byte']:.4f} bits per byte" in done.stdout
    assert json.loads((page / "evaluate.json").read_text())["results"] == result
    names = {"evaluate.html", "evaluate.json", "evaluate-quality.csv", "evaluate-context.csv", "evaluate-context.png"}
    assert set(os.listdir(page)) == names
    assert f"\nloss,{result['loss']!r},nats a token\n" in (page / "evaluate-quality.csv").read_text()
    html = (page / "evaluate.html").read_text()
    assert html.count(' nats">') == CONTEXT and "data:image/png;base64," in html and "https:" not in html


def test_the_command_refuses_in_one_line():
    words = {
        ("--data=a", "--tasks=b"): "error: expected --data=TEXT or --tasks=NAMES, found both\n",
        ("--stride=3", "--tasks=b"): "error: --stride: expected data too, without which it has no effect\n",
        ("--limit=3",): "error: --limit: expected tasks too, without which it has no effect\n",
    }
    ends = run_lines("memoryllm_jax.evaluate", *(("--workdir=nowhere", *arguments) for arguments in words))
    assert [(code, err) for code, _, err in ends] == [(1, text) for text in words.values()]
