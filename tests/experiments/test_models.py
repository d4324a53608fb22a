"""Models that are compared: their labels, and combinations of options that are refused."""

import os

import pytest

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.evaluation.measure import Measure
from memoryllm_jax.experiments import models as models_lib
from memoryllm_jax.experiments.models import Models


def test_models_of_one_architecture_are_told_apart_by_their_folders(lab, tmp_path):
    os.symlink(lab.workdir("base"), tmp_path / "copy")
    models = Models([lab.workdir("base"), str(tmp_path / "copy")])
    assert models.labels == ["base", f"base {tmp_path}/copy"]
    assert models.facts["base: checkpoint"].endswith("step 16") and f"base {tmp_path}/copy: model" in models.facts


def test_a_tol_file_serves_one_model():
    with pytest.raises(ArgumentError, match="tol: expected one workdir, whose rows the file holds, found 2"):
        Models(["a", "b"], "x")
    with pytest.raises(ArgumentError, match="rows: expected a ToL file too"):
        Models(["a"], place="host")


def test_without_text_or_tasks_the_first_models_own_data_is_read(lab, tmp_path, capsys):
    read = []

    def experiment(models, page, measure):
        """What is measured."""
        read.append(measure.text.data)
        return {}

    models_lib.run(experiment, [Models([lab.workdir("base")])], str(tmp_path), measure=Measure())
    assert read == [lab.data_path] and "data: none is given" in capsys.readouterr().out
