"""The planned numbers of distinct ids."""

import numpy as np
import pytest

from memoryllm_jax.training import sizes


@pytest.mark.parametrize("count", [1, 8, 512])
def test_quantiles_of_the_maximum_are_those_of_drawn_values(count):
    drawn = np.random.default_rng(0).normal(size=(4000, count)).max(axis=1)
    for share in (0.5, 0.95):
        assert (drawn < sizes.quantile_of_maximum(share, count)).mean() == pytest.approx(share, abs=0.02)
    # 4.9 standard deviations where 1 - share is below the spacing of floats near 1 divided by the count
    assert sizes.quantile_of_maximum(1 - 1e-15, count) > 7.9


def test_a_size_beyond_those_planned_grows_to_all_ids_that_a_shard_can_have():
    planned = sizes.plan(mean=6000, std=400, shards=8, steps=100_000, most=16_384)
    last = planned.planned[-1]
    assert len(planned.planned) == 3 and last % 128 == 0 and last < 9000
    assert planned.holding(last) == last and planned.holding(planned.planned[0] + 1) == planned.planned[1]
    assert last < planned.holding(last + 1) <= 1.25 * last + 128 and planned.holding(16_384) == 16_384
    assert sizes.plan(6000, 400, 8, 100_000, 16_384, largest_seen=12_001).planned == (*planned.planned[:2], 12_032)
    # Two more steps to compile would take a short run longer than they save.
    assert sizes.plan(6000, 400, 8, 100, 16_384).planned == sizes.plan(6000, 400, 8, 100, 16_384, True).planned
