"""What decode steps compile to. Their texts are tested with generation."""

import types

import hlo
import jax
import numpy as np
import pytest
from lab import random_params

from memoryllm_jax.checkpoint import trained
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.inference import ahead
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.slots import Slots
from memoryllm_jax.inference.steps import Rules, Standing
from memoryllm_jax.model import sharding

BATCH, CAPACITY, VOCAB, HOW = 2, 64, 60, Sampling(0.8)


@pytest.mark.parametrize("chip", ["cpu", "h100"])
def test_steps_update_the_cache_in_place(make_config, chip_devices, chip):
    m = make_config("flex-3", **{"model.vocab_size": 64, "model.kv_heads": 2, "model.dtype": "bfloat16"}).model
    one = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    params = trained.for_serving(random_params(m, one)[0], m)
    mesh = one if chip == "cpu" else sharding.make_mesh(MeshConfig(1, 1, 1), chip_devices(chip))

    def shape(x):
        where = jax.sharding.NamedSharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    shapes = jax.tree.map(shape, params)
    decoder, rows = Decoder(m, shapes, mesh), LiveRows(m, shapes, mesh)
    with ahead.only_shapes():
        cache = decoder.empty_cache(BATCH, CAPACITY)
        ids_B = np.zeros(BATCH, np.int32)
        rules = Rules(np.uint32(0), ids_B, ids_B, np.zeros(VOCAB, bool))
        standing, rules = decoder.start(Standing(ids_B, ids_B), rules)
        engine = types.SimpleNamespace(
            decoder=decoder, rows=rows, config=m, tokenizer=types.SimpleNamespace(vocab_size=VOCAB)
        )
        slots = Slots(engine, BATCH, 512)  # attention reads a part of the cache
        with jax.set_mesh(mesh):
            occupants = slots._on_devices()
    arguments = decoder.params, rows.arrays, standing, rules, cache, rows, HOW, VOCAB
    of_slots = decoder.params, rows.arrays, None, slots._standing, occupants, slots._cache, slots._reach(200)
    with jax.set_mesh(mesh):
        check_in_place(decoder._steps.lower(*arguments, 4), cache)
        check_in_place(decoder._steps.lower(*arguments, 1), cache)
        check_in_place(slots._step.lower(*of_slots), slots._cache)


def check_in_place(lowered, cache):
    compiled = lowered.compile()
    copied = hlo.results(compiled.as_text(), "copy")
    for x in jax.tree.leaves(cache):
        assert not [result for result in copied if ",".join(map(str, x.shape)) in result]
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(x.size * 2 for x in jax.tree.leaves(cache))
