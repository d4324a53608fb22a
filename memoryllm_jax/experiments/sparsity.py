"""Pruning of base by magnitude, Wanda (Sun et al. 2024) and SparseGPT (Frantar and Alistarh 2023).

All matrices of attention and FFN in all layers get the same share of zeros; embeddings, head and norms stay. Layers
are pruned in order, each calibrated on the outputs of the pruned layers before it.

Shapes: N windows of calibration text, B windows of a batch, T positions, D model width; a matrix w_IO has I inputs and
O outputs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.config import ModelConfig
from memoryllm_jax.model import modules, sharding, transformer

METHODS = ("magnitude", "wanda", "sparsegpt")
DAMPING = 0.01  # added to the Gram matrix's diagonal, as a share of its mean, as in SparseGPT
BLOCK = 128  # columns that SparseGPT prunes before it corrects all columns to their right at once
_WINDOWS = 8  # calibration windows in a batch, or one for each batch shard if there are more shards

# The matrices of a layer: module, name, and the key in `_grams` of the Gram matrix of its input.
_MATRICES = (
    ("attention", "q", "qkv"),
    ("attention", "k", "qkv"),
    ("attention", "v", "qkv"),
    ("attention", "out", "out"),
    ("ffn", "gate", "up"),
    ("ffn", "up", "up"),
    ("ffn", "down", "down"),
)


class Pattern(NamedTuple):
    """How many weights become zero, and where the count must hold.

    sparsity: share of zeros.
    group: the share holds among every `group` consecutive inputs of an output (2:4 has a group of 4); 0: it holds only
      for a whole output or matrix, as the method chooses.
    """

    sparsity: float
    group: int = 0

    @property
    def zeros(self) -> int:
        """Zeros in each group."""
        return round(self.sparsity * self.group)

    def __str__(self):
        return f"{self.group - self.zeros}:{self.group}" if self.group else f"{self.sparsity:.1%}"


def prune(config: ModelConfig, params: dict, mesh, windows_NT: np.ndarray, method: str, pattern: Pattern) -> dict:
    """Prunes base.

    Args:
      params: as `TrainedModel.load` returns them.
      windows_NT: int32 calibration text, N a multiple of the mesh's batch shards; magnitude does not read it.
      method: one of METHODS.
    Returns: the pruned parameters.
    """
    shards = sharding.batch_shards(mesh)
    size = shards * max(1, _WINDOWS // shards)
    batches = []
    if method != "magnitude":
        batches = np.split(windows_NT, range(size, len(windows_NT), size))
    inputs = [params["embedding"][batch][..., : config.dim].astype(config.dtype) for batch in batches]
    layers = []
    with jax.set_mesh(mesh):
        for layer in params["layers"]:
            grams = None
            for x_BTD in inputs:
                # One batch at a time: on several CPU devices, the all-reduces of two running programs can deadlock.
                new = jax.block_until_ready(_grams(config, layer, x_BTD))
                grams = new if grams is None else jax.tree.map(jnp.add, grams, new)
            layers.append(_prune_layer(layer, grams, method, pattern))
            inputs = [_forward(config, layers[-1], x_BTD) for x_BTD in inputs]
    return params | {"layers": layers}


def nonzeros(params: dict) -> int:
    """The number of weights in the layers' matrices that are not zero."""
    matrices = [layer[module][name] for layer in params["layers"] for module, name, _ in _MATRICES]
    return sum(int(jnp.count_nonzero(w)) for w in matrices)


def _apply_layer(config, layer, x_BTD):
    rope = transformer.rope_table(config, jnp.arange(x_BTD.shape[1]))
    return transformer.apply_layer(config, layer, x_BTD, None, None, rope)  # base has no rows


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, layer, x_BTD):
    return _apply_layer(config, layer, x_BTD).x_BTD


@functools.partial(jax.jit, static_argnums=0)
def _grams(config, layer, x_BTD):
    """Gram matrices of the inputs of a layer's matrices: {key in _MATRICES: sum of x x^T, float32 [I, I]}."""
    out, ffn = _apply_layer(config, layer, x_BTD), layer["ffn"]
    inputs = {
        "qkv": out.attention_input_BTD,
        "out": out.mixed_BTHK,
        "up": out.ffn_input_BTD,
        "down": modules.swiglu_coefficients(out.ffn_input_BTD, ffn["gate"], ffn["up"]),
    }

    def gram(x):
        x_NI = x.reshape(x_BTD.shape[0] * x_BTD.shape[1], -1).astype(jnp.float32)
        return jnp.matmul(x_NI.T, x_NI, precision="highest")

    return jax.tree.map(gram, inputs)


def _prune_layer(layer, grams, method, pattern):
    factors = {}
    if method == "sparsegpt":
        factors = {name: inverse_factor(gram_II) for name, gram_II in grams.items()}
    pruned = {module: dict(layer[module]) for module in ("attention", "ffn")}
    for module, name, source in _MATRICES:
        w = layer[module][name]
        # Attention's output projection has two input axes, heads and head size; q, k and v have two output axes.
        inputs = w.shape[0] * w.shape[1] if name == "out" else w.shape[0]
        w_IO = w.reshape(inputs, -1)
        gram_II = None if grams is None else grams[source]
        pruned[module][name] = prune_matrix(w_IO, gram_II, method, pattern, factors.get(source)).reshape(w.shape)
    return layer | pruned


def prune_matrix(w_IO, gram_II, method: str, pattern: Pattern, factor_II=None):
    """Prunes one matrix; SparseGPT also corrects the weights that stay.

    Args:
      gram_II: sum of x x^T over the matrix's inputs x; None for magnitude.
      factor_II: `inverse_factor(gram_II)`, if it is known already, as for matrices that share their input.
    Returns: the pruned matrix, in the dtype of w_IO.
    """
    w_OI = w_IO.T.astype(jnp.float32)
    if method == "sparsegpt":
        factor_II = inverse_factor(gram_II) if factor_II is None else factor_II
        return _sparsegpt(w_OI, factor_II, pattern).T.astype(w_IO.dtype)
    score_OI = jnp.abs(w_OI)
    if method == "wanda":
        score_OI = score_OI * jnp.sqrt(jnp.diag(gram_II))
    # Wanda compares the inputs of one output, magnitude all weights of the matrix.
    weakest = _weakest(score_OI, pattern, by_row=method == "wanda")
    return jnp.where(weakest, 0, w_OI).T.astype(w_IO.dtype)


def _weakest(score_OI, pattern, by_row):
    """Mask of the weights to set to zero: the lowest scores in each group, in each row or in the matrix."""
    if pattern.group:
        grouped = score_OI.reshape(score_OI.shape[0], -1, pattern.group)
        return _lowest(grouped, pattern.zeros).reshape(score_OI.shape)
    if by_row:
        return _lowest(score_OI, round(pattern.sparsity * score_OI.shape[1]))
    return _lowest(score_OI.reshape(-1), round(pattern.sparsity * score_OI.size)).reshape(score_OI.shape)


def _lowest(score, count):
    """Mask of the `count` lowest scores along the last axis."""
    # The inner argsort lists indices in order of score; the outer one inverts this, and gives each score its rank.
    return jnp.argsort(jnp.argsort(score, axis=-1), axis=-1) < count


def inverse_factor(gram_II) -> np.ndarray:
    """Upper triangular U with U^T U = (gram + damping)^-1, float32.

    Row i over U_ii holds the corrections of the weights after i for a unit error in weight i (SparseGPT, section 3).
    """
    gram = np.asarray(gram_II, np.float64)  # the inverse of a Gram matrix is too ill-conditioned for float32
    damping = DAMPING * gram.diagonal().mean()
    inverse = np.linalg.inv(gram + max(damping, 1e-30) * np.eye(len(gram)))
    return np.linalg.cholesky(inverse).T.astype(np.float32)


@functools.partial(jax.jit, static_argnames="pattern")
def _sparsegpt(w_OI, factor_II, pattern):
    """Prunes and corrects block after block of columns (SparseGPT, Algorithm 1)."""
    for start in range(0, w_OI.shape[1], BLOCK):
        stop = min(start + BLOCK, w_OI.shape[1])
        block, errors = _prune_block(w_OI[:, start:stop], factor_II[start:stop, start:stop], pattern)
        w_OI = w_OI.at[:, start:stop].set(block)
        w_OI = w_OI.at[:, stop:].add(-jnp.matmul(errors, factor_II[start:stop, stop:], precision="highest"))
    return w_OI


def _prune_block(w_OB, factor_BB, pattern):
    """Prunes a block of columns from left to right; each column's error corrects the columns of the block after it.

    Here B are the columns of the block.

    Returns: the pruned block, and the columns' errors over U_jj, which correct the columns after the block.
    """
    size, group = w_OB.shape[1], pattern.group
    diagonal = jnp.diag(factor_BB)
    mask = jnp.zeros(w_OB.shape, bool)
    if not group:  # the mask of the whole block is chosen at once
        scores = jnp.square(w_OB / diagonal).reshape(-1)
        mask = _lowest(scores, round(pattern.sparsity * w_OB.size)).reshape(w_OB.shape)

    def choose_group(w, mask, first):
        """Adds a group's mask, chosen only when its first column is reached: corrections have changed its weights."""
        weights = jax.lax.dynamic_slice_in_dim(w, first, group, 1)
        score = jnp.square(weights / jax.lax.dynamic_slice_in_dim(diagonal, first, group))
        return jax.lax.dynamic_update_slice_in_dim(mask, _lowest(score, pattern.zeros), first, 1)

    def column(j, carry):
        w, mask, errors = carry
        if group:
            mask = jnp.where(j % group == 0, choose_group(w, mask, j - j % group), mask)
        old = w[:, j]
        kept = jnp.where(mask[:, j], 0, old)
        error = (old - kept) / diagonal[j]
        later = jnp.where(jnp.arange(size) > j, factor_BB[j], 0)
        w = (w - error[:, None] * later).at[:, j].set(kept)
        return w, mask, errors.at[:, j].set(error)

    w, _, errors = jax.lax.fori_loop(0, size, column, (w_OB, mask, jnp.zeros_like(w_OB)))
    return w, errors
