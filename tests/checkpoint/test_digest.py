"""Digests of arrays: the same on every mesh, with every padding and in host memory; any change changes them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.checkpoint import digest
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.model import sharding


def by_definition(array):
    """The digest of a float32 array, element by element in Python's integers."""
    sums = [0, 0]
    for index, value in np.ndenumerate(array):
        bits = int(np.float32(value).view(np.uint32))
        h = bits ^ sum(i * pow(0x9E3779B1, axis + 1) for axis, i in enumerate(index)) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        h = (h ^ h >> 16) if bits else 0
        second = (h ^ h >> 15) * 0x27D4EB2F % 2**32
        sums = [sums[0] + h, sums[1] + (second ^ second >> 16)]
    return "".join(f"{s % 2**32:08x}" for s in sums)


@pytest.mark.parametrize("shape", [(), (7,), (3, 2, 5, 4)])
def test_digests_are_those_of_the_definition(shape):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert digest.of(array) == digest.of(jnp.asarray(array)) == by_definition(array)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32])
@pytest.mark.parametrize("shape", [(70_000,), (700, 300), (2, 300, 3, 130)])  # more than a block of the host's
def test_meshes_padding_and_host_memory_do_not_change_a_digest(shape, dtype):
    array = (100 * np.random.default_rng(0).normal(size=shape)).astype(dtype)
    expected = digest.of(array)
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2), jax.devices()[:8])
    padded = np.pad(array, [(0, -size % 8 or 8) for size in shape])
    for spec in (P(("fsdp", "tensor")), P(*[None] * (len(shape) - 1), "tensor")):
        assert digest.of(jax.device_put(padded, NamedSharding(mesh, spec))) == expected


def test_any_bit_and_any_swap_changes_a_digest():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    texts = {digest.of(array), digest.of(array[::-1]), digest.of(array[:, ::-1]), digest.of(array.reshape(6, 4))}
    for bit in range(32):
        flipped = array.copy()
        flipped.view(np.uint32)[1, 2] ^= np.uint32(1 << bit)
        texts.add(digest.of(flipped))
    zero = array.copy()
    zero[0, 0] = -0.0
    assert len(texts | {digest.of(zero)}) == 4 + 32 + 1


def test_devices_send_each_other_only_sums():
    mesh = sharding.make_mesh(MeshConfig(1, 8, 1), jax.devices()[:8])
    array = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    compiled = digest._on_devices(mesh).lower(array).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024
