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
in 98 to 99% (k and r of FFN-M, which has 10 curves, and crossings) and in 94 to 95% (k and r of plain tables, which
have 3), each with a standard error of 1 to 2%.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import intervals
from memoryllm_jax.experiments.intervals import Interval

_DELTA = 1e-3  # of the Huber loss
_FAR = 1e15  # tokens that no run has: a crossing after them is none
_MOST_STEPS = 1000  # of a minimisation: curves that leave a number undetermined take hundreds
_STILL = 1e-9  # share of the loss by which the steps at a minimum change it, at most
_STILL_STEPS = 3  # such steps that end a minimisation: a single one may be due to much damping
_SHARED = ("E", "A", "alpha", "B", "beta")  # the law's numbers that all kinds of memory share
_SIZES = 3  # of models without a memory: with fewer, E and A N_a^-alpha cannot be told apart
_SIZES_OF_A_KIND = 2  # of models with a memory: with fewer, k and r cannot be told apart
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
    data = _Data.of(points, kinds)
    starts_SP = _starts(data)
    (best_P,), (converged,) = _best(data, starts_SP, np.ones((1, len(points))))
    if not converged:
        raise UserError(f"fit: expected a minimum within {_MOST_STEPS} steps, found none")
    counts_RN = _resampled(points, np.random.default_rng(seed), replicates)
    numbers_RP, converged_R = _best(data, np.array([best_P, *starts_SP]), counts_RN)
    laws = [Law(kinds, numbers_P, data.scale) for numbers_P in numbers_RP[converged_R]]
    if not laws:
        raise UserError("fit: expected resampled curves with a minimum, found none")
    curves = {kind: len({point.curve for point in points if point.kind == kind}) for kind in kinds}
    return Fit(Law(kinds, best_P, data.scale), laws, replicates - len(laws), data.residuals(best_P), curves)


def _resampled(points: Sequence[Point], rng, replicates: int) -> np.ndarray:
    """Draws as many curves with replacement. Draws that determine no law are drawn again.

    Returns: float [R, N]: how often each draw has each point.
    """
    number_of = {curve: number for number, curve in enumerate(dict.fromkeys(point.curve for point in points))}
    curve_N = [number_of[point.curve] for point in points]
    kinds = {point.kind for point in points}
    counts_RN = np.empty((replicates, len(points)))
    for counts_N in counts_RN:
        while True:
            chosen = rng.integers(len(number_of), size=len(number_of))
            counts_N[:] = np.bincount(chosen, minlength=len(number_of))[curve_N]
            sample = [point for point, count in zip(points, counts_N) if count]
            if kinds == {point.kind for point in sample} and not few_sizes(sample):
                break
    return counts_RN


class _Data(NamedTuple):
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


def _starts(data: _Data) -> np.ndarray:
    """Starting points, float [S, P]: gains of the memory, exponents, and shares of the lowest loss that E has."""
    lowest, kinds = float(np.exp(data.log_loss_N.min())), data.kind_NK.shape[1]
    starts = []
    for gain, exponent, share in itertools.product((0.0, 1.0), (0.15, 0.5), (0.3, 0.8)):
        rest = math.log(lowest * (1 - share) / 2)
        starts.append([math.log(lowest * share), rest, exponent, rest, exponent, *[0.1] * kinds, *[gain] * kinds])
    return np.array(starts)


def _best(data: _Data, starts_SP: np.ndarray, counts_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest minimum that is reached from any starting point, with points that count as often as given.

    Returns: the numbers, float [R, P], and whether any minimum was reached, bool [R].
    """
    replicates, starts = len(counts_RN), len(starts_SP)
    x, loss = _minima(data, np.tile(starts_SP, (replicates, 1)), np.repeat(counts_RN, starts, 0))
    x_RSP, loss_RS = x.reshape(replicates, starts, -1), loss.reshape(replicates, starts)
    return x_RSP[np.arange(replicates), loss_RS.argmin(1)], np.isfinite(loss_RS.min(1))


def _minima(data: _Data, starts_RP: np.ndarray, counts_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimises the Huber loss from each start. All take their steps together, as NumPy is slow on small arrays.

    Newton's steps are damped by the method of Marquardt (1963, doi 10.1137/0111030). A step leaves out the numbers that
    it would push beyond their bounds (Bertsekas 1982, doi 10.1137/0320018): clipping them afterwards would leave the
    other numbers at values that go with the clipped ones.

    Args:
      starts_RP: the numbers to start from.
      counts_RN: how often each point counts.
    Returns: the numbers, float [R, P], and their losses, float [R], infinite where no minimum was reached.
    """
    low_P, high_P = data.bounds()
    x_RP = np.clip(starts_RP, low_P, high_P)
    residuals_RN = data.residuals(x_RP)
    loss_R = (counts_RN * _huber(residuals_RN)).sum(1)
    damping_R, still_R = np.ones(len(x_RP)), np.zeros(len(x_RP), int)
    for _ in range(_MOST_STEPS):
        (moving,) = np.nonzero(still_R < _STILL_STEPS)
        if not len(moving):
            break
        x, counts, loss = x_RP[moving], counts_RN[moving], loss_R[moving]
        new_x = np.clip(x - _steps(data, x, residuals_RN[moving], counts, damping_R[moving]), low_P, high_P)
        new_residuals = data.residuals(new_x)
        new_loss = (counts * _huber(new_residuals)).sum(1)

        helps, is_still = new_loss < loss, np.abs(new_loss - loss) <= _STILL * loss
        damping_R[moving] = np.clip(damping_R[moving] * np.where(helps, 0.5, 2), 1e-8, 1e10)
        still_R[moving[is_still]] += 1
        still_R[moving[helps & ~is_still]] = 0
        helped = moving[helps]
        x_RP[helped], residuals_RN[helped], loss_R[helped] = new_x[helps], new_residuals[helps], new_loss[helps]
    return x_RP, np.where(still_R < _STILL_STEPS, np.inf, loss_R)


def _steps(data: _Data, x_RP, residuals_RN, counts_RN, damping_R) -> np.ndarray:
    """What a damped Newton step subtracts from the numbers: float [R, P]."""
    # Only points within delta have a curvature, and they may be too few to determine a step. The damping is the
    # curvature of weighted squares that bound the Huber loss from above (Holland and Welsch 1977,
    # doi 10.1080/03610927708827533), which counts all points.
    distance_RN, damping_R1 = np.abs(residuals_RN), damping_R[:, None]
    weights_RN = counts_RN * np.minimum(1, _DELTA / np.maximum(distance_RN, 1e-300))
    slopes_RNP = data.slopes(x_RP)
    gradient_RP = ((weights_RN * residuals_RN)[:, None] @ slopes_RNP)[:, 0]
    low_P, high_P = data.bounds()
    is_stuck_RP = ((x_RP <= low_P) & (gradient_RP > 0)) | ((x_RP >= high_P) & (gradient_RP < 0))
    gradient_RP[is_stuck_RP] = 0
    slopes_RNP *= ~is_stuck_RP[:, None]
    curvature_RN = counts_RN * (distance_RN <= _DELTA) + damping_R1 * weights_RN
    curvature_RPP = (slopes_RNP * curvature_RN[..., None]).swapaxes(1, 2) @ slopes_RNP
    # Numbers that are stuck, or that cannot be told apart, would make the matrix singular.
    diagonal = np.arange(x_RP.shape[1])
    curvature_RPP[:, diagonal, diagonal] *= 1 + 1e-3 * damping_R1
    curvature_RPP[:, diagonal, diagonal] += 1e-14
    return np.linalg.solve(curvature_RPP, gradient_RP[..., None])[..., 0]


def _huber(residuals: np.ndarray) -> np.ndarray:
    apart = np.abs(residuals) / _DELTA
    return np.where(apart <= 1, apart**2 / 2, apart - 0.5)
