"""What one process of speed.py measures: the training step of one architecture, or of base in another library."""

import ast
import contextlib
import math
import time
from collections.abc import Callable

import common
import jax
import numpy as np
import peers
from peers import PEERS

from memoryllm_jax.common import devices
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config import default, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import flops, sharding
from memoryllm_jax.training import loop, metrics
from memoryllm_jax.training.batches import HostBatch, TrainBatches, Windows, place
from memoryllm_jax.training.compilation import memory_needed
from memoryllm_jax.training.step import Trainer


def prepare(side: str, settings) -> tuple[dict, Callable[[], dict]]:
    """Makes a side's step, compiles it and trains one step.

    Args:
      settings: the Settings of speed.py.
    Returns: facts for the record, and a function that trains a round and returns its figures.
    Raises: UserError if the first loss is not that of an untrained model.
    """
    devices.limit_gpu_memory(0.95)
    dataset = Dataset(settings.data)
    config, name = config_of(side, dataset, settings), side.split("/")[0]
    start = time.perf_counter()
    if name in PEERS:
        facts, steps = peer_step(name, config, dataset, settings)
    else:
        facts, steps = our_step(config, dataset, settings)
    first = steps(1)
    if abs(first - math.log(dataset.vocab_size)) > 0.5:
        raise UserError(f"{side}: expected a first loss near ln V = {math.log(dataset.vocab_size):.2f}, found {first}")

    def measure():
        start = time.perf_counter()
        loss = steps(settings.steps)
        seconds = (time.perf_counter() - start) / settings.steps
        return {"seconds": seconds, "loss": loss, "peak_bytes": peak_memory(name, settings.platform)}

    return facts | {"first_loss": first, "first_seconds": time.perf_counter() - start}, measure


def config_of(side: str, dataset: Dataset, settings):
    """The config of a side such as memory/accumulate=4; a peer has that of base. Raises: UserError."""
    name, *overrides = side.split("/")
    c = default("base" if name in PEERS else name)
    for field in ("dim", "layers", "heads", "dtype", "loss_chunk"):
        c.model[field] = getattr(settings, field)
    c.batch_size, c.seq_len = settings.batch_size, settings.seq_len
    c.steps, c.optimizer.warmup_steps = 32, 1
    for override in overrides:
        field, _, value = override.partition("=")
        with contextlib.suppress(ValueError):  # a word such as full is no Python literal, and stays a string
            value = ast.literal_eval(value)
        try:
            c.update_from_flattened_dict({field: value})
        except (KeyError, TypeError) as error:
            raise ArgumentError("sides", f"{side}: {field}: expected a field of the config and its value") from error
    return loop.complete(resolve(c), dataset)


def windows_of(dataset: Dataset, settings) -> np.ndarray:
    """A batch from the middle of the training text: ids [B, T + 1]."""
    T = settings.seq_len
    stream = dataset.train.read(dataset.train.tokens // 2, settings.tokens + 1)
    return np.stack([stream[i * T : i * T + T + 1] for i in range(settings.batch_size)])


def flops_of(config, rows: int) -> dict:
    """FLOPs of a step by the formula of flops.py.

    Args:
      rows: rows of the token memory that are computed in a step.
    Returns: those done, those with the masked half of attention too, and those with FFN-M at every position.
    """
    m, tokens = config.model, config.batch_size * config.seq_len
    done = flops.train_flops(config, tokens, rows)
    masked_half = 3 * tokens * m.layers * 2 * m.dim * config.seq_len  # forward once, backward twice
    return {
        "flops": done,
        "flops_full_attention": done + masked_half,
        "flops_every_position": flops.train_flops(config, tokens, tokens),
    }


def our_step(config, dataset: Dataset, settings):
    """Makes the training step of one of our architectures.

    Returns: facts for the record, and a function steps(n) that trains n steps and returns the last loss. The fact
      "planned_bytes" is the compiled step's memory, by which a dry run decides whether it fits.
    """
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    state = trainer.init(jax.random.key(0))
    batches = TrainBatches(config, dataset, 1, [0])
    read = Windows(windows_of(dataset, settings), np.ones((config.batch_size, config.seq_len)))
    host = HostBatch({0: batches.shard_batch(read)})
    size = batches.sizes().holding(host.distinct)
    start = time.perf_counter()
    step = trainer.train.lower(trainer.state_shape, place(host, size, trainer.batch_sharding)).compile()
    compile_seconds = time.perf_counter() - start

    def steps(count):
        nonlocal state
        for _ in range(count):
            batch = place(host, size, trainer.batch_sharding)
            state, values = step(state, batch)
        return float(jax.device_get(values["loss"]))

    facts = {
        **flops_of(config, size),
        "parameters": flops.parameters(config)["total"],
        "rows": size,
        "distinct": host.distinct,
        "device": jax.devices()[0].device_kind,
        "attention": config.model.attention,
        "peak_flops": metrics.peak_flops(config) and metrics.peak_flops(config) / jax.device_count(),
        "compile_seconds": compile_seconds,
        "planned_bytes": memory_needed(step),
    }
    return facts, steps


def peer_step(name: str, config, dataset: Dataset, settings):
    """As `our_step`, for a peer. Raises: UserError if it has not as many parameters as base."""
    facts = flops_of(config, settings.tokens)
    if settings.platform == "gpu":
        facts |= peers.gpu_facts()
    facts["parameters"], step = PEERS[name](config.model, windows_of(dataset, settings), settings.platform)
    m = config.model
    expected = 2 * m.vocab_size * m.dim + m.layers * m.dim * (4 * m.dim + 3 * m.ffn_dim + 2) + m.dim
    if facts["parameters"] != expected:
        raise UserError(f"{name}: expected the {expected:,} parameters of base, found {facts['parameters']:,}")

    def steps(count):
        for _ in range(count):
            loss = step()
        return float(loss)  # read once, so that a GPU does not wait for this process between steps

    return facts, steps


def peak_memory(name: str, platform: str) -> int:
    """Peak memory in bytes of the side's device or, on a CPU, of this process."""
    if name not in PEERS:
        return common.peak_memory(jax.devices()[0])
    return peers.gpu_peak_memory() if platform == "gpu" else common.peak_memory()
