"""The command `analyze`: every analysis writes complete files; what it refuses."""

import contextlib
import inspect
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from by_hand import LENGTH, SMALL, key_value_model
from lab import run_lines

from memoryllm_jax import analyze
from memoryllm_jax.analysis import run as analysis_run
from memoryllm_jax.analysis.corpus import CorpusOptions, ExampleOptions
from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.dataset import Dataset


def run(command, model, output, **options):
    """Runs an analysis. Returns: the line that it prints."""
    return analysis_run.run(analyze.ANALYSES[command], [model], output, **options)


FEW = {"keys": 3, "top": 3, "clusters": 5, "picture": "pca"}


@pytest.mark.parametrize("command", analyze.ANALYSES)
def test_an_analysis_writes_complete_files(lab, data_path, tmp_path, command):
    workdir = lab.workdir("flex-3")
    parameters = inspect.signature(analyze.ANALYSES[command]).parameters
    options = {name: value for name, value in (FEW | {"data": data_path}).items() if name in parameters}
    if "text" in parameters:
        few = {"examples": 50} if parameters["text"].annotation is ExampleOptions else {}
        options["text"] = parameters["text"].annotation(data_path, length=LENGTH, limit=200, **few)
    line = run(command, key_value_model(workdir), str(tmp_path), **options)
    assert line.startswith(f"{tmp_path}/{command}.html: ")
    page = (tmp_path / f"{command}.html").read_text()
    assert page.count("<img") >= 1 and "http" not in page.replace(data_path, "")
    assert "flex-3, 2 layers of width 32" in page and f"{workdir}, step 16" in page
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_pages_of_tokens_show_the_most_frequent(lab, data_path, tmp_path):
    train = Dataset(data_path).train
    counts = np.bincount(train.read(0, train.tokens), minlength=512)
    run("neighbours", key_value_model(lab.workdir("memory")), str(tmp_path), tokens=50, data=data_path)
    assert f"the 50 most frequent of {data_path}" in (tmp_path / "neighbours.html").read_text()
    shown = np.genfromtxt(tmp_path / "neighbours-tokens.csv", delimiter=",", skip_header=1, usecols=1, dtype=int)
    assert list(dict.fromkeys(shown)) == np.argsort(-counts, kind="stable")[:50].tolist()


def test_a_sheet_has_a_line_for_each_trigger_and_proxies_beside_chance(lab, data_path, tmp_path):
    text = CorpusOptions(data_path, length=LENGTH, limit=200)
    run("annotate", key_value_model(lab.workdir("flex-3")), str(tmp_path), text=text, keys=3, top=4)
    sheet = (tmp_path / "annotate-sheet.csv").read_text().splitlines()
    assert sheet[0].endswith("prefix,pattern,kind") and len(sheet) == 1 + 2 * 3 * 4  # layers, keys, triggers
    proxies = np.genfromtxt(tmp_path / "annotate-proxies.csv", delimiter=",", names=True)
    assert (proxies["embedding_similarity"] != proxies["embedding_similarity_at_random"]).any()


@pytest.mark.parametrize("command", ["coefficients", "clusters", "clustering", "outliers", "neighbours"])
def test_analyses_of_ffn_m_refuse_base(lab, tmp_path, command):
    with pytest.raises(UserError, match=f"{command}: expected a memory or flex model, found base"):
        run(command, key_value_model(lab.workdir("base")), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_analysis_takes_one_model(lab):
    options = analysis_run.ModelOptions((lab.workdir("memory"), lab.workdir("base")))
    with pytest.raises(UserError, match="workdir: expected one model, or runs that differ in the seed alone, found"):
        options.check()


def test_ratios_of_outliers_that_are_no_numbers_are_refused(lab, tmp_path):
    message = "ratio: expected numbers above zero such as 5,10,20, found '5,nan'"
    with pytest.raises(UserError, match=re.escape(message)):
        run("outliers", key_value_model(lab.workdir("memory")), str(tmp_path), ratio=("5", "nan"))


def test_analyses_without_text_load_no_attention(lab):
    with contextlib.closing(KeyValueModel.open(lab.workdir("memory"), with_attention=False, sizes=SMALL)) as model:
        assert not any("attention" in layer for layer in model.params["layers"])
        assert model.rows(0, np.arange(3)).shape == (3, 32)


def test_help_gives_the_definition_and_the_options_and_those_of_other_analyses_are_refused():
    lines = ("alpha", "--help"), ("clustering", "--workdir=w", "--output=o", "--data=d")
    (helped, shown, _), (refused, _, err) = run_lines("memoryllm_jax.analyze", *lines)
    assert helped == 0 and "MemoryLLM, Table 1" in shown
    for option in ("--alphas", "--workdir", "--max_tokens"):
        assert option in shown
    assert refused == 1
    assert re.fullmatch("error: clustering: takes no --data, which is an option of coefficients, .*\n", err)


def test_the_command_ends_with_a_line_that_names_the_page(lab, tmp_path):
    line = [sys.executable, "-m", "memoryllm_jax.analyze", "triggers", "--key=1:3", "--top=1"]
    line += [f"--workdir={lab.workdir('memory')}", f"--output={tmp_path}"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith(f"{tmp_path}/triggers.html: ")


def test_an_unknown_command_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analyze", "trigers", "--help"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(analyze.__file__, run_name="__main__")
    assert re.match("error: expected one of coefficients, .*, found trigers\n", capsys.readouterr().err)
