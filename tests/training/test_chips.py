"""Accelerators by their data sheets."""

import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.training import chips


def test_numbers_of_devices_that_make_no_slice_are_refused():
    with pytest.raises(UserError, match=r"--chip: expected one of a100, .*, found 'tpu'"):
        chips.get("tpu")
    with pytest.raises(UserError, match="--devices: expected up to 8 or whole nodes of 8, found 12"):
        chips.devices("h100", 12)
    with pytest.raises(UserError, match="--devices: expected a power of two from 4 on for a slice of v5p"):
        chips.devices("v5p", 24)
