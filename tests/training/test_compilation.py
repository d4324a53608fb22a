"""XLA's options, compilation in threads, and the check of memory."""

import threading
import types

import jax
import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model import sharding
from memoryllm_jax.training import compilation
from memoryllm_jax.training.step import Trainer


def test_overlap_is_options_that_xla_knows_and_is_refused_where_there_is_no_gpu(make_config):
    """Their names changed in jaxlib 0.11.1. XLA for CPUs knows the names of options for GPUs."""
    config = make_config(xla="overlap")
    jax.jit(lambda x: x + 1, compiler_options=compilation.options(config, "gpu")).lower(1.0).compile()
    with pytest.raises(UserError, match=r"^config.xla: overlap needs GPUs, found cpu$"):
        Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))


@pytest.mark.parametrize(
    "platform, capability, version, is_flushed",
    [
        ("gpu", "8.0", (0, 10, 2), True),
        ("gpu", "8.9", (0, 11, 0), True),
        ("gpu", "8.0", (0, 11, 1), False),
        ("gpu", "8.0", (0, 10, 1), False),
        ("gpu", "9.0", (0, 10, 2), False),
        ("gpu", "gfx942", (0, 10, 2), False),
        ("cpu", None, (0, 10, 2), False),
    ],
)
def test_float32_sums_are_instructions_where_jaxlib_would_make_loops(platform, capability, version, is_flushed):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert compilation.sum_options(device, version) == ({"xla_gpu_ftz": True} if is_flushed else {})


def test_functions_are_called_at_the_same_time_and_an_error_waits_for_no_other():
    meeting = threading.Barrier(3, timeout=10)
    assert sorted(compilation.all_at_once([meeting.wait] * 3)) == [0, 1, 2]

    end, ended = threading.Event(), []

    def compile_long():
        end.wait(10)
        ended.append(True)

    def fail():
        raise UserError("does not fit")

    with pytest.raises(UserError, match=r"^does not fit$"):
        compilation.all_at_once([compile_long, fail])
    assert not ended
    end.set()


def test_a_step_that_needs_more_memory_than_the_device_has_is_refused():
    executable = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((1000, 1_000_000), "float32")).compile()
    roomy, small, unknown = ({"bytes_limit": 8_100_000_000}, {"bytes_limit": 7_900_000_000}, None)
    for stats in (roomy, unknown):
        compilation.check_fits(executable, 64, types.SimpleNamespace(memory_stats=lambda stats=stats: stats))
    message = r"^a step for 64 distinct ids a shard needs 8.00 GB .*, and 7.90 GB can be used; to need less"
    with pytest.raises(UserError, match=message):
        compilation.check_fits(executable, 64, types.SimpleNamespace(memory_stats=lambda: small))
