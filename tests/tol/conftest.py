"""Files and measurements that several tests of ToL files use."""

import functools

import pytest
import tol_files

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.data import dataset
from memoryllm_jax.tol import budget, build, codec
from memoryllm_jax.tol.sources import LiveSource, full_vectors


@pytest.fixture(scope="module", autouse=True)
def few_clips():
    """Fewer clips to choose from, which compile faster. The format does not depend on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_CLIPS", (1.0, 0.8, 0.5))
        yield


@pytest.fixture(scope="session")
def tokenizer(data_path):
    return dataset.Dataset(data_path).tokenizer()


@pytest.fixture(scope="session")
def mixed_file(tokenizer, tmp_path_factory):
    """(path, source) of a file with the layout `tol_files.mixed`, built in several chunks on one device."""
    path, source = str(tmp_path_factory.mktemp("tol") / "mixed.safetensors"), tol_files.Source(tokenizer)
    build.build(source, tol_files.mixed(), path, **tol_files.more())
    return path, source


@pytest.fixture(scope="session")
def measured(lab):
    """A function from a model's name to (source, scorer, full rows of the scored text's tokens)."""

    @functools.cache
    def measure(name):
        trained = TrainedModel(lab.workdir(name))
        source, scorer = LiveSource(trained), budget.scorer(trained, lab.data_path, tokens=1024)
        return source, scorer, full_vectors(source, scorer.ids)

    return measure
