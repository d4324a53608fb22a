"""Streaming top-k per row, in memory proportional to k.

"Row" means a row of a matrix here, not of the token memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class TopK(NamedTuple):
    """The k largest values that each of R rows has had so far, in falling order.

    values_Rk: the values; -inf where a row has had fewer than k.
    labels_Rk: int32, what each value belongs to, such as a token id; -1 where there is no value.
    """

    values_Rk: jax.Array
    labels_Rk: jax.Array


def empty(rows: int, k: int) -> TopK:
    """A TopK that has had no values."""
    return TopK(jnp.full((rows, k), -jnp.inf), jnp.full((rows, k), -1, jnp.int32))


@jax.jit
def merge(top: TopK, values_RN, labels_N) -> TopK:
    """The k largest of `top` and of N more values in each row. A value of -inf does not count.

    Args:
      values_RN: the values.
      labels_N: int32, what the values belong to, the same for all rows.
    """
    k = top.values_Rk.shape[1]
    # The k largest of the N are found first, so that only 2k values, and not N + k, are copied side by side.
    values, at = jax.lax.top_k(values_RN, min(k, values_RN.shape[1]))
    labels = jnp.where(jnp.isfinite(values), labels_N[at], -1)
    values = jnp.concatenate([top.values_Rk, values], 1)
    labels = jnp.concatenate([top.labels_Rk, labels], 1)
    values, at = jax.lax.top_k(values, k)
    return TopK(values, jnp.take_along_axis(labels, at, 1))


class Triggers(NamedTuple):
    """The t strongest triggers of each of K keys, strongest first, of those with the sign of the strongest one.

    sign_K: 1 or -1, the sign of a key's triggers.
    labels_Kt: labels of the triggers; -1 where a key has fewer.
    c_Kt: their coefficients; 0 where a key has fewer.
    """

    sign_K: np.ndarray
    labels_Kt: np.ndarray
    c_Kt: np.ndarray


class TwoSidedTopK:
    """Finds the triggers of K keys in one pass over queries.

    Coefficients of SwiGLU are positive or negative, and flipping both a key and its value leaves the model unchanged,
    so the sign of a key alone means nothing. Only at the end of the pass is it known whether a key's strongest
    coefficient is positive or negative; until then, the t largest and the t smallest are both kept.

    Args:
      keys: K.
      top: t.
    """

    def __init__(self, keys: int, top: int):
        self._largest = empty(keys, top)
        self._smallest = empty(keys, top)  # of negated coefficients

    def add(self, c_NK, labels_N, is_real_N) -> None:
        """Adds the coefficients of N more queries.

        Args:
          labels_N: int32, the queries' labels.
          is_real_N: False for queries that only fill up a chunk, which do not count.
        """
        c_KN = c_NK.T
        self._largest = merge(self._largest, jnp.where(is_real_N, c_KN, -jnp.inf), labels_N)
        self._smallest = merge(self._smallest, jnp.where(is_real_N, -c_KN, -jnp.inf), labels_N)

    def triggers(self) -> Triggers:
        """The triggers among the queries that were added so far."""
        largest, smallest = jax.device_get(self._largest), jax.device_get(self._smallest)
        is_positive_K1 = (largest.values_Rk[:, 0] >= smallest.values_Rk[:, 0])[:, None]
        sign_K1 = np.where(is_positive_K1, 1, -1)
        c_Kt = sign_K1 * np.where(is_positive_K1, largest.values_Rk, smallest.values_Rk)
        labels_Kt = np.where(is_positive_K1, largest.labels_Rk, smallest.labels_Rk)
        # The list of a key that fires on few queries ends in coefficients of the other sign, which are no triggers.
        labels_Kt = np.where(c_Kt * sign_K1 > 0, labels_Kt, -1)
        return Triggers(sign_K1[:, 0], labels_Kt, np.where(labels_Kt < 0, 0.0, c_Kt))
