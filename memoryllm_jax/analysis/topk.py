"""Streaming top-k per row, in memory proportional to k."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class TopK(NamedTuple):
    """The k largest values of each of R rows so far, in falling order.

    values_Rk: -inf where fewer than k have come.  labels_Rk: what the values belong to, -1 where there is none.
    """

    values_Rk: jax.Array
    labels_Rk: jax.Array


def empty(rows: int, k: int) -> TopK:
    return TopK(jnp.full((rows, k), -jnp.inf), jnp.full((rows, k), -1, jnp.int32))


@jax.jit
def merge(top: TopK, values_RN, labels_N) -> TopK:
    """The k largest of `top` and N more values of each row. A value of -inf is left out."""
    k = top.values_Rk.shape[1]
    # First the k largest of the N: only these, and not all N, are then put beside the ones so far.
    values, at = jax.lax.top_k(values_RN, min(k, values_RN.shape[1]))
    labels = jnp.where(jnp.isfinite(values), labels_N[at], -1)
    values = jnp.concatenate([top.values_Rk, values], 1)
    labels = jnp.concatenate([top.labels_Rk, labels], 1)
    values, at = jax.lax.top_k(values, k)
    return TopK(values, jnp.take_along_axis(labels, at, 1))


class Triggers(NamedTuple):
    """The t strongest triggers of each of K keys, strongest first, on the side of the key's strongest.

    sign_K: 1 or -1, the sign of a key's coefficients c.
    labels_Kt: of the triggers, -1 where a key has fewer.
    c_Kt: coefficients, 0 where a key has fewer triggers.
    """

    sign_K: np.ndarray
    labels_Kt: np.ndarray
    c_Kt: np.ndarray


class TwoSidedTopK:
    """Finds the triggers of K keys in one pass over queries.

    Coefficients of SwiGLU are positive or negative, and flipping both a key and its value leaves the model unchanged,
    so the sign of a key alone means nothing. The t largest and the t smallest coefficients are kept until the end of
    the pass, when it is known on which side the strongest one is.
    """

    def __init__(self, keys: int, top: int):
        self._largest = empty(keys, top)
        self._smallest = empty(keys, top)  # of negated coefficients

    def add(self, c_NK, labels_N, is_real_N) -> None:
        """Takes the coefficients of N more queries; those that are not real only fill up a chunk."""
        c_KN = c_NK.T
        self._largest = merge(self._largest, jnp.where(is_real_N, c_KN, -jnp.inf), labels_N)
        self._smallest = merge(self._smallest, jnp.where(is_real_N, -c_KN, -jnp.inf), labels_N)

    def triggers(self) -> Triggers:
        """The triggers among the queries taken so far."""
        largest, smallest = jax.device_get(self._largest), jax.device_get(self._smallest)
        is_positive_K1 = (largest.values_Rk[:, 0] >= smallest.values_Rk[:, 0])[:, None]
        sign_K1 = np.where(is_positive_K1, 1, -1)
        c_Kt = sign_K1 * np.where(is_positive_K1, largest.values_Rk, smallest.values_Rk)
        labels_Kt = np.where(is_positive_K1, largest.labels_Rk, smallest.labels_Rk)
        # The list of a key that fires on few queries ends in coefficients of the other sign, which are no triggers.
        labels_Kt = np.where(c_Kt * sign_K1 > 0, labels_Kt, -1)
        return Triggers(sign_K1[:, 0], labels_Kt, np.where(labels_Kt < 0, 0.0, c_Kt))
