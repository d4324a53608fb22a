"""Numbers of rows that the distinct ids of batch shards are padded to.

Each size compiles a step of its own, which takes minutes for a large model, so there are few, and all of them are
compiled before the first step. A step takes the smallest size that holds the largest of its S batch shards.
"""

import bisect
import math
from statistics import NormalDist
from typing import NamedTuple

# Shares of the steps that the sizes before the last one hold. In real text one standard deviation is 3% to 7% of the
# distinct ids (docs/performance.md), so the next size is near.
_SHARES = (0.5, 0.95)
_RISK = 0.01  # probability that a run meets a batch which the last planned size does not hold
_FEW_STEPS = 1000  # a shorter run gets one size: two more would take longer to compile than they save
_GROWTH = 1.25  # from one size to the next, beyond those planned


class Sizes(NamedTuple):
    """Sizes in rising order.

    Attributes:
      planned: sizes that the steps of a run need, all but certainly.
      most: the most distinct ids that a batch shard can have.
    """

    planned: tuple[int, ...]
    most: int

    def holding(self, distinct: int) -> int:
        """The smallest size that holds `distinct` ids. It may lie beyond those planned, and is then compiled late."""
        if distinct <= self.planned[-1]:
            return self.planned[bisect.bisect_left(self.planned, distinct)]
        size = self.planned[-1]
        while size < distinct:
            size = min(self.most, _round_up(size * _GROWTH, self.most))
        return size


def plan(
    mean: float, std: float, shards: int, steps: int, most: int, only_last: bool = False, largest_seen: int = 0
) -> Sizes:
    """Plans the sizes of a run.

    Counts of distinct ids are taken for normal values, independent between batch shards. A size is mean + std * z,
    where z is a quantile of the maximum of `shards` standard normal values. The last size is at least `largest_seen`:
    where a few sequences are in another language, say, counts have a longer tail than normal values.

    Args:
      mean, std: of the number of distinct ids of one batch shard.
      shards: number S of batch shards.
      steps: number of steps of the run.
      most: the most distinct ids that a batch shard can have.
      only_last: plan one size, which holds all steps.
      largest_seen: the largest of the counts that mean and std are of.
    """
    shares = [1 - _RISK / steps]
    if not only_last and steps >= _FEW_STEPS:
        shares = [*_SHARES, *shares]
    sizes = [mean + std * quantile_of_maximum(share, shards) for share in shares]
    sizes[-1] = max(sizes[-1], largest_seen)
    return Sizes(tuple(sorted({min(most, _round_up(size, most)) for size in sizes})), most)


def quantile_of_maximum(share: float, count: int) -> float:
    """The z that the largest of `count` independent standard normal values stays below with probability `share`.

    The distribution function of the maximum is Phi(z) ** count (David and Nagaraja, Order Statistics, 2003, section
    2.1), so z is Phi^-1(share ** (1 / count)).
    """
    # 1 - share ** (1 / count), of which a float near 1 would lose the digits
    tail = -math.expm1(math.log(share) / count)
    return -NormalDist().inv_cdf(tail)


def _round_up(size: float, most: int) -> int:
    multiple = 128 if most >= 4096 else 8  # 128 suits the tiles of matrix units; few ids would be mostly padding
    return math.ceil(size / multiple) * multiple
