"""Time and memory of `analyze clustering` for one layer of a large vocabulary, on vectors that are drawn at random.

    python benchmarks/clustering.py --vocab_size=128256 --width=2048

A token's vector is a random sum of 32 directions plus noise in all, brought to unit length. Vectors without structure
take longer, because more tokens may be neighbours of a sampled one. Making the coefficients is not part of it.
"""

import resource
import time
import types
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import clustering
from memoryllm_jax.analysis.clusters import fit
from memoryllm_jax.analysis.key_values import KeyValueModel, Sizes
from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option

_CHUNK = 8192  # vectors that are drawn at a time


class Vocabulary:
    """What the analysis asks of a model beside its vectors."""

    sizes = Sizes()
    chunks, chunk_count = KeyValueModel.chunks, KeyValueModel.chunk_count

    def __init__(self, size: int):
        self.config = types.SimpleNamespace(vocab_size=size)
        self.every_id = np.arange(size, dtype=np.int32)


def unit_vectors(draw, size: int, width: int, latent: int = 32, noise: float = 0.3) -> np.ndarray:
    """Random vectors of unit length, float32 [size, width]."""
    directions = draw.standard_normal((latent, width)).astype(np.float32)
    x = np.empty((size, width), np.float32)
    for start in range(0, size, _CHUNK):
        count = min(_CHUNK, size - start)
        signal = draw.standard_normal((count, latent)).astype(np.float32) @ directions
        piece = signal + noise * np.sqrt(latent) * draw.standard_normal((count, width)).astype(np.float32)
        x[start : start + count] = piece / np.linalg.norm(piece, axis=1, keepdims=True)
    return x


def main(
    vocab_size: Annotated[int, Option("number of tokens", least=1000)] = 128_256,
    width: Annotated[int, Option("elements of a vector", least=1)] = 2048,
    nodes: Annotated[int, Option("tokens whose coefficients are averaged", least=2)] = 300,
) -> None:
    draw, model = np.random.default_rng(0), Vocabulary(vocab_size)
    unit_VF = jnp.asarray(unit_vectors(draw, vocab_size, width))
    began, cpu_before = time.monotonic(), time.process_time()
    labels_V, _ = fit(model, unit_VF.__getitem__, 20, 0)
    nodes_S = np.sort(draw.choice(vocab_size, nodes, replace=False)).astype(np.int32)
    found = clustering.nodes_of(model, unit_VF, labels_V, nodes_S, 10, "")
    mean, error = clustering.mean_and_error(found.coefficient_S, vocab_size)
    wall, cpu = time.monotonic() - began, time.process_time() - cpu_before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"coefficient {mean:.4f} ± {error:.4f}; wall {wall:.0f} s, CPU {cpu:.0f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    cli.run(main)
