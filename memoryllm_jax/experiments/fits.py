"""A law of the loss over active parameters, memory parameters and tokens, fitted to finished runs.

    L = E + A (N_a + k N_m)^-alpha + B (D (1 + r s))^-beta,    s = N_m / (N_a + N_m)

with N_a active parameters, N_m parameters of the token memory and D tokens: the law of Hoffmann et al. (2022,
"Training Compute-Optimal Large Language Models", arXiv 2203.15556, equation 2) with two numbers for a token memory.
k is what a parameter of the memory is worth, in active parameters, once the model has learnt; r is a gain
in data efficiency: a model of which a share s is memory learns from D tokens what one without memory learns from
D (1 + r s). Each kind of token memory has its own k and r.

As there (appendix D.3), the Huber loss with delta 1e-3 of the difference of log losses is minimised, from several
starting points. Intervals are percentiles over fits to resampled settings, each with the runs of all its seeds: what
the law gets wrong is the same for all seeds of a setting.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import intervals
from memoryllm_jax.experiments.intervals import Interval

_DELTA = 1e-3  # of the Huber loss
_FAR = 1e15  # tokens that no run has: a crossing after them is none
_MOST_STEPS = 300  # of a minimisation, for resampled settings that leave a number undetermined
_SHARED = ("E", "A", "alpha", "B", "beta")  # the law's numbers that all kinds of memory share
REPLICATES = 200


class Point(NamedTuple):
    """A finished run.

    active, memory: parameters that every token passes, and those of the token memory.
    tokens: that it was trained on.
    loss: held-out loss, in any unit.
    kind: of token memory; "" without one.
    setting: what the runs of several seeds have in common.
    """

    active: float
    memory: float
    tokens: float
    loss: float
    kind: str
    setting: str


class Law:
    """The law with its numbers.

    Args:
      kinds: of token memory, each with its own k and r.
      numbers: log E, log A, alpha, log B, beta, then k of each kind and r of each kind. A and B are those of
        parameters and tokens in units of `scale`.
      scale: unit of parameters and of tokens, near the middle of the runs', so that A and alpha can be fitted together.
    """

    def __init__(self, kinds: Sequence[str], numbers: np.ndarray, scale: tuple[float, float]):
        self.kinds, self.numbers, self.scale = tuple(kinds), numbers, scale
        self._e, self._a, self._alpha, self._b, self._beta, *rest = numbers
        self._worth = {"": 0.0} | dict(zip(kinds, rest))
        self._gain = {"": 0.0} | dict(zip(kinds, rest[len(kinds) :]))

    def loss(self, active: float, memory: float, tokens: float, kind: str) -> float:
        """The loss that the law gives."""
        return float(
            math.exp(self._e) + self._limit(active, memory, kind) + self._unlearnt(active, memory, tokens, kind)
        )

    def named(self) -> dict[str, float]:
        """The numbers by name: E, A, alpha, B, beta, and "k KIND" and "r KIND" of each kind."""
        parameters, tokens = self.scale
        shared = (
            math.exp(self._e),
            math.exp(self._a) * parameters**self._alpha,
            self._alpha,
            math.exp(self._b) * tokens**self._beta,
            self._beta,
        )
        worth = {f"k {kind}": self._worth[kind] for kind in self.kinds}
        return dict(zip(_SHARED, map(float, shared))) | worth | {f"r {kind}": self._gain[kind] for kind in self.kinds}

    def crossing(self, base: tuple[float, float], other: tuple[float, float], kind: str) -> float:
        """Tokens after which base is ahead of a model with a token memory, and stays ahead.

        Args:
          base, other: (active, memory) parameters.
          kind: of the other's memory.
        Returns: 0 if base is always ahead, and infinity if it never is.
        """
        # L_base = L_other at D^-beta B' (1 - (1 + r s)^-beta) = A' (N_other^-alpha - N_base^-alpha).
        behind = self._limit(*other, kind) - self._limit(*base, "")
        ahead = self._unlearnt(*base, 1.0, "") - self._unlearnt(*other, 1.0, kind)
        if ahead <= 0:
            return 0.0 if behind >= 0 else math.inf
        if behind <= 0:
            return math.inf
        log_tokens = math.log(ahead / behind) / max(self._beta, 1e-9)
        return math.exp(log_tokens) if log_tokens < math.log(_FAR) else math.inf

    def _limit(self, active, memory, kind):
        """What more tokens do not take away, above E."""
        return math.exp(self._a) * ((active + self._worth[kind] * memory) / self.scale[0]) ** -self._alpha

    def _unlearnt(self, active, memory, tokens, kind):
        share = memory / (active + memory)
        return math.exp(self._b) * (tokens / self.scale[1] * (1 + self._gain[kind] * share)) ** -self._beta


class Fit(NamedTuple):
    """A fitted law.

    law: with the best numbers.
    replicates: laws fitted to resampled settings.
    error: root mean square of the difference of log losses at the points that it was fitted to.
    """

    law: Law
    replicates: list[Law]
    error: float

    def numbers(self) -> dict[str, Interval]:
        """The interval of each number, by the names of `Law.named`."""
        of_replicates = [law.named() for law in self.replicates]
        return {
            name: intervals.of_replicates(value, [numbers[name] for numbers in of_replicates])
            for name, value in self.law.named().items()
        }

    def predicted(self, point: Point) -> Interval:
        """The loss that the law gives for a run, such as one that was left out."""
        return self._each(lambda law: law.loss(*point[:3], point.kind))

    def crossing(self, base: tuple[float, float], other: tuple[float, float], kind: str) -> Interval:
        """`Law.crossing` with its interval, which may end at 0 or infinity."""
        return self._each(lambda law: law.crossing(base, other, kind))

    def _each(self, value):
        return intervals.of_replicates(value(self.law), [value(law) for law in self.replicates])


def fit(points: Sequence[Point], replicates: int = REPLICATES, seed: int = 0) -> Fit:
    """Fits the law to runs.

    Args:
      replicates: fits to resampled settings, for the intervals.
      seed: of the resampling.
    Raises: UserError if there are fewer than two settings for each number to fit.
    """
    kinds = sorted({point.kind for point in points} - {""})
    needed, found = 2 * (len(_SHARED) + 2 * len(kinds)), len({point.setting for point in points})
    if found < needed:
        raise UserError(f"fit: expected at least {needed} settings, twice as many as its numbers, found {found}")
    data = _Data.of(points, kinds)
    best = min((_minimum(data, start) for start in _starts(data)), key=lambda found: found.cost)
    rng, laws = np.random.default_rng(seed), []
    for _ in range(replicates):
        drawn = data.resampled(rng)
        laws.append(Law(kinds, _minimum(drawn, best.x).x, data.scale))
    residuals_N = data.residuals(best.x)
    return Fit(Law(kinds, best.x, data.scale), laws, float(np.sqrt(np.mean(residuals_N**2))))


class _Data(NamedTuple):
    """Runs as arrays.

    kind_NK: marks the kind of memory of each.
    settings: the runs of each setting.
    scale: as of `Law`, in whose units parameters and tokens are.
    least_worth: the lowest k. It is below 0, as the interval of a useless memory would end at a bound of 0, and high
      enough that N_a + k N_m stays positive.
    """

    active_N: np.ndarray
    memory_N: np.ndarray
    tokens_N: np.ndarray
    log_loss_N: np.ndarray
    kind_NK: np.ndarray
    settings: list[np.ndarray]
    scale: tuple[float, float]
    least_worth: float

    @classmethod
    def of(cls, points, kinds):
        active, memory, tokens, loss = (np.array([point[field] for point in points], float) for field in range(4))
        kind_NK = np.array([[point.kind == kind for kind in kinds] for point in points], float)
        kind_NK = kind_NK.reshape(len(points), len(kinds))
        _, setting_N = np.unique([point.setting for point in points], return_inverse=True)
        settings = [np.flatnonzero(setting_N == number) for number in range(setting_N.max() + 1)]
        scale = float(np.exp(np.log(active).mean())), float(np.exp(np.log(tokens).mean()))
        least = -0.9 * float(np.min(active[memory > 0] / memory[memory > 0], initial=1.0))
        return cls(
            active / scale[0], memory / scale[0], tokens / scale[1], np.log(loss), kind_NK, settings, scale, least
        )

    def resampled(self, rng):
        """As many settings, drawn with replacement."""
        chosen = rng.integers(len(self.settings), size=len(self.settings))
        drawn = np.concatenate([self.settings[number] for number in chosen])
        return self._replace(**{name: getattr(self, name)[drawn] for name in self._fields[:5]})

    def residuals(self, x) -> np.ndarray:
        """Log loss by the law less that of the run, for each run."""
        e, a, alpha, b, beta = x[: len(_SHARED)]
        worth_K, gain_K = np.split(np.asarray(x[len(_SHARED) :]), 2)
        share_N = self.memory_N / (self.active_N + self.memory_N)
        parameters_N = self.active_N + self.kind_NK @ worth_K * self.memory_N
        tokens_N = self.tokens_N * (1 + self.kind_NK @ gain_K * share_N)
        loss_N = np.exp(e) + np.exp(a) * parameters_N**-alpha + np.exp(b) * tokens_N**-beta
        return np.log(loss_N) - self.log_loss_N


def _starts(data: _Data) -> Iterator[list[float]]:
    """Starting points: shares of the lowest loss that E has, exponents, and gains of the memory."""
    lowest, kinds = float(np.exp(data.log_loss_N.min())), data.kind_NK.shape[1]
    for share, exponent, gain in itertools.product((0.3, 0.8), (0.15, 0.5), (0.0, 1.0)):
        rest = math.log(lowest * (1 - share) / 2)
        yield [math.log(lowest * share), rest, exponent, rest, exponent, *[0.1] * kinds, *[gain] * kinds]


def _minimum(data: _Data, start):
    """SciPy's result of the minimisation from one starting point."""
    from scipy import optimize  # which takes a second to import; jax requires SciPy

    kinds = data.kind_NK.shape[1]
    low = [-20, -20, 0.0, -20, 0.0, *[data.least_worth] * kinds, *[-0.9] * kinds]
    high = [5, 5, 3.0, 5, 3.0, *[100.0] * kinds, *[1000.0] * kinds]
    return optimize.least_squares(
        data.residuals,
        np.clip(start, low, high),
        bounds=(low, high),
        loss="huber",
        f_scale=_DELTA,
        x_scale="jac",
        max_nfev=_MOST_STEPS,
    )
