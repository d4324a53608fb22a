"""What the layers of the models are made of: parameters, their products, norms and SwiGLU.

Shapes: B sequences, T positions, N = B T, D model width, F FFN width, L layers, S batch shards, U distinct ids of a
shard.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from memoryllm_jax.config import ModelConfig
from memoryllm_jax.model.blocked_attention import SAVED
from memoryllm_jax.model.sharding import constrain, padded, unpadded_embed

# Linen's collection of the squares, in float32, of what layers add to the stream. A caller gets it if it applies the
# model with mutable=[ADDED]: from `hidden` {"layers": {part: [L, S], summed over the positions of each batch shard}},
# from `token_rows` {"memory": {"memory": [L, S, U], of the rows}} or, if no rows are added to the stream, nothing.
ADDED = "added"


def note(module: nn.Module, part: str, added, *sums: int) -> None:
    """Keeps the squares of what a part adds to the residual stream, if the caller asks for the collection ADDED.

    Args:
      added: [..., D].
      sums: shape of the result: over what axes it is summed. Devices need not communicate if it begins with S.
    """
    if module.is_mutable_collection(ADDED) and not module.is_initializing():
        square = jnp.square(added.astype(jnp.float32)).reshape(*sums, -1).sum(-1)
        module.put_variable(ADDED, part, constrain(square, "shard", *[None] * (len(sums) - 1)))


def parameter(module, name, shape, axes, std):
    """A float32 parameter, stored with the padding that the mesh needs. Its values do not depend on the mesh.

    A parameter that exists is taken as it is stored: training pads more than the mesh needs.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)

    def init(key, stored_shape, dtype):
        # Drawn before padding, because another shape would draw other values.
        values = nn.initializers.normal(std)(key, shape, dtype)
        return jnp.pad(values, [(0, stored - size) for size, stored in zip(shape, stored_shape)])

    return module.param(name, nn.with_logical_partitioning(init, axes), padded(shape, axes), jnp.float32)


def weight(module, name, shape, axes, std):
    """A parameter for `matmul`: without padding of the model's width, and in the dtype of the computation.

    With reduce_dtype float32 it stays as it is stored, and `matmul` casts it.
    """
    w = parameter(module, name, shape, axes, std)
    if module.config.reduce_dtype != "float32":
        w = w.astype(module.config.dtype)
    return unpadded_embed(w, module.config.dim, axes)


def matmul(x, w):
    """x[..., D] @ w[D, F] in the dtype of x. A wider w gets a gradient of its own dtype."""
    # On a CPU, XLA multiplies [B T, D] twice as fast as [B, T, D].
    product = _dot if w.dtype == x.dtype else _dot_with_wide_gradient
    y = product(x.reshape(-1, x.shape[-1]), w)
    return checkpoint_name(y, SAVED).reshape(*x.shape[:-1], w.shape[-1])


def _dot(x_ND, w_DF):
    """x @ w in the dtype of x."""
    # On a CPU, XLA multiplies bfloat16 five times as fast if the result is float32.
    on_cpu = jax.sharding.get_abstract_mesh().abstract_device.platform == "cpu"
    return jnp.dot(x_ND, w_DF, preferred_element_type=jnp.float32 if on_cpu else None).astype(x_ND.dtype)


@jax.custom_vjp
def _dot_with_wide_gradient(x_ND, w_DF):
    """`_dot` for float32 weights, which are cast to the dtype of x. Their gradient is float32 before it is rounded.

    Devices sum a product over their batch shards in the dtype of its result. Here that is float32.
    """
    return _dot(x_ND, w_DF.astype(x_ND.dtype))


def _dot_forward(x_ND, w_DF):
    # The cast weight is kept: if the backward pass cast it again, XLA would gather it a second time there.
    w_DF = w_DF.astype(x_ND.dtype)
    return _dot(x_ND, w_DF), (x_ND, w_DF)


def _dot_backward(residuals, g_NF):
    x_ND, w_DF = residuals
    # Not _dot(g, w.T): XLA would gather w and its transpose, where the forward pass is recomputed just before.
    (dx_ND,) = jax.linear_transpose(lambda x: _dot(x, w_DF), x_ND)(g_NF)
    return dx_ND, jnp.dot(x_ND.T, g_NF, preferred_element_type=jnp.float32)


_dot_with_wide_gradient.defvjp(_dot_forward, _dot_backward)


class Norm(nn.Module):
    """RMSNorm or LayerNorm, with a scale and without bias."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale_D = self.param("scale", init, x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32)  # bfloat16 has 8 bits of precision, too few for a mean of squares
        if self.config.norm == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.config.norm_eps)
        return (y * scale_D).astype(self.config.dtype)


def softcap(logits, cap: float):
    """c tanh(logits / c): logits between -c and c in their order (Gemma 2, Gemma Team 2024, arXiv 2408.00118).

    Every function that computes logits calls it, before ids that only pad the vocabulary get -inf.

    Args:
      logits: float32.
      cap: c, `model.logit_softcap`; 0 returns the logits as they are.
    """
    return cap * jnp.tanh(logits / cap) if cap else logits


def swiglu_coefficients(q, gate, up, matmul=jnp.matmul):
    """SiLU(q W_gate) * (q W_up), the coefficients by which SwiGLU weighs its values (paper, section 2.3.1).

    Args:
      q: queries [..., D].
      gate, up: W_gate and W_up [D, F], or one column of each [D].
      matmul: function that multiplies q with `gate` and with `up`; it decides the dtype of the result.
    Returns: [..., F], or [...] for one column.
    """
    return nn.silu(matmul(q, gate)) * matmul(q, up)


class SwiGLU(nn.Module):
    """(SiLU(x W_gate) * (x W_up)) W_down. Columns of W_up are keys, rows of W_down values (paper, section 2.3.1)."""

    config: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x):
        D, F = x.shape[-1], self.width
        std = self.config.init_std
        gate_DF = weight(self, "gate", (D, F), ("embed", "mlp"), std)
        up_DF = weight(self, "up", (D, F), ("embed", "mlp"), std)
        down_FD = weight(self, "down", (F, D), ("mlp", "embed"), output_std(self.config))
        return matmul(swiglu_coefficients(x, gate_DF, up_DF, matmul), down_FD)


def output_std(config):
    """Initial standard deviation of matrices that write to the residual stream.

    The stream sums two such results of each layer. Scaled like this, its variance does not grow with depth (GPT-2).
    """
    return config.init_std / (2 * config.layers) ** 0.5
