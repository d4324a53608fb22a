"""Workdirs whose runs differ in the seed alone are seeds of one model."""

import dataclasses
import types

import pytest

from memoryllm_jax.checkpoint import description
from memoryllm_jax.checkpoint.seeds import by_seed
from memoryllm_jax.common.errors import ArgumentError


def test_runs_that_differ_in_the_seed_alone_are_of_one_model(lab, monkeypatch):
    saved = description.read(lab.workdir("memory"), 16)
    runs = {"a": {}, "b": {"seed": 7}, "copy": {}, "longer": {"seed": 7, "steps": 99}, "other": {"seed": 8}}

    def read(folder, step):
        run = dataclasses.replace(saved.run(), **runs[folder])
        return types.SimpleNamespace(run=lambda: run, tokenizer=saved.tokenizer, data=saved.data)

    monkeypatch.setattr(description, "folder", lambda workdir: workdir)
    monkeypatch.setattr(description, "choose_step", lambda folder, step: 3 if folder == "other" else 16)
    monkeypatch.setattr(description, "read", read)
    assert by_seed(["a", "b"]) == [["a"], ["b"]]
    assert by_seed(["a", "longer"]) == [["a", "longer"]]
    assert by_seed(["a", "copy"]) == [["a", "copy"]]  # the same run twice
    with pytest.raises(ArgumentError, match=r"as many seeds of each model, found 2 of the model in a, 1 of .*longer"):
        by_seed(["a", "b", "longer"])
    with pytest.raises(ArgumentError, match="seeds of one model at one step, found step 16 in a and step 3 in other"):
        by_seed(["a", "other"])
