"""Which of the planned sizes steps take, by simulation on prepared data (memoryllm_jax/training/sizes.py).

    python benchmarks/distinct_ids.py --data=DIR --output=benchmarks/results/distinct_ids.json

The distinct ids of batch shards of windows in shuffled order are counted. A step is simulated by drawing the counts of
its S shards, and takes the smallest size that holds the largest. `beyond_one_shard` is the share of steps beyond the
mean + 3 standard deviations of one shard, by which sizes were planned before.
"""

from typing import Annotated

import common
import numpy as np

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.training import sizes

LENGTH = 2048  # tokens of a sequence
STEPS = 100_000  # of the planned run
SAMPLES = 256  # counts that the sizes are planned from, as in Batches.sizes


def distinct_counts(windows: np.ndarray, sequences: int, wanted: int, rng) -> np.ndarray:
    """The distinct ids of batch shards of this many sequences, drawn as an epoch draws them."""
    counts = []
    while len(counts) < wanted:
        order = rng.permutation(len(windows))
        for first in range(0, len(order) - sequences + 1, sequences):
            counts.append(len(np.unique(windows[order[first : first + sequences]])))
    return np.array(counts[:wanted])


def simulated(counts: np.ndarray, sequences: int, shards: int, vocab_size: int, rng) -> dict:
    """The planned sizes, and which of them simulated steps take."""
    sample = rng.choice(counts, min(SAMPLES, max(16, 4096 // sequences)))
    most = min(sequences * LENGTH, vocab_size)
    planned = sizes.plan(sample.mean(), sample.std(), shards, STEPS, most, largest_seen=int(sample.max()))
    largest = rng.choice(counts, (4_000_000 // shards if shards > 100 else 40_000, shards)).max(axis=1)
    taken = np.array([planned.holding(int(count)) for count in largest])
    return {
        "sizes": planned.planned,
        "share_of_steps": [float((taken == size).mean()) for size in planned.planned],
        "beyond_planned": float((taken > planned.planned[-1]).mean()),
        "padding_over_largest_shard": float(taken.mean() / largest.mean() - 1),
        "beyond_one_shard": float((largest > counts.mean() + 3 * counts.std()).mean()),
    }


def main(
    data: Annotated[str, Option("prepared data")],
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    rng = np.random.default_rng(0)
    tokens = Dataset(data).train
    count = (tokens.tokens - 1) // LENGTH
    windows = tokens.read(0, count * LENGTH).reshape(count, LENGTH)
    results = {}
    for sequences, wanted in ((1, count), (4, 20_000), (16, 8000), (64, 2000)):
        counts = distinct_counts(windows, sequences, wanted, rng)
        found = {"mean": counts.mean(), "deviation_over_mean": counts.std() / counts.mean()}
        for shards in (1, 8, 64, 512):
            found[f"{shards} shards"] = simulated(counts, sequences, shards, tokens.vocab_size, rng)
            print(sequences, shards, found[f"{shards} shards"], flush=True)
        results[f"{sequences} sequences a shard"] = found
    common.write(output, results, {"vocabulary": tokens.vocab_size, "tokens": tokens.tokens, "length": LENGTH})


if __name__ == "__main__":
    cli.run(main)
