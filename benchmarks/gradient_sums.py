"""How far sums of gradients over many devices in bfloat16 are from exact ones, by simulation.

    python benchmarks/gradient_sums.py --output=benchmarks/results/gradient_sums.json

Each device has a gradient of its own: a common part, and noise of its batch shard. A ring reduce-scatter adds them one
device after the other, and rounds each partial sum to the dtype. The error is that of the sum as a vector, relative to
the exact sum, which is what a step's direction gets. With float32, each device sends twice as many bytes for gradients
(`config.model.reduce_dtype`).
"""

from typing import Annotated

import common
import ml_dtypes
import numpy as np

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option

ELEMENTS = 200_000
NOISE = (0.0, 1.0, 10.0)  # standard deviation of a device's noise over that of the common part


def ring_sum(gradients, dtype) -> np.ndarray:
    """The sum of the gradients, each partial sum rounded to the dtype."""
    total = next(gradients).astype(dtype)
    for gradient in gradients:
        total = (total.astype(np.float32) + gradient.astype(dtype).astype(np.float32)).astype(dtype)
    return total.astype(np.float64)


def error(devices: int, noise: float, dtype, seed: int) -> float:
    """Relative error of the sum over devices."""
    common_part = np.random.default_rng(seed).normal(size=ELEMENTS)

    def drawn():
        rng = np.random.default_rng(seed + 1)
        for _ in range(devices):
            yield (common_part + noise * rng.normal(size=ELEMENTS)).astype(np.float32)

    exact = sum(gradient.astype(np.float64) for gradient in drawn())
    return float(np.linalg.norm(ring_sum(drawn(), dtype) - exact) / np.linalg.norm(exact))


def main(
    seeds: Annotated[int, Option("repetitions with other draws", least=1)] = 3,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    results = {}
    for noise in NOISE:
        for devices in (8, 64, 512):
            found = {}
            for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float32", np.float32)):
                found[name] = sorted(error(devices, noise, dtype, 10 * seed) for seed in range(seeds))
            results[f"noise {noise:g}, {devices} devices"] = found
            print(f"noise {noise:g}, {devices} devices", found, flush=True)
    common.write(output, results, {"elements": ELEMENTS})


if __name__ == "__main__":
    cli.run(main)
