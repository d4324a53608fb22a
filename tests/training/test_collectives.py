"""Collectives of a compiled step."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from memoryllm_jax.training import collectives


def test_collectives_are_counted_with_the_loops_they_are_in():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def body(x, _):
        whole = jax.lax.all_gather(x, "b", tiled=True)
        return x + jax.lax.psum(whole.reshape(4, -1).sum(0), "a"), None

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("b"), out_specs=P("b"), check_vma=False)
    def run(x):
        return jax.lax.scan(body, x, length=5)[0]

    x = jax.ShapeDtypeStruct((4 * 32,), jnp.float32)
    found = collectives.collectives(run.lower(x).compile().as_text(), 8)
    assert {(c.kind, c.group, c.times, c.operand_bytes, c.sent_bytes) for c in found} == {
        ("all-gather", (0, 1, 2, 3), 5, 128, 5 * 3 * 128),
        ("all-reduce", (0, 4), 5, 128, 5 * 128),
    }


@pytest.mark.parametrize(
    "notation, group",
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x", (0, 2)),
        ("source_target_pairs={{0,1},{1,2}}, x", (0, 1)),
        ("channel_id=1", tuple(range(8))),
    ],
)
def test_device_groups_in_all_notations(notation, group):
    assert collectives._group(notation, 8) == group
