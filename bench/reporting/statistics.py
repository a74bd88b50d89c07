"""What may be concluded from a leaderboard: intervals over seeds, ranks over blocks, and tests between defenses.

Seeds of one cell are no independent blocks: figures are averaged over seeds first, and a block is one attack on one
data set and architecture (Demsar, JMLR 7, 2006).

The functions that need scipy.stats import it, as `bench.status` needs this module but none of them.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]
LEVEL = 0.95
ALPHA = 0.05


def t_halfwidth(std: ArrayLike, n: ArrayLike) -> Numbers:
    """Half of the 95 % t-interval of a mean, NaN for fewer than two values.

    This is the interval to print: resampling three seeds gives ten different means, all between the least and the
    largest seed, and an interval that is far too short.

    Args:
        std: sample standard deviations (n - 1).
        n: numbers of values.
    """
    from scipy import stats

    n = np.asarray(n, dtype=float)
    free = np.where(n > 1, n - 1, np.nan)
    return np.asarray(stats.t.ppf((1 + LEVEL) / 2, free) * np.asarray(std, dtype=float) / np.sqrt(np.maximum(n, 1)))


@functools.cache
def _resamples(n: int, draws: int) -> NDArray[np.int64]:
    """(R, n) indices: every resample there is while they are few, else fixed random ones."""
    if n**n <= draws:
        return np.array(list(itertools.product(range(n), repeat=n)))
    return np.random.default_rng(0).integers(0, n, (draws, n))


@functools.cache
def _weights(n: int, draws: int) -> Numbers:
    """(n, R): the share of each value in each resample."""
    chosen = _resamples(n, draws)
    counts = np.zeros((len(chosen), n))
    np.add.at(counts, (np.arange(len(chosen))[:, None], chosen), 1.0)
    return counts.T / n


def bootstrap_interval(values: ArrayLike, draws: int = 2000) -> tuple[Numbers, Numbers]:
    """95 % percentile interval of the mean, rows apart; exact where all n**n resamples are at most `draws`.

    Args:
        values: (rows, n) without gaps.

    Returns:
        low and high, (rows,); NaN for n < 2.
    """
    values = np.atleast_2d(np.asarray(values, dtype=float))
    rows, n = values.shape
    if n < 2:
        return np.full(rows, np.nan), np.full(rows, np.nan)
    chosen = _resamples(n, draws)
    weights = None if n**n <= draws else _weights(n, draws)
    low, high = np.empty(rows), np.empty(rows)
    step = max(1, 2**21 // chosen.size)  # a large table times all resamples would fill the memory
    for start in range(0, rows, step):
        samples = values[start : start + step]
        # The product is an order of magnitude faster. Where all resamples are taken, the means stay exact.
        means = samples[:, chosen].mean(axis=2) if weights is None else samples @ weights
        low[start : start + step], high[start : start + step] = np.quantile(
            means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1
        )
    return low, high


def average_ranks(values: ArrayLike) -> Numbers:
    """(methods,) mean rank over blocks; rank 1 is the least value, ties share the mean of their ranks.

    Args:
        values: (blocks, methods), lower is better; infinity is worse than every figure (failed, diverged, wrecked).
    """
    from scipy import stats

    return np.asarray(stats.rankdata(np.asarray(values, dtype=float), axis=1).mean(axis=0))


def friedman(values: ArrayLike) -> tuple[float, float]:
    """Friedman's chi-square with correction for ties, and its p; NaN for fewer than 3 methods or 2 blocks.

    Args:
        values: (blocks, methods), as `average_ranks`.
    """
    from scipy import stats

    ranks = stats.rankdata(np.asarray(values, dtype=float), axis=1)
    blocks, methods = ranks.shape
    if methods < 3 or blocks < 2 or np.ptp(ranks) == 0:
        return float("nan"), float("nan")
    test = stats.friedmanchisquare(*ranks.T)
    return float(test.statistic), float(test.pvalue)


@functools.cache
def critical_difference(methods: int, blocks: int, alpha: float = ALPHA) -> float:
    """Nemenyi's critical difference: average ranks that differ by less cannot be told apart."""
    from scipy import stats

    q = stats.studentized_range.ppf(1 - alpha, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * blocks)))


def cliques(ranks: ArrayLike, difference: float) -> list[tuple[float, float]]:
    """The bars of a critical-difference diagram: from and to which rank methods cannot be told apart.

    Only the longest: no bar lies inside another, and none holds a single method.
    """
    ordered = np.sort(np.asarray(ranks, dtype=float))
    bars: list[tuple[float, float]] = []
    for start, low in enumerate(ordered):
        within = ordered[start:][ordered[start:] - low < difference]
        if len(within) > 1 and (not bars or within[-1] > bars[-1][1]):
            bars.append((float(low), float(within[-1])))
    return bars


def holm(p: ArrayLike) -> Numbers:
    """Holm's adjusted p-values; a NaN is no test and stays NaN."""
    p = np.asarray(p, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def paired_t(one: ArrayLike, other: ArrayLike) -> float:
    """Two-sided p of the paired t-test over pairs that share an infected model; NaN for fewer than two pairs.

    Where all differences are equal, t is infinite however few they are. The exact test that turns their signs takes
    its place: p is 2 / 2**n, so that two equal differences give 0.5, and not 0.
    """
    from scipy import stats

    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    if len(difference) < 2 or not np.isfinite(difference).all():
        return float("nan")
    spread, largest = difference.std(ddof=1), np.abs(difference).max()
    if spread <= 1e-9 * largest:  # 0.5 - 0.25 and 0.3 - 0.05 differ in their last bit
        return 1.0 if largest == 0 else 2.0 / 2 ** len(difference)
    t = difference.mean() / (spread / np.sqrt(len(difference)))
    return float(2 * stats.t.sf(abs(t), len(difference) - 1))


def signed_ranks(one: ArrayLike, other: ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test over blocks, exact up to 13 pairs that differ.

    Blocks in which both are equal are left out, as Wilcoxon did; 1 if nothing is left.
    """
    from scipy import stats

    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    exact = len(difference) <= 13
    if exact:
        # All 2**n signs: scipy's own exact table does not hold where two differences are equal in size.
        ranks = stats.rankdata(np.abs(difference))
        signs = np.array(list(itertools.product((0.0, 1.0), repeat=len(ranks))))
        sums, middle = signs @ ranks, ranks.sum() / 2
        reach = abs(ranks[difference > 0].sum() - middle)
        return float((np.abs(sums - middle) >= reach - 1e-9).mean())
    return float(stats.wilcoxon(difference).pvalue)


def least_p(blocks: int) -> float:
    """The least two-sided p that Wilcoxon's test can reach: 0.0625 for 5 blocks, 0.031 for 6."""
    return min(1.0, 2.0 / 2**blocks)


@dataclass(frozen=True)
class Ranking:
    """Methods over blocks.

    Attributes:
        ranks: average rank of each method, 1 is best.
        blocks: how many blocks they were ranked in.
        statistic, p: Friedman's test that all are alike; NaN where it cannot be made.
        difference: Nemenyi's critical difference at 5 %; NaN where there is no test.
        alike: methods not significantly worse than the one of the best rank (Wilcoxon over blocks, Holm), incl. itself.
    """

    ranks: dict[str, float]
    blocks: int
    statistic: float
    p: float
    difference: float
    alike: frozenset[str]

    def sentence(self) -> str:
        """What can be claimed, in one line."""
        count = f"{len(self.ranks)} defenses over {self.blocks} block{'' if self.blocks == 1 else 's'}"
        if len(self.ranks) < 3 or self.blocks < 2:
            return f"ranks: {count}; Friedman's test needs at least 3 defenses and 2 blocks, so nothing is claimed"
        if np.isnan(self.p):
            return f"ranks: {count}; all of them tie in every block, so nothing is claimed"
        text = (
            f"ranks: {count}; Friedman χ² {self.statistic:.2f}, p {p_text(self.p)}; critical difference (Nemenyi, 5 %) "
            f"{self.difference:.2f}"
        )
        pairs, least = len(self.ranks) - 1, least_p(self.blocks)
        if least * pairs >= ALPHA:
            text += (
                f"; with {self.blocks} blocks and {pairs} comparisons with the best, Wilcoxon's p with Holm cannot "
                f"fall below {min(1.0, least * pairs):.2g}, so no difference of two can be significant"
            )
        return text


def p_text(p: float) -> str:
    """A p-value as it is printed; what is below 0.001 is said to be so."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def rank(values: ArrayLike, names: list[str], worst: float) -> Ranking:
    """Rank methods over blocks and test them.

    Args:
        values: (blocks, methods), lower is better; infinity for a failed, diverged or wrecked cell.
        worst: the worst value that a figure can have, put in place of infinity where a test needs differences.
    """
    values = np.asarray(values, dtype=float)
    ranks = average_ranks(values)
    statistic, p = friedman(values)
    finite = np.where(np.isinf(values), worst, values)
    best = int(ranks.argmin())
    others = [index for index in range(len(names)) if index != best]
    adjusted = holm([signed_ranks(finite[:, index], finite[:, best]) for index in others])
    alike = {names[best]} | {names[index] for index, q in zip(others, adjusted, strict=True) if q >= ALPHA}
    return Ranking(
        dict(zip(names, map(float, ranks), strict=True)),
        len(values),
        statistic,
        p,
        float("nan") if np.isnan(p) else critical_difference(len(names), len(values)),
        frozenset(alike),
    )
