"""A law of the loss over active parameters, memory parameters and tokens, fitted to finished runs.

    L = E + A (N_a + k N_m)^-alpha + B (D (1 + r s))^-beta,    s = N_m / (N_a + N_m)

with N_a active parameters, N_m parameters of the token memory and D tokens: the law of Hoffmann et al. (2022,
"Training Compute-Optimal Large Language Models", arXiv 2203.15556, equation 2) with two numbers for a token memory.
k is what a parameter of the memory is worth, in active parameters, once the model has learnt. r is a gain in data
efficiency: a model of which a share s is memory learns from D tokens what one without memory learns from D (1 + r s).
Each kind of token memory has its own k and r.

As there (appendix D.3), the Huber loss with delta 1e-3 of the difference of log losses is minimised, from several
starting points. Intervals are percentiles over fits to resampled curves, each with the runs of all its lengths: what
the law gets wrong is alike along a curve. Those of k and r are widened by sqrt(n / (n - 1)) for a kind with n curves,
as the percentiles of few are too narrow (Hesterberg 2015, arXiv 1411.5279, section 5.3).

In 200 simulations of the runs of configs/protocols/small.py (benchmarks/law_coverage.py), 95% intervals held the truth
in 98% (k and r of FFN-M, which has 9 curves) and in 91 to 96% (E, A, alpha, B and beta), with standard errors of 1 to
2%; those of crossings in 91 to 95% where the memory is useful.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import intervals
from memoryllm_jax.experiments.intervals import Interval

DELTA = 1e-3  # of the Huber loss
_FAR = 1e15  # tokens that no run has: a crossing after them is none
_MOST_STEPS = 300  # of a minimisation, for resampled curves that leave a number undetermined
_SHARED = ("E", "A", "alpha", "B", "beta")  # the law's numbers that all kinds of memory share
_SIZES = 3  # of models without a memory: with fewer, E and A N_a^-alpha cannot be told apart
_SIZES_OF_A_KIND = 2  # of models with a memory: with fewer, k and r cannot be told apart
_STARTS = 3  # starting points of the fit to resampled curves
REPLICATES = 200


class Point(NamedTuple):
    """The runs of one setting.

    active, memory: parameters that every token passes, and those of the token memory.
    tokens: that they were trained on.
    loss: mean of their held-out losses over seeds, in any unit.
    kind: of token memory; "" without one.
    size: of the model, by name.
    curve: what its settings of other lengths share with it: the name of variant and size.
    """

    active: float
    memory: float
    tokens: float
    loss: float
    kind: str
    size: str
    curve: str


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
        """The part of the loss above E that more tokens do not reduce."""
        return math.exp(self._a) * ((active + self._worth[kind] * memory) / self.scale[0]) ** -self._alpha

    def _unlearnt(self, active, memory, tokens, kind):
        share = memory / (active + memory)
        return math.exp(self._b) * (tokens / self.scale[1] * (1 + self._gain[kind] * share)) ** -self._beta


class Fit(NamedTuple):
    """A fitted law.

    law: with the best numbers.
    replicates: laws fitted to resampled curves.
    dropped: number of resampled fits that did not converge, which are not among the replicates.
    residuals_N: log loss by the law less that measured, of each point.
    curves: {kind of memory: number of its curves}.
    """

    law: Law
    replicates: list[Law]
    dropped: int
    residuals_N: np.ndarray
    curves: dict[str, int]

    @property
    def error(self) -> float:
        """Standard deviation of the law's error, as a share of the loss."""
        return float(math.sqrt(np.square(self.residuals_N).sum() / self._freedom))

    @property
    def _freedom(self) -> int:
        return max(len(self.residuals_N) - len(self.law.numbers), 1)

    def numbers(self) -> dict[str, Interval]:
        """The interval of each number, by the names of `Law.named`."""
        of_replicates = [law.named() for law in self.replicates]
        found = {
            name: intervals.of_replicates(value, [numbers[name] for numbers in of_replicates])
            for name, value in self.law.named().items()
        }
        for kind, curves in self.curves.items():
            factor = math.sqrt(curves / (curves - 1))
            for name in (f"k {kind}", f"r {kind}"):
                value, low, high = found[name]
                found[name] = Interval(value, value - factor * (value - low), value + factor * (high - value))
        return found

    def predicted(self, point: Point) -> Interval:
        """The loss of a setting, such as one that was left out. The interval includes the law's own error."""
        rng = np.random.default_rng(0)
        errors_R = rng.choice(self.residuals_N, len(self.replicates))
        errors_R = errors_R * math.sqrt(len(self.residuals_N) / self._freedom)
        losses = [law.loss(*point[:3], point.kind) for law in self.replicates]
        return intervals.of_replicates(self.law.loss(*point[:3], point.kind), losses * np.exp(-errors_R))

    def crossing(self, base: tuple[float, float], other: tuple[float, float], kind: str) -> Interval:
        """`Law.crossing` with its interval, which may end at 0 or infinity."""
        found = [law.crossing(base, other, kind) for law in self.replicates]
        return intervals.of_replicates(self.law.crossing(base, other, kind), found)


def few_sizes(points: Sequence[Point]) -> dict[str, int]:
    """{kind: number of its sizes} of the kinds that have too few sizes for their numbers to be told apart."""
    sizes: dict[str, set[str]] = {"": set()}
    for point in points:
        sizes.setdefault(point.kind, set()).add(point.size)
    return {kind: len(found) for kind, found in sizes.items() if len(found) < (_SIZES_OF_A_KIND if kind else _SIZES)}


def fit(points: Sequence[Point], replicates: int = REPLICATES, seed: int = 0) -> Fit:
    """Fits the law to the settings of runs.

    Args:
      replicates: fits to resampled curves, for the intervals.
      seed: of the resampling.
    Raises: UserError if the settings do not determine the numbers of the law.
    """
    for kind, sizes in few_sizes(points).items():
        needed = f"{_SIZES_OF_A_KIND} sizes with {kind}" if kind else f"{_SIZES} sizes without a memory"
        raise UserError(f"fit: expected at least {needed}, as the law has no unique fit otherwise, found {sizes}")
    kinds = sorted({point.kind for point in points} - {""})
    needed = 2 * (len(_SHARED) + 2 * len(kinds))
    if len(points) < needed:
        raise UserError(f"fit: expected at least {needed} settings, twice as many as its numbers, found {len(points)}")
    data = Data.of(points, kinds)
    best = _best(data, list(starting_points(data)))
    if best is None:
        raise UserError(f"fit: expected a minimum within {_MOST_STEPS} steps, found none")
    starts = [best, *list(starting_points(data))[: _STARTS - 1]]
    rng = np.random.default_rng(seed)
    found = [_best(data.of_points(drawn), starts) for drawn in resampled(points, rng, replicates)]
    laws = [Law(kinds, numbers, data.scale) for numbers in found if numbers is not None]
    if not laws:
        raise UserError("fit: expected resampled curves with a minimum, found none")
    curves = {kind: len({point.curve for point in points if point.kind == kind}) for kind in kinds}
    return Fit(Law(kinds, best, data.scale), laws, len(found) - len(laws), data.residuals(best), curves)


def resampled(points: Sequence[Point], rng, replicates: int) -> Iterator[list[int]]:
    """Numbers of the points of as many curves, drawn with replacement. Draws that determine no law are drawn again."""
    curves: dict[str, list[int]] = {}
    for number, point in enumerate(points):
        curves.setdefault(point.curve, []).append(number)
    of_curves, kinds = list(curves.values()), {point.kind for point in points}
    for _ in range(replicates):
        while True:
            chosen = rng.integers(len(of_curves), size=len(of_curves))
            drawn = [number for curve in chosen for number in of_curves[curve]]
            sample = [points[number] for number in drawn]
            if kinds == {point.kind for point in sample} and not few_sizes(sample):
                break
        yield drawn


class Data(NamedTuple):
    """Points as arrays.

    kind_NK: marks the kind of memory of each.
    scale: as of `Law`, in whose units parameters and tokens are.
    least_K: the lowest k of each kind. It is below 0, as the interval of a useless memory would end at a bound of 0,
      and high enough that N_a + k N_m stays positive.
    """

    active_N: np.ndarray
    memory_N: np.ndarray
    tokens_N: np.ndarray
    log_loss_N: np.ndarray
    kind_NK: np.ndarray
    scale: tuple[float, float]
    least_K: np.ndarray

    @classmethod
    def of(cls, points, kinds):
        active, memory, tokens, loss = (np.array([point[field] for point in points], float) for field in range(4))
        kind_NK = np.array([[point.kind == kind for kind in kinds] for point in points], float)
        kind_NK = kind_NK.reshape(len(points), len(kinds))
        scale = float(np.exp(np.log(active).mean())), float(np.exp(np.log(tokens).mean()))
        least_K = [-0.9 * min(p.active / p.memory for p in points if p.kind == kind) for kind in kinds]
        return cls(
            active / scale[0], memory / scale[0], tokens / scale[1], np.log(loss), kind_NK, scale, np.array(least_K)
        )

    def of_points(self, numbers: list[int]):
        """The data of the points with these numbers."""
        return self._replace(**{name: getattr(self, name)[numbers] for name in self._fields[:5]})

    def residuals(self, x) -> np.ndarray:
        """Log loss by the law less that measured, for each point.

        Args:
          x: float [..., P]: the numbers of one law, as of `Law`, or of several.
        Returns: float [..., N].
        """
        return np.log(sum(self._terms(x)[:3])) - self.log_loss_N

    def slopes(self, x) -> np.ndarray:
        """Derivatives of the residuals by the numbers: float [..., N, P]."""
        alpha, beta = x[..., 2, None], x[..., 4, None]
        e_N, a_N, b_N, parameters_N, tokens_N, share_N = self._terms(x)
        slope_a_N, slope_b_N = -alpha * a_N / parameters_N, -beta * b_N / tokens_N
        slopes = [e_N, a_N, -a_N * np.log(parameters_N), b_N, -b_N * np.log(tokens_N)]
        slopes += [slope_a_N * self.memory_N * kind_N for kind_N in self.kind_NK.T]
        slopes += [slope_b_N * self.tokens_N * share_N * kind_N for kind_N in self.kind_NK.T]
        return np.stack(slopes, -1) / (e_N + a_N + b_N)[..., None]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest numbers of a fit."""
        kinds = self.kind_NK.shape[1]
        low = [-20, -20, 0.0, -20, 0.0, *self.least_K, *[-0.9] * kinds]
        return np.array(low), np.array([5, 5, 3.0, 5, 3.0, *[100.0] * kinds, *[1000.0] * kinds])

    def _terms(self, x):
        """The three terms of the law, the parameters and tokens in its brackets, and the share s."""
        e, a, alpha, b, beta = (x[..., number, None] for number in range(len(_SHARED)))
        kinds = self.kind_NK.shape[1]
        worth_N = x[..., len(_SHARED) :][..., :kinds] @ self.kind_NK.T
        gain_N = x[..., len(_SHARED) :][..., kinds:] @ self.kind_NK.T
        share_N = self.memory_N / (self.active_N + self.memory_N)
        parameters_N, tokens_N = self.active_N + worth_N * self.memory_N, self.tokens_N * (1 + gain_N * share_N)
        a_N, b_N = np.exp(a) * parameters_N**-alpha, np.exp(b) * tokens_N**-beta
        return np.exp(e) + np.zeros_like(a_N), a_N, b_N, parameters_N, tokens_N, share_N


def starting_points(data: Data) -> Iterator[list[float]]:
    """Starting points: gains of the memory, exponents, and shares of the lowest loss that E has."""
    lowest, kinds = float(np.exp(data.log_loss_N.min())), data.kind_NK.shape[1]
    for gain, exponent, share in itertools.product((0.0, 1.0), (0.15, 0.5), (0.3, 0.8)):
        rest = math.log(lowest * (1 - share) / 2)
        yield [math.log(lowest * share), rest, exponent, rest, exponent, *[0.1] * kinds, *[gain] * kinds]


def _best(data: Data, starts) -> np.ndarray | None:
    """The numbers of the lowest minimum that is reached from the starting points; None if none is reached."""
    from scipy import optimize  # which takes a second to import; jax requires SciPy

    low, high = data.bounds()
    found = []
    for start in starts:
        start = np.clip(start, low, high)
        options = {"bounds": (low, high), "loss": "huber", "f_scale": DELTA, "x_scale": "jac"}
        found.append(optimize.least_squares(data.residuals, start, data.slopes, max_nfev=_MOST_STEPS, **options))
    converged = [result for result in found if result.success]
    return min(converged, key=lambda result: result.cost).x if converged else None
