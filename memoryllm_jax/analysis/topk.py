"""The largest of what streams by, kept a row at a time: memory is that of the winners, whatever the stream's length."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Best(NamedTuple):
    """The k largest so far of each of R rows, in falling order, and what they are labelled with (-1: none yet)."""

    values_Rk: jax.Array
    labels_Rk: jax.Array


def empty(rows: int, k: int) -> Best:
    return Best(jnp.full((rows, k), -jnp.inf), jnp.full((rows, k), -1, jnp.int32))


@jax.jit
def merge(best: Best, values_RN, labels_N) -> Best:
    """With N more candidates, which all rows share; one of value -inf is none."""
    k = best.values_Rk.shape[1]
    values, at = jax.lax.top_k(values_RN, min(k, values_RN.shape[1]))
    labels = jnp.where(jnp.isfinite(values), labels_N[at], -1)
    values = jnp.concatenate([best.values_Rk, values], 1)
    labels = jnp.concatenate([best.labels_Rk, labels], 1)
    values, at = jax.lax.top_k(values, k)
    return Best(values, jnp.take_along_axis(labels, at, 1))


class Triggers(NamedTuple):
    """What fires each of K keys most, strongest first, on the side of its strongest.

    sign_K: 1 or -1; sign * c is positive.  labels_Kt: of the stream, -1 where it had fewer.  c_Kt: coefficients.
    """

    sign_K: np.ndarray
    labels_Kt: np.ndarray
    c_Kt: np.ndarray


class TwoSided:
    """Triggers of K keys, found in one pass.

    SwiGLU's coefficients have two signs, and to flip a key and its value changes nothing of the model, so a key's sign
    means nothing by itself. The t largest and the t smallest are kept until it is known which side the strongest is on.
    """

    def __init__(self, keys: int, top: int):
        self._sides = [empty(keys, top), empty(keys, top)]

    def add(self, c_NK, labels_N, real_N) -> None:
        """Coefficients of N more queries; those that are not real only fill up."""
        c_KN = c_NK.T
        for side, sign in enumerate((1, -1)):
            values_KN = jnp.where(real_N, sign * c_KN, -jnp.inf)
            self._sides[side] = merge(self._sides[side], values_KN, labels_N)

    def result(self) -> Triggers:
        up, down = (jax.device_get(side) for side in self._sides)
        positive = (up.values_Rk[:, 0] >= down.values_Rk[:, 0])[:, None]
        sign = np.where(positive, 1, -1)
        values = sign * np.where(positive, up.values_Rk, down.values_Rk)
        # A key that fires on few queries has the rest of its list from the other sign: they are no triggers.
        labels = np.where(values * sign > 0, np.where(positive, up.labels_Rk, down.labels_Rk), -1)
        return Triggers(sign[:, 0], labels, np.where(labels < 0, 0.0, values))
