"""Norms by layer: of the gradient of each part's parameters, and of what each part adds to the residual stream.

They are computed inside the train step from what it computes anyway: gradients are read once more, and layers return
sums of squares. Each step computes them, as a condition would make the host wait on GPUs; only steps at which a record
is due send them to the host. Gradient norms are those before clipping. With g_p the gradient of part p in layer l,
y_n what a part adds to the stream at position n, and N positions in a batch:

    gradient    sqrt(sum |g_p|^2), so that the squares of all parts and layers sum to that of grad_norm
    added       sqrt(1/N sum_n |y_n|^2)

Shapes: L layers, S batch shards, U distinct ids of a shard, A micro-batches, N positions, D width.
"""

import math

import jax
import jax.numpy as jnp

from memoryllm_jax.model.transformer import LAYERS


def of_gradients(grads, layers: int) -> dict[str, jax.Array]:
    """The norm of the gradient of each part: [L] for attention, ffn (FFN-C), memory (FFN-M or tables) and row_gate.

    A part includes the norm of its input. What no layer has, such as the embedding, has one norm. The memory of a layer
    that looks up nothing has the norm 0.

    Args:
      grads: gradients by the parameters that are trained.
      layers: number of layers, L.
    """
    squares: dict[str, dict] = {}
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        group = path[0].key
        part = path[1].key.removesuffix("_norm") if group in LAYERS else group
        axes = range(1 if group in (*LAYERS, "memory") else 0, gradient.ndim)
        of_parts = squares.setdefault(group, {})
        of_parts[part] = of_parts.get(part, 0) + jnp.square(gradient).sum(tuple(axes))
    found = of_all_layers(squares)
    for group in squares.keys() - set(LAYERS):
        found |= squares[group]
    without_memory = layers - len(found["memory"]) if "memory" in found else 0
    if without_memory:  # layers below those with a memory
        found["memory"] = jnp.pad(found["memory"], (without_memory, 0))
    return jax.tree.map(jnp.sqrt, found)


def of_all_layers(groups: dict[str, dict]) -> dict[str, jax.Array]:
    """{part: [L, ...]}, from {part: [layers of the group, ...]} of each group of `transformer.LAYERS` in a tree."""
    lower, *rest = [groups[group] for group in LAYERS if group in groups] or [{}]
    return {part: jnp.concatenate([lower[part], *(of[part] for of in rest)]) for part in lower} if rest else lower


def of_added(sums: dict[str, jax.Array], of_rows: dict[str, jax.Array], index_SAN) -> dict[str, jax.Array]:
    """The norm of what each part adds to the residual stream, [L]. The first two arguments are of `modules.ADDED`.

    Args:
      sums: {part: squares summed over the positions of each batch shard, [L, S]}.
      of_rows: {part: squares of the rows of distinct ids, [L, S, U]}.
      index_SAN: the row of each position.
    """
    squares = {part: sum_LS.sum(-1) for part, sum_LS in sums.items()}
    for part, square_LSU in of_rows.items():
        # Products and sums, as a matrix product would be rounded.
        squares[part] = (square_LSU * _positions_of(index_SAN, square_LSU.shape[-1])).sum((1, 2))
    return jax.tree.map(lambda square_L: jnp.sqrt(square_L / index_SAN.size), squares)


def _positions_of(index_SAN, rows: int) -> jax.Array:
    """The number of positions that take each row, float32 [S, U]. Rows that pad the distinct ids are taken by none."""
    return jax.vmap(lambda index_AN: jnp.zeros(rows).at[index_AN.reshape(-1)].add(1.0))(index_SAN)


def record(norms) -> dict | None:
    """Norms on the host as JSON holds them, with six digits; None if one is not finite, as of a skipped step."""
    values = jax.tree.map(lambda x: [float(f"{v:.6g}") for v in x] if x.ndim else float(f"{x:.6g}"), norms)
    return values if all(map(math.isfinite, jax.tree.leaves(values))) else None
