"""Data, checkpoints, ToL files and overlays from an earlier version still open, and give the same results.

tests/made_before/README.md says how they were made.
"""

import contextlib
import json
import os
import shutil

import jax
import numpy as np
import pytest

from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.evaluation.perplexity import Windows, perplexity, prepared_text
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.tol import serving
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.training import loop

FOLDER = os.path.join(os.path.dirname(__file__), "made_before")
DATA = os.path.join(FOLDER, "data")
with open(os.path.join(FOLDER, "expected.json")) as file:
    EXPECTED = json.load(file)


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_models_give_the_text_and_loss_that_they_gave(name):
    expected = EXPECTED["runs"][name]
    paths = {option: os.path.join(FOLDER, path) for option, path in expected["options"].items()}
    with contextlib.closing(serving.open_engine(**paths)) as engine:
        windows = Windows(engine.context, engine.context)
        found = perplexity(engine, prepared_text(DATA, "validation", engine.tokenizer, windows), windows)
        assert found["tokens"] == expected["tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        prompts = [engine.prompt(text["prompt"]) for text in expected["greedy"]]
        new: list[list[int]] = [[] for _ in prompts]
        for step in engine.generate(prompts, 24, Sampling(0)):
            for sequence, token in step:
                new[sequence].append(token)
        assert new == [text["tokens"] for text in expected["greedy"]]


def test_prepared_data_still_matches_its_checksums():
    Dataset(DATA).verify()


@pytest.mark.parametrize("name", EXPECTED["inspect"])
def test_tol_files_hold_what_they_held(name):
    expected = EXPECTED["inspect"][name]
    with contextlib.closing(TolFile(os.path.join(FOLDER, f"{name}.safetensors"))) as tol:
        assert tol.size == expected["size"]
        assert json.loads(json.dumps(tol.layout.to_json())) == expected["layout"]
        assert {key: text for key, text in tol.metadata.items() if key != "layout"} == expected["metadata"]


def test_training_goes_on_from_a_checkpoint_made_before(tmp_path, monkeypatch):
    shutil.copytree(os.path.join(FOLDER, "memory"), tmp_path / "memory")
    monkeypatch.chdir(FOLDER)  # the checkpoint's config.data.path is relative to this folder
    workdir = str(tmp_path / "memory")
    config = config_of(workdir)
    assert config.mesh == MeshConfig()
    assert loop.train(config, workdir, jax.devices()[:1]) == 0
    with open(tmp_path / "memory" / "result.json") as file:
        validation = json.load(file)["validation"]
    # Twenty more steps on another version of JAX may round differently.
    np.testing.assert_allclose(validation["loss"], EXPECTED["went_on"]["memory"]["validation"]["loss"], atol=1e-3)
