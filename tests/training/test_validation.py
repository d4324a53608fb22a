"""The loss on the held-out split, and on that of each source of a mixture."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lab import read_all

from memoryllm_jax.config import MeshConfig
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model.sharding import make_mesh
from memoryllm_jax.training.batches import ValidationBatches
from memoryllm_jax.training.validation import Validation


class IdTrainer:
    """Gives each target a loss of a hundredth of its id."""

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch_sharding = NamedSharding(mesh, P("fsdp"))

    def evaluate(self, params, batch):
        weights = np.asarray(batch.weights_SAN)
        return (np.asarray(batch.targets_SAN) * weights).sum() / 100, weights.sum()


def test_losses_are_means_over_all_held_out_tokens_and_over_those_of_each_source(make_config, data_path, swapped):
    config = make_config("memory", batch_size=256, **{"eval.batches": 0, "model.vocab_size": 512})
    dataset = Dataset(f"{data_path}:0.5,{swapped}:0.5")
    batches = ValidationBatches(config, dataset, 1, [0])
    found = Validation(1, batches, IdTrainer(), batches.sizes(), lambda: False)(None)
    ids = [read_all(Dataset(path), "validation")[1:] / 100 for path in (data_path, str(swapped))]
    expected = [np.concatenate(ids), *ids]
    for result, losses in zip([found, *found["sources"].values()], expected, strict=True):
        assert result["tokens"] == len(losses)
        assert result["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    held_out = Dataset(str(swapped)).validation
    bytes_a_token = held_out.bytes / (held_out.tokens - 1)
    small = found["sources"]["small"]
    assert small["bits_per_byte"] == pytest.approx(small["loss"] / math.log(2) / bytes_a_token)
