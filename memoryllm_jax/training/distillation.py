"""Fits FFN-M of a converted model to what base's layers add for each token (`config.start.memory=distill`).

A layer of the converted model computes Y, its output without the token memory, from its own stream X, and adds the row
of the token. The row that brings the layer's output nearest to base's stream, in mean square over a text, is the mean
of base's X_{l+1} - Y over the positions of the token. FFN-M_l is fitted to these means, from its copy of base's FFN.
Then the next layer reads the stream with the fitted rows, so that its rows make up for what the layers before it miss.

The sums over positions are the transpose of the lookup that training reads embeddings with (`embed`, `take_rows`), so
they are sharded as the embedding, and one layer's [V, D] exists at a time. The streams of the whole text stay on the
devices from layer to layer, each device with its own sequences.

Shapes: B sequences, T positions, D model width, V token ids, L layers, S batch shards, U distinct token ids of a shard,
N positions of a shard, K steps of the fit.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from memoryllm_jax.common import hosts
from memoryllm_jax.common.progress import Progress, duration
from memoryllm_jax.config import Config, ModelConfig
from memoryllm_jax.model import flops, memories, transformer
from memoryllm_jax.model.sharding import batch_shards, constrain, spec
from memoryllm_jax.model.token_memory import embed, take_rows
from memoryllm_jax.training.batches import Batch, TrainBatches
from memoryllm_jax.training.feeder import Feeder
from memoryllm_jax.training.step import Trainer

_FIT_STEPS = 100
_AHEAD = 8  # micro-batches that the host dispatches before it waits for the devices
_LEAST_FIT_IDS, _MOST_FIT_IDS = 512, 8192


class _Where(NamedTuple):
    """The token ids of a micro-batch, as of `Batch`, and the beginnings of its documents."""

    ids_SU: jax.Array
    index_SN: jax.Array
    start_SN: jax.Array | None


class _Streams(NamedTuple):
    """The residual streams of a micro-batch before a layer."""

    base_BTD: jax.Array
    converted_BTD: jax.Array


def text_config(config: Config) -> Config:
    """The config of a run whose steps are as many as hold config.start.distill_tokens: its batches are the text."""
    steps = math.ceil(config.start.distill_tokens / (config.batch_size * config.seq_len))
    return dataclasses.replace(config, steps=steps)


def _base_model(m: ModelConfig) -> ModelConfig:
    """The base model that a model was converted from."""
    return dataclasses.replace(m, beta=8.0, compute_input="after_attention")


def work(config: Config, rows: int) -> float:
    """FLOPs of the distillation: the forward passes of both models, counted with their heads, and the fit.

    Args:
      rows: rows of FFN-M that a step evaluates.
    """
    m, steps = config.model, text_config(config).steps
    tokens = steps * config.batch_size * config.seq_len
    base = dataclasses.replace(config, model=_base_model(m))
    passes = sum(flops.forward(base, tokens, 0)) + sum(flops.forward(config, tokens, steps * rows))
    return passes + m.layers * _FIT_STEPS * _fit_ids(m.vocab_size) * 6 * memories.of(m).row_weights


def plan_line(config: Config, mesh: Mesh, rows: int) -> str:
    """What the distillation needs, as a line of the plan. Args: rows: as of `work`."""
    m, steps, shards = config.model, text_config(config).steps, batch_shards(mesh)
    tokens = steps * config.batch_size * config.seq_len
    in_steps = math.ceil(work(config, rows) / flops.train_flops(config, tokens // steps, rows))
    streams = 2 * tokens * m.dim * jnp.dtype(m.dtype).itemsize / shards
    base_ffn, tables = 3 * m.layers * m.dim * m.ffn_dim, 2 * m.vocab_size * m.dim
    split = 4 * (base_ffn + tables) / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    return (
        f"distils FFN-M from base before the first step, on {tokens:,} tokens: the work of about {in_steps:,} steps, "
        f"and {(streams + split) / 1e9:.2f} GB a device beside the state"
    )


def distil(trainer: Trainer, batches: TrainBatches, params, base_layers, stopped: Callable[[], bool]):
    """Fits FFN-M of a converted model.

    Args:
      batches: the text, all batches of the config `text_config`. They are the first ones of the run.
      params: the converted model's, with FFN-M a copy of base's FFN. Its "memory" is donated.
      base_layers: "ffn" and "ffn_norm" of base, stacked over the layers.
      stopped: asked before each micro-batch; if it returns True, the layers that follow keep their copy.
    Returns: `params` with the fitted FFN-M.
    """
    config, begin = trainer.config, time.monotonic()
    layers, memory, embedding = params["layers"], params["memory"], params["embedding"]
    base_layers = {**layers, **base_layers}
    with jax.set_mesh(trainer.mesh):
        text = list(_text(trainer, batches))
        streams = [_first_streams(config, embedding, where) for where in text]
        counts_V = np.sum([_counts(where, len(embedding)) for where in text], axis=0, dtype=np.int64)
        show = Progress("distil", config.model.layers * (len(text) + 1), "passes", enabled=hosts.is_first())
        with_layer = jax.jit(_with_layer, donate_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, memory))
        missed = 0.0
        for layer in range(config.model.layers):
            sums_VD = jnp.zeros_like(embedding, device=embedding.sharding)
            for number, where in enumerate(text):
                if stopped():
                    return {**params, "memory": memory}
                arguments = where, streams[number], sums_VD
                streams[number], sums_VD = _through_layer(config, layer, base_layers, layers, *arguments)
                if number % _AHEAD == 0:
                    sums_VD.block_until_ready()  # else the progress would be that of the dispatch
                show.update(show.done + 1)
            of_layer, missed_here = _fit(trainer, layer, memory, embedding, sums_VD, counts_V)
            memory = with_layer(memory, of_layer, layer)
            missed += float(missed_here) / config.model.layers
            streams = [_add_rows(config, of_layer, embedding, *each) for each in zip(text, streams)]
            show.update(show.done + 1)
    show.line(
        f"FFN-M distilled from base in {duration(time.monotonic() - begin)}: {counts_V.sum():,} tokens with "
        f"{np.count_nonzero(counts_V):,} ids; its rows miss {100 * missed:.1f}% of the squares of the means"
    )
    show.close()
    return {**params, "memory": memory}


def _text(trainer: Trainer, batches: TrainBatches) -> Iterator[_Where]:
    """The micro-batches of the text, without their targets."""
    for feed in Feeder(batches, trainer, batches.sizes(), 0):
        for micro in range(trainer.config.accumulate):
            yield _micro_batch(feed.batch, micro)


@jax.jit
def _micro_batch(batch: Batch, micro) -> _Where:
    start_SN = None if batch.start_SAN is None else batch.start_SAN[:, micro]
    return _Where(batch.ids_SU, batch.index_SAN[:, micro], start_SN)


@functools.partial(jax.jit, static_argnames="size")
def _counts(where: _Where, size: int):
    """How often each token id occurs, int32 [V]."""
    ids_SN = jnp.take_along_axis(where.ids_SU, where.index_SN, axis=1)
    counts_V = jnp.zeros(size, jnp.int32).at[ids_SN.reshape(-1)].add(1)
    return jax.lax.with_sharding_constraint(counts_V, spec(None))  # each host reads all of them


@functools.partial(jax.jit, static_argnames="config")
def _first_streams(config: Config, embedding_VD, where: _Where) -> _Streams:
    x_SND = take_rows(_embedded(config, embedding_VD, where.ids_SU), where.index_SN)
    x_BTD = x_SND.reshape(-1, config.seq_len, config.model.dim)
    return _Streams(x_BTD, jnp.copy(x_BTD))


def _embedded(config: Config, table_VD, ids_SU, dtype=None):
    """Rows [S, U, D] of a table that is stored as the embedding."""
    return embed(table_VD, ids_SU, dtype or config.model.dtype)[..., : config.model.dim]


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("streams", "sums_VD"))
def _through_layer(config: Config, layer, base_layers, layers, where: _Where, streams: _Streams, sums_VD):
    """Applies a layer of both models, without the converted one's rows.

    Args:
      layer: its number.
      base_layers, layers: parameters stacked over the layers.
      sums_VD: for each token id, the sum of the rows that its positions ask for, stored as the embedding.
    Returns: (the streams, `sums_VD` with those of this micro-batch).
    """
    m = config.model
    positions, start_BT = jnp.arange(config.seq_len), None
    if where.start_SN is not None:
        start_BT = where.start_SN.reshape(-1, config.seq_len)
        positions = positions - start_BT
    rope = transformer.rope_table(m, positions)

    def apply(model, stacked, x_BTD):
        inputs = x_BTD, None, where.index_SN, rope
        return transformer.apply_layer(model, _of_layer(stacked, layer), *inputs, start_BT=start_BT).x_BTD

    after = _Streams(apply(_base_model(m), base_layers, streams.base_BTD), apply(m, layers, streams.converted_BTD))
    missing_BTD = after.base_BTD.astype(jnp.float32) - after.converted_BTD.astype(jnp.float32)

    def lookup(table_VD):
        return take_rows(_embedded(config, table_VD, where.ids_SU, jnp.float32), where.index_SN)

    (of_ids_VD,) = jax.vjp(lookup, sums_VD)[1](missing_BTD.reshape(*where.index_SN.shape, -1))
    return after, constrain(sums_VD + of_ids_VD, "vocab", "embed")


@functools.partial(jax.jit, static_argnames="config", donate_argnames="streams")
def _add_rows(config: Config, of_layer, embedding_VD, where: _Where, streams: _Streams) -> _Streams:
    """Adds a layer's rows to the converted model's stream."""
    rows_SUD = _rows(config, of_layer, embedding_VD, where.ids_SU)
    row_BTD = take_rows(rows_SUD, where.index_SN).reshape(streams.converted_BTD.shape)
    return streams._replace(converted_BTD=streams.converted_BTD + row_BTD)


def _rows(config: Config, of_layer, embedding_VD, ids_SU):
    """FFN-M's rows [S, U, D] of token ids. Args: of_layer: its parameters in one layer."""
    x0_SUD = _embedded(config, embedding_VD, ids_SU)
    return memories.layer_rows(config.model, of_layer, x0_SUD, take=None)


def _fit(trainer: Trainer, layer: int, memory, embedding_VD, sums_VD, counts_V):
    """Fits one layer's FFN-M to the mean rows, with Adam on token ids drawn by their frequency.

    Ids that the text lacks are not drawn. Their rows are what the fitted FFN-M makes of their embeddings, which is
    nearer to their means than the mean of all rows is.

    Args:
      memory: parameters of FFN-M, stacked over the layers.
      sums_VD, counts_V: sums over the positions of each token id, and the number of positions.
    Returns: (the layer's parameters, the mean square of what the last steps' rows miss, over that of the mean rows).
    """
    ids_KSU = _drawn_ids(trainer, counts_V, layer)
    return _fitted(trainer.config, layer, memory, embedding_VD, sums_VD, counts_V.astype(np.float32), ids_KSU)


def _fit_ids(vocab_size: int) -> int:
    """Token ids of a step of the fit, over all batch shards: a quarter of the vocabulary, within bounds."""
    return min(max(vocab_size // 4, _LEAST_FIT_IDS), _MOST_FIT_IDS)


def _drawn_ids(trainer: Trainer, counts_V: np.ndarray, layer: int) -> jax.Array:
    """Token ids by their frequency, int32 [K, S, U] on the devices; the same on each host."""
    shards = trainer.shards
    random = np.random.default_rng([trainer.config.seed, layer])
    shape = _FIT_STEPS, shards, -(-_fit_ids(len(counts_V)) // shards)
    ids_KSU = random.choice(len(counts_V), shape, p=counts_V / counts_V.sum()).astype(np.int32)
    sharding = NamedSharding(trainer.mesh, spec(None, "shard", None))
    return jax.make_array_from_callback(shape, sharding, lambda at: ids_KSU[at])


@functools.partial(jax.jit, static_argnames="config")
def _fitted(config: Config, layer, memory, embedding_VD, sums_VD, counts_V, ids_KSU):
    """See `_fit`."""
    # The step that suits a matrix falls as its inputs grow in number (Yang et al. 2022, arXiv 2203.03466).
    optimizer = optax.adam(optax.cosine_decay_schedule(1 / config.model.dim, _FIT_STEPS))
    means_VD = sums_VD / jnp.maximum(counts_V, 1)[:, None]

    def loss(of_layer, ids_SU):
        means_SUD = _embedded(config, means_VD, ids_SU, jnp.float32)
        rows_SUD = _rows(config, of_layer, embedding_VD, ids_SU).astype(jnp.float32)
        return jnp.square(rows_SUD - means_SUD).mean() / jnp.square(means_SUD).mean()

    def step(carry, ids_SU):
        of_layer, state = carry
        missed, gradients = jax.value_and_grad(loss)(of_layer, ids_SU)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(of_layer, updates), state), missed

    of_layer = _of_layer(memory, layer)
    (of_layer, _), missed_K = jax.lax.scan(step, (of_layer, optimizer.init(of_layer)), ids_KSU)
    return of_layer, missed_K[-_FIT_STEPS // 10 :].mean()


def _of_layer(stacked, layer):
    """One layer's parameters of those stacked over the layers."""
    return jax.tree.map(lambda x: x[layer], stacked)


def _with_layer(stacked, of_layer, layer):
    """Parameters stacked over the layers, with those of one layer replaced."""
    return jax.tree.map(lambda x, of_one: x.at[layer].set(of_one), stacked, of_layer)
