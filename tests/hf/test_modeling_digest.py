"""The digest of loaded weights. test_modeling_memoryllm.py compares it with that of a ToL file."""

import numpy as np
import pytest

from memoryllm_jax.checkpoint import trained


def test_the_hashes_of_large_matrices_are_those_of_the_checkpoint():
    """Of several parts, with tiny and huge values, in the layouts of both."""
    torch = pytest.importorskip("torch")
    from memoryllm_jax.hf import modeling_digest

    bits = np.random.default_rng(0).integers(0, 2**32, (20000, 6), dtype=np.uint32)
    x = np.nan_to_num(bits.view(np.float32), posinf=0, neginf=0)
    heads = x[:18000].reshape(6000, 3, 6)
    for name, torch_side, ours in (
        ("head", x, x),
        ("layers/ffn/down", x.T.copy(), x),
        ("layers/attention/out", heads.reshape(-1, 6).T.copy(), heads),
        ("final_norm/scale", x[:, 0].copy(), x[:, 0]),
    ):
        digest = trained.Digest()
        digest.add(name, [ours])
        _, *expected = digest._sums[name][0]  # without the shape
        assert modeling_digest._hashes(name, torch.from_numpy(torch_side), ours.shape) == expected
