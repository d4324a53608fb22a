"""What a variant costs, so that a comparison can say which costs are equal."""

import math
import os
from typing import NamedTuple

from memoryllm_jax.common import storage
from memoryllm_jax.config import Config
from memoryllm_jax.model import flops
from memoryllm_jax.training import metrics

_BYTES = 2  # of a number when serving, in bfloat16
_EQUAL = 0.01  # costs that differ by at most this share count as equal


class Costs(NamedTuple):
    """Costs of a variant, its parameters padded to nothing.

    total: parameters.
    active: those that every token passes: attention, FFN-C, gates and norms.
    memory: those of the token memory. Embedding and head are the rest of the total.
    train_flops: FLOPs a token in training, with the rows of the token memory that were evaluated; NaN if not recorded.
    serve_flops: FLOPs a token when rows are looked up, at a context of seq_len tokens.
    row_bytes: bytes of rows read a token when serving, in bfloat16.
    weight_bytes: bytes of weights read a token when serving, in bfloat16: active parameters and head.
    """

    total: int
    active: int
    memory: int
    train_flops: float
    serve_flops: float
    row_bytes: int
    weight_bytes: int

    def shown(self, reference: "Costs") -> list[str]:
        """The costs as a table shows them, with "=" at those that equal the reference's; "" for what is not known."""
        return [_shown(value, other, unit) for value, other, unit in zip(self, reference, _UNITS)]


COLUMNS = (
    "parameters, M",
    "active, M",
    "memory, M",
    "training MFLOP a token",
    "serving MFLOP a token",
    "kB of rows read a token",
    "MB of weights read a token",
)
_UNITS = (1e6, 1e6, 1e6, 1e6, 1e6, 1e3, 1e6)


_NAMES = ("parameters", "active", "memory", "training FLOPs", "serving FLOPs", "row bytes", "weight bytes")


def _is_equal(value: float, other: float) -> bool:
    return abs(value - other) <= _EQUAL * abs(other)


def _shown(value: float, other: float, unit: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value / unit:.4g}" + ("\u00a0=" if _is_equal(value, other) else "")


def equal(a: Costs, b: Costs) -> list[str]:
    """Names of the costs that are equal."""
    return [name for name, value, other in zip(_NAMES, a, b) if _is_equal(value, other)]


def of_run(config: Config, workdir: str) -> Costs:
    """The costs of a run.

    Args:
      config: with the number of ids of its data.
      workdir: of the run, which holds its metrics.jsonl.
    """
    m, counts = config.model, flops.parameters(config)
    head = m.vocab_size * m.dim
    return Costs(
        total=counts["total"],
        active=counts["active"],
        memory=counts["memory"],
        train_flops=_train_flops(os.path.join(workdir, "metrics.jsonl")),
        serve_flops=flops.train_flops(config, tokens=1, rows=0) / 3,
        row_bytes=_BYTES * len(m.row_layers) * m.row_dim,
        weight_bytes=_BYTES * (counts["active"] + head),
    )


def _train_flops(path: str) -> float:
    """Mean FLOPs of a training token, by the records of a run; NaN without any."""
    if not storage.exists(path):
        return math.nan
    found = [record for record in metrics.records(path) if isinstance(record, metrics.TrainRecord)]
    if not found:
        return math.nan
    return sum(record.model_flops_per_second / record.tokens_per_second for record in found) / len(found)
