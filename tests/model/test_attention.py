"""Attention backends: those that run on a CPU against the plain one, the others lowered for their own device."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import OPTIMISED

from memoryllm_jax import config
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model import attention, blocked_attention, document_tiles, sharding
from memoryllm_jax.training.batches import Batch
from memoryllm_jax.training.step import Trainer


def forward_and_backward(kernel, q, k, v, g):
    """(result, gradients of q, k and v), where g is the gradient of the result."""
    out, vjp = jax.vjp(kernel, q, k, v)
    return out, *vjp(g)


@pytest.mark.parametrize(
    "backend, batch, length, heads, head_dim",
    [
        # Tiles have 128 positions: part of one tile, then two tiles and a part of the third.
        ("blocked", 2, 1, 3, 10),
        ("blocked", 1, 300, 3, 10),
        ("blocked in one span", 1, 300, 3, 10),
        ("splash", 2, 16, 2, 60),
        ("splash", 1, 300, 2, 64),
        ("splash in two kernels", 1, 200, 1, 64),
        ("blocked in documents", 2, 300, 3, 10),
        ("splash in documents", 2, 300, 2, 64),
    ],
)
def test_tiles_give_plain_attention_and_its_gradients(monkeypatch, backend, batch, length, heads, head_dim):
    """Splash runs in Pallas' interpreter, because it compiles only on a TPU."""
    if backend == "splash in two kernels":
        monkeypatch.setattr(attention, "_MOST_FUSED", 128)
    if backend == "blocked in one span":
        monkeypatch.setattr(blocked_attention, "SPANS", 1)
    name, _, way = backend.partition(" ")
    kernel, expected = blocked_attention.blocked, attention.plain
    if name == "splash":
        kernel = functools.partial(attention.splash, block=128, interpret=True)
    if way == "in documents":
        if name == "blocked":
            kernel = document_tiles.blocked_in_documents
        # A document of one position, and some that end inside tiles and with one. Of plain attention in documents,
        # test_transformer.py tests that it is attention over each of them.
        start_BT = starts([[1, 140, 256], [2, 10, 131]], length)
        kernel, expected = (functools.partial(attend, start_BT=start_BT) for attend in (kernel, expected))
    args = np.random.default_rng(0).normal(size=(4, batch, length, heads, head_dim)).astype(np.float32)
    both = jax.jit(lambda *args: [forward_and_backward(k, *args) for k in (kernel, expected)])
    for a, b in zip(*both(*args)):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=2e-6)


def starts(ends, length):
    """Where each position's document begins, for sequences of documents that end at these positions."""
    first = [np.repeat([0, *row], np.diff([0, *row, length])) for row in ends]
    return np.array(first, np.int32)


def kernels(text: str) -> list[tuple[str, str]]:
    """The attention kernels that a lowered step calls, in order: (of splash, of cuDNN), one of them empty."""
    return re.findall(r'kernel_name = "splash_mha_([a-z]+)_|@__cudnn\$fmha(?:ScaleBias)?Softmax(\w*)\(', text)


A100 = attention.Accelerator("cuda", "A100", (8, 0))
H100 = attention.Accelerator("cuda", "H100", (9, 0))
B200 = attention.Accelerator("cuda", "B200", (10, 0))
TPU = attention.Accelerator("tpu", "TPU v5e")
CPU = attention.Accelerator("cpu", "cpu")
CALLS = {"cuda": [("", ""), ("", "Backward")], "tpu": [("fwd", ""), ("dkv", "")]}


@pytest.mark.parametrize(
    "platform, head_dim, padded_head_dim",
    [("cuda", 60, 64), ("cuda", 100, 104), ("cuda", 64, 64), ("tpu", 60, 64), ("tpu", 100, 128), ("tpu", 64, 64)],
)
def test_flash_attention_is_lowered_for_gpu_and_tpu(with_cudnn, platform, head_dim, padded_head_dim):
    """Each device runs the kernels on its own two sequences and two heads, with head sizes that the kernels support.

    Heads of 64 attend inside documents: cuDNN gets a mask, and splash's heads stay apart by sequence.
    """
    backend = attention.resolve_backend("auto", "bfloat16", head_dim, {"cuda": H100, "tpu": TPU}[platform])
    x = jax.ShapeDtypeStruct((8, 2048, 4, head_dim), jnp.bfloat16)
    start_BT = np.zeros((8, 2048), np.int32) if head_dim == 64 else None
    kernel = functools.partial(attention.causal_attention, backend=backend, start_BT=start_BT)
    step = functools.partial(forward_and_backward, kernel)
    with jax.set_mesh(sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))):
        text = jax.jit(step).trace(x, x, x, x).lower(lowering_platforms=(platform,)).as_text()
    assert kernels(text) == CALLS[platform]
    operand = {"cuda": f"tensor<2x2048x2x{padded_head_dim}xbf16>", "tpu": f"tensor<4x2048x{padded_head_dim}xbf16>"}
    if head_dim == 64:
        operand["cuda"] = "tensor<2x1x2048x2048xbf16>"
        operand["tpu"] = "tensor<2x2x2048x64xbf16>"
    for line in text.splitlines():
        if "custom_call @tpu" in line or "custom_call @__cudnn" in line:
            assert operand[platform] in line, line


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_the_train_step_runs_the_forward_kernel_again_only_under_full_remat(make_config, with_cudnn, platform, remat):
    """Under `dots` the backward pass uses the results that the forward kernel has left."""
    c = make_config(**{"model.remat": remat, "model.dtype": "bfloat16", "mesh.fsdp": 4, "mesh.tensor": 2})
    backend = attention.resolve_backend("auto", "bfloat16", 8, {"cuda": H100, "tpu": TPU}[platform])
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, attention=backend, vocab_size=512))
    trainer = Trainer(c, sharding.make_mesh(c.mesh))
    S, N = trainer.shards, c.batch_size * c.seq_len // trainer.shards
    shapes = {"ids": (S, 64), "index": (S, 1, N), "targets": (S, 1, N), "weights": (S, 1, N)}
    batch = Batch(*(jnp.zeros(s, jnp.float32 if name == "weights" else jnp.int32) for name, s in shapes.items()))
    with jax.set_mesh(trainer.mesh):
        traced = jax.jit(trainer._train).trace(trainer.state_shape, batch)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    forward, backward = CALLS[platform]
    assert kernels(text) == {"dots": [forward, backward], "full": [forward, forward, backward]}[remat]


@pytest.mark.parametrize(
    "name, dtype, head_dim, accelerator, message",
    [
        (
            "cudnn",
            "bfloat16",
            64,
            None,
            "attention: cudnn needs an NVIDIA GPU of .* capability 8 or more, found cpu",
        ),
        ("cudnn", "float32", 64, H100, "attention: cudnn needs config.model.dtype bfloat16, found float32"),
        ("splash", "bfloat16", 64, H100, "attention: splash needs a TPU, found H100"),
        ("auto", "bfloat16", 129, A100, "heads: expected heads of at most 128 numbers .* on A100, found 129"),
        ("cudnn", "bfloat16", 257, H100, "heads: expected heads of at most 256 numbers .* on H100, found 257"),
        ("auto", "bfloat16", 256, B200, "heads: expected heads of at most 128 numbers .* on B200, found 256"),
    ],
)
def test_an_unavailable_backend_is_an_error(name, dtype, head_dim, accelerator, message):
    with pytest.raises(UserError, match=f"config.model.{message}"):
        attention.resolve_backend(name, dtype, head_dim, accelerator)


def test_cudnn_takes_documents_in_sequences_of_even_length():
    attention.check_documents("cudnn", 2048)
    with pytest.raises(UserError, match=r"config.seq_len: expected an even number.* found 2047"):
        attention.check_documents("cudnn", 2047)


@pytest.mark.parametrize(
    "accelerator, dtype, head_dim, backend",
    [
        (CPU, "bfloat16", 512, "blocked"),
        (CPU, "float32", 64, "blocked"),
        (A100, "bfloat16", 128, "cudnn"),
        (H100, "bfloat16", 256, "cudnn"),
        (H100, "float32", 512, "blocked"),
        (TPU, "bfloat16", 512, "splash"),
        (TPU, "float32", 64, "splash"),
    ],
)
def test_auto_is_the_fastest_backend_that_runs(accelerator, dtype, head_dim, backend):
    assert attention.resolve_backend("auto", dtype, head_dim, accelerator) == backend


@pytest.mark.parametrize(
    "platform, kind, capability, version, backend",
    [
        ("cpu", "cpu", None, "cpu", "blocked"),
        ("tpu", "TPU v5 lite", None, "tpu", "splash"),
        ("gpu", "NVIDIA H100 80GB HBM3", "9.0", "cuda 13000", "cudnn"),
        ("gpu", "Tesla T4", "7.5", "cuda 13000", "blocked"),
        ("gpu", "AMD Instinct MI300X", "gfx942", "rocm 70000", "blocked"),
    ],
)
def test_auto_follows_the_kind_of_device(monkeypatch, platform, kind, capability, version, backend):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability, client=client)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert attention.resolve_backend("auto", "bfloat16", 64) == backend


def test_attention_over_a_cache_has_the_same_bits_for_any_number_of_segments_that_suffices():
    rng = np.random.default_rng(0)
    B, T, H, C, K = 2, 3, 2, 512, 16
    whole = attention.Cache(*(jnp.asarray(rng.normal(0, 1, (B, H, C, K)), jnp.float32) for _ in range(2)))
    ends = np.cumsum(attention.segments(C))
    parts = [attention.Cache(*pair) for pair in zip(*(jnp.split(x, ends[:-1], 2) for x in whole))]
    new = attention.Cache(*(jnp.asarray(rng.normal(0, 1, (B, H, T, K)), jnp.float32) for _ in range(2)))
    q = jnp.asarray(rng.normal(0, 1, (B, T, 2 * H, K)), jnp.float32)
    position_BT = jnp.array([[100, 101, 102], [7, 8, 9]])

    def attend(cache, reach):
        return attention.Past(cache, position_BT, reach).attend(q, new)

    attend = jax.jit(attend, compiler_options=OPTIMISED)  # else a longer span would have the same bits too
    found = [attend(parts, attention.Reach(segments=np.int32(count)))[0] for count in (2, 3, len(parts))]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    for reach in (attention.WHOLE, attention.Reach(span=128)):
        np.testing.assert_allclose(attend(whole, reach)[0], found[0], atol=1e-6)
    # Against attention over the whole sequences that the cache holds now
    _, written = attend(whole, attention.WHOLE)
    for b in range(B):
        length = int(position_BT[b, -1]) + 1
        k_THK, v_THK = (jnp.repeat(x[b, :, :length].swapaxes(0, 1), 2, 1) for x in written)
        q_THK = jnp.pad(q[b], ((length - T, 0), (0, 0), (0, 0)))
        expected = attention.plain(q_THK[None], k_THK[None], v_THK[None])[0, -T:]
        np.testing.assert_allclose(found[0][b], expected, atol=1e-5)
