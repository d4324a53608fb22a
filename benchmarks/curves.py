"""Trains base, memory and flex-3 of 30M parameters for as long as there is time, and records their curves.

    python benchmarks/curves.py --data=DIR --workdir=DIR --budget=300 --output=benchmarks/results/NAME.json

The sides train in turn, each for an equal share of the remaining time, and save a checkpoint when theirs is over. The
same line again goes on from there. All have the learning rates of a run of --tokens tokens, so their losses can be
compared at equal tokens before the runs are complete; the losses of complete runs are lower. The record says how many
passes over the data a complete run makes. Without --data it is Python's own texts. They are short, and a complete run
is cut to four passes over them.
"""

import dataclasses
import os
import signal
import threading
import time
from typing import Annotated

import common

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import Config, default, resolve
from memoryllm_jax.data import shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.documents import EMBEDDED
from memoryllm_jax.model import flops as flops_lib
from memoryllm_jax.training import loop, metrics

_LEAST_SLICE_S = 1  # a shorter slice would be over before the run has started


@dataclasses.dataclass(frozen=True)
class Settings:
    """The models and their training."""

    data: Annotated[str, Option("prepared data, or embedded")] = EMBEDDED
    tokens: Annotated[float, Option("tokens that each side is to train on", least=1)] = 300e6
    sides: Annotated[tuple[str, ...], Option("architectures")] = ("base", "memory", "flex-3")
    dim: Annotated[int, Option("model width")] = 512
    layers: Annotated[int, Option("layers")] = 10
    heads: Annotated[int, Option("heads")] = 8
    dtype: Annotated[str, Option("of the computation")] = "bfloat16"
    seq_len: Annotated[int, Option("tokens a sequence")] = 1024
    batch_size: Annotated[int, Option("sequences a step")] = 64
    peak_lr: Annotated[float, Option("peak learning rate")] = 1e-3


def prepared(settings: Settings, workdir: str) -> tuple[str, int]:
    """Prepares the embedded texts, unless they are, or other data is given.

    Returns: (folder of the data, its training tokens). Raises: UserError.
    """
    path = settings.data
    if path == EMBEDDED:
        path = f"{workdir}/data"
        if not os.path.exists(f"{path}/dataset.json"):
            shards.prepare(EMBEDDED, "sentencepiece:train:4096", path, validation_fraction=0.02)
    return path, Dataset(path).train.tokens


def config_of(side: str, settings: Settings, data: str, available: int) -> Config:
    """The config of a side's run.

    Args:
      data: folder of the prepared data.
      available: its training tokens.
    """
    c = default(side)
    c.model.update({name: getattr(settings, name) for name in ("dim", "layers", "heads", "dtype")})
    c.seq_len, c.batch_size, c.data.path = settings.seq_len, settings.batch_size, data
    tokens = min(settings.tokens, 4 * available) if settings.data == EMBEDDED else settings.tokens
    c.steps = max(1, int(tokens / (c.batch_size * c.seq_len)))
    c.data.epochs = int(tokens / available) + 2  # a pass has whole windows only, and so fewer tokens
    c.optimizer.peak_lr, c.optimizer.final_lr = settings.peak_lr, settings.peak_lr / 10
    c.optimizer.warmup_steps = min(200, c.steps // 10)
    c.eval.every = max(1, c.steps // 40)
    c.eval.batches = 16
    c.checkpoint.every, c.checkpoint.keep = c.steps, 1
    c.log.tensorboard = False
    return resolve(c)


def train_for(config: Config, workdir: str, seconds: float) -> bool:
    """Trains on from the newest checkpoint, and stops with a new one. Returns: whether the run is complete."""
    # What stops it is the signal that stops any run, so nothing is lost.
    timer = threading.Timer(max(seconds, _LEAST_SLICE_S), os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        return loop.train(config, workdir) == 0
    finally:
        timer.cancel()


def curve_of(config: Config, workdir: str) -> list[dict]:
    """The evaluations of a run so far: {"step", "tokens", "seconds", "flops", "loss"}.

    Seconds and FLOPs are those of training until then, without compiling, evaluating and saving.
    """
    if not os.path.exists(f"{workdir}/metrics.jsonl"):
        return []
    # A record of training holds no duration: it follows from the tokens since the record before, and their speed.
    curve, tokens, seconds, flops = [], 0, 0.0, 0.0
    for record in metrics.records(f"{workdir}/metrics.jsonl"):
        if isinstance(record, metrics.TrainRecord):
            lap = (record.tokens - tokens) / record.tokens_per_second
            tokens, seconds = record.tokens, seconds + lap
            flops += lap * record.model_flops_per_second
        else:  # the last record of training may be some steps ago, so its tokens are not those of this step
            seen = record.step * config.batch_size * config.seq_len
            point = {"step": record.step, "tokens": seen, "seconds": seconds, "flops": flops}
            curve.append(point | {"loss": record.loss})
    return curve


def results_of(configs: dict[str, Config], workdir: str) -> dict:
    """The curves so far, and the held-out losses at the last tokens that all sides have reached.

    Args:
      configs: {side: config of its run}.
    """
    results = {}
    for side, config in configs.items():
        curve = curve_of(config, f"{workdir}/{side}")
        if curve:
            results[side] = {"parameters": flops_lib.parameters(config), "curve": curve}
    by_tokens = {side: {point["tokens"]: point["loss"] for point in run["curve"]} for side, run in results.items()}
    shared = set.intersection(*map(set, by_tokens.values())) if len(by_tokens) == len(configs) else set()
    if shared:
        last = max(shared)
        results["at_equal_tokens"] = {"tokens": last} | {side: losses[last] for side, losses in by_tokens.items()}
    return results


def device_kind() -> str:
    """JAX's name of the device."""
    import jax

    return jax.devices()[0].device_kind


def main(
    settings: Settings,
    workdir: Annotated[str, Option("folder for the runs' checkpoints, from which the same line goes on")],
    budget: Annotated[float, Option("seconds for all sides together", least=1)] = 300,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    end = time.monotonic() + budget
    data, available = prepared(settings, workdir)
    complete = {}
    configs = {side: config_of(side, settings, data, available) for side in settings.sides}
    for number, (side, config) in enumerate(configs.items()):
        share = (end - time.monotonic()) / (len(settings.sides) - number)
        complete[side] = train_for(config, f"{workdir}/{side}", share)
        tokens = config.steps * config.batch_size * config.seq_len
        more = {"data": "Python's own texts" if settings.data == EMBEDDED else "prepared data"}
        more |= {"tokens": tokens, "passes": tokens / available, "complete": complete, "device": device_kind()}
        more["settings"] = dataclasses.asdict(settings) | {"data": ""}
        common.write(output, results_of(configs, workdir), more)
        print(f"{side}: {'complete' if complete[side] else 'goes on with the same line'}", flush=True)


if __name__ == "__main__":
    cli.run(main)
