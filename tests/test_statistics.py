"""Statistics against published tables, scipy, and figures worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bench.reporting import statistics

# Demsar, JMLR 7 (2006), table 6: AUC of four variants of C4.5 on 14 data sets (higher is better).
DEMSAR = np.array(
    [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975],
        [0.957, 0.978, 0.946, 0.970],
    ]
)


def test_ranks_and_the_friedman_test_of_demsar_come_out_as_he_printed_them():
    # 3.143, 2.000, 2.893, 1.964 and chi-square 9.28, which has no correction for the two ties.
    ranks = statistics.average_ranks(-DEMSAR)
    assert ranks == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    assert 12 * 14 / (4 * 5) * (sum(ranks**2) - 4 * 25 / 4) == pytest.approx(9.28, abs=0.005)
    statistic, p = statistics.friedman(-DEMSAR)
    assert (statistic, p) == pytest.approx(tuple(stats.friedmanchisquare(*DEMSAR.T)))


def test_the_critical_values_are_those_of_demsars_table_5():
    # q_0.05 for 2 to 10 classifiers; the difference of his example is 1.25.
    table = {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}
    for methods, q in table.items():
        expected = q * math.sqrt(methods * (methods + 1) / (6 * 30))
        assert statistics.critical_difference(methods, 30) == pytest.approx(expected, abs=6e-4)
    assert statistics.critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


def test_holm_is_worked_out_by_hand():
    # sorted .01 x4, .02 x3, .03 x2, .04 x1 -> .04, .06, .06, .06
    assert statistics.holm([0.04, 0.01, math.nan, 0.03, 0.02]) == pytest.approx(
        [0.06, 0.04, math.nan, 0.06, 0.06], nan_ok=True
    )
    assert statistics.holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_the_tests_of_pairs_agree_with_scipy():
    one, other = DEMSAR[:10, 0], DEMSAR[:10, 3] + 0.001 * np.arange(10)
    assert statistics.paired_t(one, other) == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert statistics.signed_ranks(one, other) == pytest.approx(stats.wilcoxon(one, other, method="exact").pvalue)
    long = np.random.default_rng(1).normal(size=(2, 40))
    assert statistics.signed_ranks(*long) == pytest.approx(stats.wilcoxon(*long).pvalue)


def test_wilcoxon_on_pairs_is_exact_also_with_ties():
    # Differences 1, 1, 2 all positive: only one of eight sign patterns is as extreme on each side.
    assert statistics.signed_ranks([1, 1, 2], [0, 0, 0]) == 0.25
    assert statistics.signed_ranks([1, 1], [1, 1]) == 1.0


@pytest.mark.parametrize(("blocks", "least"), [(3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_the_least_p_is_reached_when_one_side_always_wins(blocks, least):
    assert statistics.least_p(blocks) == least
    assert statistics.signed_ranks(np.arange(1, blocks + 1), np.zeros(blocks)) == least


def test_equal_seeds_are_no_difference_and_a_constant_gap_is_tested_by_its_signs():
    assert statistics.paired_t([0.5, 0.75], [0.5, 0.75]) == 1.0
    # All 2**n patterns of signs, by enumeration: a sum as large as that of n equal differences has two of them.
    for n in (2, 3, 6):
        sums = [abs(sum(signs)) for signs in itertools.product((-1, 1), repeat=n)]
        expected = sum(value >= n for value in sums) / len(sums)
        assert statistics.paired_t(np.full(n, 0.5), np.full(n, 0.25)) == expected
    assert statistics.paired_t([0.35, 0.75], [0.3, 0.7]) == 0.5  # equal but for their last bit
    assert math.isnan(statistics.paired_t([0.5], [0.4]))


def test_the_t_interval_is_the_one_of_the_textbook():
    # n = 3, t(0.975, 2) = 4.303: half-width 4.303 * s / sqrt(3)
    assert statistics.t_halfwidth(0.02, 3) == pytest.approx(4.303 * 0.02 / math.sqrt(3), rel=1e-4)
    assert math.isnan(statistics.t_halfwidth(math.nan, 1))


@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_the_bootstrap_is_the_percentiles_of_its_resamples_one_by_one(n):
    values = np.random.default_rng(n).uniform(size=(3, n))
    every = n**n <= 2000
    drawn = itertools.product(range(n), repeat=n) if every else np.random.default_rng(0).integers(0, n, (2000, n))
    means = np.array([[row[list(chosen)].mean() for row in values] for chosen in drawn])
    low, high = statistics.bootstrap_interval(values)
    np.testing.assert_allclose(low, np.quantile(means, 0.025, axis=0), rtol=1e-12)
    np.testing.assert_allclose(high, np.quantile(means, 0.975, axis=0), rtol=1e-12)


def test_the_bootstrap_of_two_seeds_lies_in_their_span_and_of_many_agrees_with_scipy():
    # Resampled means .25, .5, .5, .75; their 2.5 % quantile lies 0.075 of the way from the first to the second.
    low, high = statistics.bootstrap_interval([[0.25, 0.75]])
    assert (low[0], high[0]) == pytest.approx((0.26875, 0.73125))
    values = np.random.default_rng(0).normal(size=20)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    low, high = statistics.bootstrap_interval(values, draws=20000)
    assert (low[0], high[0]) == pytest.approx(tuple(theirs), abs=0.02)
    assert np.isnan(statistics.bootstrap_interval([[1.0]])).all()


def test_a_failed_cell_has_the_worst_rank_and_two_share_it():
    assert statistics.average_ranks([[0.0, 1.0, math.inf], [0.5, math.inf, math.inf]]).tolist() == [1.0, 2.25, 2.75]


def test_bars_of_the_diagram_are_the_longest_and_hold_two_or_more():
    assert statistics.cliques([1.0, 1.5, 2.0, 2.9, 6.0], 1.2) == [(1.0, 2.0), (2.0, 2.9)]
    assert statistics.cliques([1.0, 3.0], 1.2) == []


def test_a_ranking_marks_who_is_not_worse_and_says_when_nobody_can_be():
    wins = np.column_stack([np.zeros(9), np.linspace(0.1, 0.9, 9), np.linspace(0.3, 1, 9)])
    found = statistics.rank(wins, ["a", "b", "c"], 1.0)
    assert found.ranks == {"a": 1.0, "b": pytest.approx(2.0), "c": pytest.approx(3.0)}
    assert found.alike == {"a"}  # p = 2/512, times 2
    assert "cannot" not in found.sentence()
    few = statistics.rank(wins[:3], ["a", "b", "c"], 1.0)
    assert few.alike == {"a", "b", "c"}
    assert "no difference of two can be significant" in few.sentence()
    assert "at least 3 defenses and 2 blocks" in statistics.rank(wins[:1], ["a", "b", "c"], 1.0).sentence()
    assert "all of them tie" in statistics.rank(np.ones((3, 3)), ["a", "b", "c"], 1.0).sentence()


def test_nemenyi_agrees_with_scikit_posthocs_on_demsars_data():
    posthocs = pytest.importorskip("scikit_posthocs")
    p = posthocs.posthoc_nemenyi_friedman(-DEMSAR).to_numpy()
    ranks = statistics.average_ranks(-DEMSAR)
    apart = np.abs(ranks[:, None] - ranks[None]) >= statistics.critical_difference(4, 14)
    assert (apart == (p < 0.05)).all()
    # And where the p-value is 5 %, the critical difference is what it says.
    q = abs(ranks[0] - ranks[3]) * math.sqrt(2) / math.sqrt(4 * 5 / (6 * 14))
    assert p[0, 3] == pytest.approx(stats.studentized_range.sf(q, 4, np.inf), abs=1e-3)


def test_ranks_that_differ_by_the_critical_difference_itself_can_be_told_apart():
    assert statistics.cliques([1.0, 2.0], 1.0) == []
    assert statistics.cliques([1.0, 2.0], 1.01) == [(1.0, 2.0)]


def test_a_method_that_is_lost_everywhere_is_significantly_worse_than_the_best():
    lost = np.column_stack([np.zeros(9), np.full(9, math.inf), np.full(9, 0.5)])
    found = statistics.rank(lost, ["a", "lost", "c"], 1.0)
    assert found.ranks == {"a": 1.0, "lost": 3.0, "c": 2.0}
    assert found.alike == {"a"}


def test_holm_over_the_rivals_of_the_best_decides_whether_any_difference_can_be_significant():
    values = np.column_stack([np.zeros(7), np.linspace(0.1, 0.7, 7), np.linspace(0.3, 1, 7)])
    six, seven = (statistics.rank(values[:blocks], ["a", "b", "c"], 1.0) for blocks in (6, 7))
    # The least p is 2 / 64, times two comparisons: 0.0625. With seven blocks it is 0.03.
    assert "6 blocks and 2 comparisons with the best, Wilcoxon's p with Holm cannot fall below 0.062" in six.sentence()
    assert six.alike == {"a", "b", "c"}
    assert "cannot" not in seven.sentence()
    assert seven.alike == {"a"}


def test_two_methods_are_ranked_without_friedmans_test():
    found = statistics.rank([[0.0, 1.0]] * 3, ["a", "b"], 1.0)
    assert found.ranks == {"a": 1.0, "b": 2.0}
    assert math.isnan(found.p)
    assert math.isnan(found.difference)
    assert "at least 3 defenses and 2 blocks, so nothing is claimed" in found.sentence()


def test_the_intervals_of_many_rows_are_those_of_each_alone():
    values = np.random.default_rng(0).normal(size=(1100, 3))
    low, high = statistics.bootstrap_interval(values)
    for index in (0, 511, 512, 1023, 1024, 1099):
        alone = statistics.bootstrap_interval(values[index])
        assert (low[index], high[index]) == (alone[0][0], alone[1][0])
