"""What attention inside documents costs (config.data.document_mask), against whole sequences.

    python benchmarks/documents.py --output=benchmarks/results/NAME.json

Times attention and its gradients alone, by the backend that config.model.attention=auto chooses for the device. Lengths
of documents are drawn from a geometric distribution with each of the means; 0 stands for one document a sequence, where
the mask hides nothing. In each round all take turns, and ratios are taken within a round. `pairs` is the share of the
pairs of causal attention that lie inside documents: the time's share if masked work were skipped without loss. The time
of the processors, on a CPU, tells more than the clock where other programs run.
"""

import functools
from typing import Annotated

import common
import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.data import document_starts
from memoryllm_jax.model import attention, sharding

CALLS = 3  # of each side in a round


def drawn_starts(sequences: int, length: int, mean: int, rng: np.random.Generator) -> np.ndarray:
    """Where each position's document begins, int32 [B, T], for documents of `mean` tokens; 0: of whole sequences."""
    begins = rng.random((sequences, length)) < (1 / mean if mean else 0)
    return document_starts.starts(begins, True)


def calls(run) -> None:
    """What is timed of each side in a round."""
    for _ in range(CALLS):
        jax.block_until_ready(run())


def main(
    sequences: Annotated[int, Option("sequences", least=1)] = 2,
    length: Annotated[int, Option("tokens of a sequence", least=1)] = 2048,
    heads: Annotated[int, Option("heads", least=1)] = 8,
    head_dim: Annotated[int, Option("numbers of a head", least=1)] = 64,
    dtype: Annotated[str, Option("dtype", choices=("float32", "bfloat16"))] = "float32",
    means: Annotated[tuple[int, ...], Option("mean lengths of documents in tokens; 0: whole sequences")] = (
        0,
        2048,
        512,
        128,
    ),
    rounds: Annotated[int, Option("rounds", least=1)] = 9,
    output: Annotated[str, Option("JSON file for the record", writes=True)] = "",
) -> None:
    rng = np.random.default_rng(0)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    backend = attention.resolve_backend("auto", dtype, head_dim)
    shape = sequences, length, heads, head_dim
    q, k, v, gradient = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))

    @jax.jit
    def forward_and_backward(start_BT):
        kernel = functools.partial(attention.causal_attention, backend=backend, start_BT=start_BT)
        out, vjp = jax.vjp(kernel, q, k, v)
        return out, vjp(gradient)

    starts = {"unmasked": None} | {str(mean): jnp.asarray(drawn_starts(*shape[:2], mean, rng)) for mean in means}
    times = {name: [] for name in starts}
    with jax.set_mesh(mesh):
        sides = {name: functools.partial(forward_and_backward, start) for name, start in starts.items()}
        for run in sides.values():
            jax.block_until_ready(run())  # compiles
        for number in range(rounds):
            # The first of a round may profit from what the one before left behind, so they take turns at it.
            first = number % len(sides)
            for name in [*list(sides)[first:], *list(sides)[:first]]:
                times[name].append(common.seconds(functools.partial(calls, sides[name]), CALLS))
    results = {"device": jax.devices()[0].device_kind, "backend": backend, "dtype": dtype, "shape": shape}
    for name, start in starts.items():
        found = {} if start is None else {"pairs": float(document_starts.attention_share(start))}
        for kind in ("seconds", "processor_seconds"):
            measured, unmasked = ([each[kind] for each in times[side]] for side in (name, "unmasked"))
            found[kind] = common.spread(measured) | {"over_unmasked": common.ratio(measured, unmasked)}
        results[name] = found
        print(f"{name}: {found}", flush=True)
    common.write(output, results, {})


if __name__ == "__main__":
    cli.run(main)
