"""What the compilers of accelerators make of the train step, ahead of time and without such a chip."""

import hlo
import pytest

from memoryllm_jax.config import load, resolve
from memoryllm_jax.model import sharding
from memoryllm_jax.training import chips, plan


@pytest.mark.parametrize("architecture", ["flex-3", "memory"])
def test_1b_trains_on_one_h100(chip_devices, architecture):
    """It fits with micro-batches, and copies no weight to pad it. FFN-C is 2,046 wide, FFN-M 3,418 or 5,464."""
    c = load(f"configs/1b.py:{architecture}")
    c.model.vocab_size, c.accumulate = 128_253, 128
    mesh = sharding.make_mesh(c.mesh, chip_devices("h100"))
    step = plan.CompiledStep(resolve(c), mesh)
    assert step.memory["total"] < chips.get("h100").memory
    padded = hlo.results(step.executable.as_text(), "pad")
    assert not [kind for kind in padded if kind.startswith("bf16")]
