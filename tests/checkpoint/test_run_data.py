"""The data that is read for a trained model: named, or that of its own run."""

import json
import shutil
import types

import msgspec
import pytest
from lab import DESCRIPTION

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.checkpoint.description import Data
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config import Config, DataConfig
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.verification import FILE


@pytest.fixture
def trained_on(tmp_path, data_path):
    """trained_on(path) returns what `run_data` asks of a TrainedModel, for a model that was trained on `data_path`."""
    dataset = Dataset(data_path)
    workdir = tmp_path / "w"
    workdir.mkdir()

    def trained_on(path, digest=dataset.digest):
        return types.SimpleNamespace(
            run=Config(data=DataConfig(path=path)),
            workdir=str(workdir),
            tokenizer=dataset.tokenizer(),
            description=msgspec.structs.replace(DESCRIPTION, data=Data(digest=digest)),
        )

    return trained_on


def test_without_a_path_the_runs_own_data_is_read_and_named(trained_on, data_path, copied, tmp_path, capsys):
    found = run_data.open_data(trained_on(str(copied)))
    assert found.digest == Dataset(data_path).digest
    expected = f"data: none is given, so the data that the model was trained on is read: {copied}\n"
    assert capsys.readouterr().out == expected
    found.validation.verify([0], 1)
    assert (tmp_path / "w" / FILE).exists()
    shutil.move(copied, tmp_path / "w" / "data")
    assert run_data.open_data(trained_on("embedded")).path == str(tmp_path / "w" / "data")


def test_named_data_must_be_of_the_models_tokenizer(trained_on, data_path):
    model = trained_on("none")
    assert run_data.open_data(model, data_path).path == data_path
    model.tokenizer = types.SimpleNamespace(digest="0" * 64)
    with pytest.raises(ArgumentError, match=r"data: .*: made with another tokenizer: expected 0000"):
        run_data.open_data(model, data_path)


def test_own_data_that_is_gone_changed_or_unknown_is_refused(trained_on, copied):
    gone = "data: none is given, and the model's training data{} cannot be opened: {}/dataset.json: expected a folder"
    with pytest.raises(ArgumentError, match=gone.format("", "/none")):
        run_data.open_data(trained_on("/none"))
    with pytest.raises(ArgumentError, match=gone.format(", from the folder where the run was started,", "none")):
        run_data.open_data(trained_on("none"))
    tree = json.loads((copied / "dataset.json").read_text())
    tree["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (copied / "dataset.json").write_text(json.dumps(tree))
    with pytest.raises(ArgumentError, match=f"calibration: none is given, and {copied} has changed since"):
        run_data.own_path(trained_on(str(copied)), "calibration")
    with pytest.raises(UserError, match="expected prepared data, as the model is imported and its own is not known"):
        run_data.open_data(trained_on("imported", digest="imported"))
