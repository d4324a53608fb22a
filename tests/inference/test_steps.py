"""What decode steps compile to. Their texts are tested with generation."""

import logging

import hlo
import jax
import numpy as np
import pytest
from lab import random_params

from memoryllm_jax.checkpoint import trained
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.generation import generate
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.model import sharding

BATCH, CAPACITY, VOCAB, HOW = 2, 64, 60, Sampling(0.8)


@pytest.mark.parametrize("chip", ["cpu", "h100"])
def test_steps_compile_once_and_update_the_cache_in_place(make_config, chip_devices, caplog, chip):
    m = make_config("flex-3", **{"model.vocab_size": 64, "model.kv_heads": 2, "model.dtype": "bfloat16"}).model
    one = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    params = trained.for_serving(random_params(m, one)[0], m)
    mesh = one if chip == "cpu" else sharding.make_mesh(MeshConfig(1, 1, 1), chip_devices(chip))

    def shape(x):
        where = jax.sharding.NamedSharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    shapes = jax.tree.map(shape, params)
    decoder, rows = Decoder(m, shapes, mesh), LiveRows(m, shapes, mesh)
    cache = (BATCH, m.key_heads, CAPACITY, m.head_dim)
    for count in (4, 1):
        compiled = decoder.compile_steps(rows, BATCH, CAPACITY, HOW, VOCAB, count)
        copied = [result for result in hlo.results(compiled.as_text(), "copy") if ",".join(map(str, cache)) in result]
        assert not copied
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= m.layers * 2 * 2 * np.prod(cache)
    if chip == "cpu":  # with the parameters, the same steps need no compilation
        rows.arrays = {name: params[name] for name in rows.arrays}
        decoder = decoder.with_params(**{name: params[name] for name in ("layers", "final_norm", "head")})
        with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
            generated = generate(decoder, rows, [[5], [6]], CAPACITY - 1, HOW, 0, CAPACITY, VOCAB)
            assert sum(map(len, generated)) == BATCH * (CAPACITY - 1)
        messages = [record.getMessage() for record in caplog.records]
        assert any("_prefill_layer" in message for message in messages)
        assert not any("_steps_body" in message for message in messages)
