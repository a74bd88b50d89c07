"""SPECTRE's filter against closed forms, dense linear algebra and planted clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from bench.engine.data import generator
from defenses.spectre import (
    Spectre,
    candidates,
    class_strengths,
    covariance,
    inverse_root,
    most_variance,
    oversized_class,
    principal,
    quantum_matrix,
    quantum_scores,
    robust_rows,
    scores_of,
    strength,
    strongest_class,
    tail_cut,
    widest_form,
)


def gaussian(rows: int, columns: int, *purpose: int | str) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator(0, "test", *purpose))


def planted(poison: int, *, clean: int = 5000, width: int = 512, at: int = 60, sigma: float = 8.0) -> Tensor:
    """Clean rows of a decaying spectrum and then poisoned ones, tight and far out along one weak axis; rotated."""
    scale = (1 + torch.arange(width, dtype=torch.float64)).rsqrt()
    rows = gaussian(clean + poison, width, "rows") * scale
    rows[clean:, at] = sigma * scale[at] + 0.3 * rows[clean:, at]
    rotation, _ = torch.linalg.qr(gaussian(width, width, "rotation"))
    return rows @ rotation


def found(flagged: Tensor, poison: int) -> float:
    return flagged[-poison:].double().mean().item()


# The quantum entropy matrix and the scores -------------------------------------------------------------------------


def test_with_every_row_kept_all_directions_count_the_same():
    rows = gaussian(200, 7)
    white = (rows - rows.mean(0)) @ inverse_root(covariance(rows, 0))
    moment = covariance(white, 1)
    assert torch.allclose(moment, torch.eye(7, dtype=torch.float64) * 200 / 199, atol=1e-10)
    assert torch.allclose(quantum_matrix(moment, 4.0), torch.eye(7, dtype=torch.float64) / 7, atol=1e-10)


def test_a_huge_alpha_leaves_only_the_widest_axis():
    matrix = quantum_matrix(torch.diag(torch.tensor([3.0, 1.2, 1.0], dtype=torch.float64)), 50.0)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, 0] = 1
    assert torch.allclose(matrix, expected, atol=1e-6)


def test_the_exponential_is_of_the_matrix_and_not_of_its_entries():
    matrix = quantum_matrix(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)), 4.0)
    share = math.exp(4) / (math.exp(4) + 1)  # exponents 4 and 0
    assert torch.allclose(matrix, torch.diag(torch.tensor([share, 1 - share], dtype=torch.float64)), atol=1e-12)
    assert share == pytest.approx(0.9820, abs=1e-4)


def test_the_quantum_matrix_is_scipys_exponential_over_its_trace():
    half = gaussian(6, 6, "moment")
    moment = half @ half.T + torch.eye(6, dtype=torch.float64)
    matrix = quantum_matrix(moment, 2.5)
    plain = moment.numpy()
    exponential = scipy.linalg.expm(2.5 * (plain - np.eye(6)) / (np.linalg.norm(plain, 2) - 1))
    np.testing.assert_allclose(matrix.numpy(), exponential / np.trace(exponential), atol=1e-10)
    assert torch.allclose(matrix, matrix.T, atol=1e-14)
    assert torch.linalg.eigvalsh(matrix).min() > 0
    assert matrix.trace().item() == pytest.approx(1, abs=1e-12)


def test_a_moment_that_nowhere_exceeds_one_weighs_all_directions_alike():
    moment = torch.diag(torch.tensor([1.0, 0.4], dtype=torch.float64))
    assert torch.equal(quantum_matrix(moment, 4.0), torch.eye(2, dtype=torch.float64) / 2)


@pytest.mark.parametrize("center", ["overall", "robust"])
def test_scores_are_those_of_dense_linear_algebra_on_the_surviving_rows(center):
    points = principal(planted(40, clean=400, width=10, at=5, sigma=20), 6)
    mask = robust_rows(points, 40).numpy()
    assert not mask.all()
    plain = points.numpy()
    sigma = np.cov(plain[mask].T, bias=True)
    middle = plain[mask].mean(0) if center == "robust" else 0
    white = (plain - middle) @ np.linalg.inv(scipy.linalg.sqrtm(sigma))
    moment = np.cov(white.T)
    exponential = scipy.linalg.expm(4 * (moment - np.eye(6)) / (np.linalg.norm(moment, 2) - 1))
    matrix = exponential / np.trace(exponential)
    expected = np.einsum("ni,ij,nj->n", white, matrix, white)
    scores = scores_of(points, 40, center=center)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-8)
    if center == "overall":
        assert scores.mean().item() == pytest.approx(np.trace(moment @ matrix) * 439 / 440, rel=1e-10)


def test_with_alpha_zero_the_score_is_the_mahalanobis_distance_by_dimension():
    points = principal(planted(40, clean=400, width=10, at=5, sigma=20), 6)
    kept = points[robust_rows(points, 40)].numpy()
    inverse = np.linalg.inv(np.cov(kept.T, bias=True))
    expected = np.einsum("ni,ij,nj->n", points.numpy(), inverse, points.numpy()) / 6
    np.testing.assert_allclose(scores_of(points, 40, alpha=0.0).numpy(), expected, rtol=1e-9)


def test_scores_ignore_the_order_of_rows_rotation_shift_and_scale():
    rows = planted(60, clean=600, width=24, at=12)
    plain = quantum_scores(rows, 60)
    order = torch.randperm(len(rows), generator=generator(0, "order"))
    rotation, _ = torch.linalg.qr(gaussian(24, 24, "another"))
    for changed, place in ((rows[order], order), (rows @ rotation, slice(None)), (7 * rows + 3, slice(None))):
        other = quantum_scores(changed, 60)
        assert torch.allclose(other.scores, plain.scores[place], rtol=1e-9, atol=1e-10)
        assert torch.equal(other.flagged, plain.flagged[place])
        assert other.components == plain.components
        assert other.strength == pytest.approx(plain.strength, rel=1e-9)


def test_with_all_components_scores_ignore_any_invertible_map():
    rows, map_ = planted(60, clean=600, width=12, at=6), gaussian(12, 12, "map")
    one, two = (scores_of(principal(given, 12), 60) for given in (rows, rows @ map_))
    assert torch.allclose(one, two, rtol=1e-8, atol=1e-10)


def test_the_strength_is_worked_out_with_unbiased_covariances():
    # As the released code does, in numpy: few rows, so that 1/n and 1/(n - 1) lie apart.
    points = principal(planted(4, clean=16, width=8, at=4), 3)
    flagged = torch.arange(20) >= 14
    plain = points.numpy()
    white = plain @ np.linalg.inv(scipy.linalg.sqrtm(np.cov(plain[~flagged.numpy()].T)))
    moment = np.cov(white.T)
    exponential = scipy.linalg.expm(4 * (moment - np.eye(3)) / (np.linalg.norm(moment, 2) - 1))
    expected = np.trace(moment @ exponential) / np.trace(exponential)
    assert strength(points, flagged, 4.0) == pytest.approx(expected, rel=1e-9)


# The robust covariance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 5, 8])
def test_the_widest_form_is_the_top_eigenpair_of_the_dense_fourth_moment(k):
    rows = gaussian(300, k, "heavy") ** 3  # heavy tails: eigenvalues lie apart
    white = rows @ inverse_root(rows.T @ rows / len(rows))
    squares = np.einsum("ni,nj->nij", white.numpy(), white.numpy()).reshape(300, k * k)
    unit = np.eye(k).reshape(-1)
    values, vectors = np.linalg.eigh(squares.T @ squares / 300 - np.outer(unit, unit))
    value, form = widest_form(white)
    assert value == pytest.approx(np.abs(values).max(), rel=1e-6)
    assert abs(form.flatten().numpy() @ vectors[:, -1]) == pytest.approx(1, abs=1e-6)
    assert torch.equal(form, form.T)


def dense(white: np.ndarray) -> tuple[float, np.ndarray]:
    """The top eigenpair of the fourth moment over symmetric forms, by LAPACK."""
    count, k = white.shape
    rows, columns = np.triu_indices(k)
    scale = np.where(rows == columns, 1.0, np.sqrt(2))  # so that a form's length is its Frobenius norm
    products, mean = white[:, rows] * white[:, columns] * scale, np.eye(k)[rows, columns] * scale
    values, vectors = np.linalg.eigh(products.T @ products / count - np.outer(mean, mean))
    form = np.zeros((k, k))
    form[rows, columns] = form[columns, rows] = vectors[:, -1] / scale
    return values[-1], form


@pytest.mark.parametrize("kind", ["clean", "heavy", "planted"])
@pytest.mark.parametrize("k", [6, 16, 30])
def test_the_rows_are_ranked_as_by_the_dense_eigenpair(kind, k):
    # On clean rows the largest eigenvalues lie close together, where a short iteration mixes their forms.
    rows = {
        "clean": lambda: gaussian(600, k),
        "heavy": lambda: gaussian(600, k) ** 3,
        "planted": lambda: principal(planted(60, clean=540, width=64, at=30), k),
    }[kind]()
    white = rows @ inverse_root(rows.T @ rows / len(rows))
    (value, form), (true_value, true_form) = widest_form(white), dense(white.numpy())
    assert value == pytest.approx(true_value, rel=1e-12)
    sign = np.sign((form.numpy() * true_form).sum())
    np.testing.assert_allclose(sign * form.numpy(), true_form, atol=1e-8)

    def order(form: np.ndarray) -> list[int]:
        reach = np.einsum("ni,ij,nj->n", white.numpy(), form, white.numpy())
        return np.argsort(-np.abs(reach - np.median(reach)), kind="stable")[:540].tolist()

    assert order(form.numpy()) == order(true_form)  # but for those at the median, which are alike


def test_an_operator_of_zero_ends_at_once():
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    value, form = widest_form(signs[:, :1])  # y^2 = 1: no form has any variance
    assert value == pytest.approx(0, abs=1e-12)
    assert form.abs().item() == 1


def test_the_widest_form_breaks_an_exact_symmetry_of_the_data():
    # Both axes alike and no correlation: by symmetry the identity never leads to diag(1, -1) / sqrt(2).
    a = math.sqrt(2)
    rows = torch.tensor([[a, 0], [-a, 0], [0, a], [0, -a]], dtype=torch.float64)
    value, form = widest_form(rows)
    # y^T V y is a^2 / sqrt(2) = sqrt(2) on one axis and -sqrt(2) on the other: variance 2.
    assert value == pytest.approx(2)
    assert torch.allclose(form.abs(), torch.eye(2, dtype=torch.float64) / a, atol=1e-6)
    assert form.trace().abs() < 1e-6


@pytest.mark.parametrize(("share", "bound"), [(0.01, 3.12), (250 / 5250, 5.41), (500 / 5500, 6.23), (0.1, 6.30)])
def test_the_variance_that_passes_as_gaussian(share, bound):
    assert most_variance(share) == pytest.approx(bound, abs=0.006)


@pytest.mark.parametrize(
    ("spread", "cut"),
    [
        ([0.1, 1.0, 2.0, 3.0], None),  # nobody beyond 3
        ([0.1, 1.0, 4.0, 7.0], 4.0),  # below 10 ln 10 = 23.03 only the last row passes: 7 - 3
        ([0.1, 25.0, 26.0, 26.02], pytest.approx(23.02)),
        ([0.1, 1.0, 30.0, 40.0], 27.0),  # the first beyond it: both are dropped, since 30 > 27
    ],
)
def test_the_cut_follows_the_released_code(spread, cut):
    assert tail_cut(torch.tensor(spread, dtype=torch.float64), 0.1) == cut


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("budget", [3, 40])
def test_trimming_keeps_all_but_twice_the_budget_and_drops_the_cluster_first(fast, budget):
    points = principal(planted(40, clean=400, width=10, at=5, sigma=20), 9)
    kept = robust_rows(points, budget, fast=fast)
    assert kept.sum() >= 440 - 2 * budget
    assert (~kept[-40:]).sum() == min(40, 2 * budget)


def test_gaussian_rows_pass_whole():
    assert robust_rows(principal(gaussian(3000, 6), 6), 300).all()


# The whole filter --------------------------------------------------------------------------------------------------


def test_ten_candidates_with_evenly_spaced_roots():
    assert candidates(100, skip_k1=False) == [1, 4, 9, 16, 25, 36, 49, 64, 81, 100]
    assert candidates(100) == [4, 9, 16, 25, 36, 49, 64, 81, 100]
    assert candidates(1) == [1]


@pytest.mark.parametrize(("budget", "flags"), [(1, 2), (5, 8), (40, 60), (1000, 218)])
def test_one_and_a_half_times_the_budget_is_flagged(budget, flags):
    # 1000 is lowered to 145 = 0.33 * 440, which makes 217.5 flags: ties go to the even number.
    result = quantum_scores(planted(40, clean=400, width=10, at=5), budget)
    assert result.flagged.sum() == flags
    assert result.scores[result.flagged].min() >= result.scores[~result.flagged].max()


def test_a_planted_cluster_that_plain_whitening_misses_is_found():
    rows = planted(500)
    points = principal(rows, 64)
    plain = (points @ inverse_root(covariance(points, 0))).square().sum(1)
    assert plain.argsort(descending=True)[:750].ge(5000).sum() / 500 < 0.5
    result = quantum_scores(rows, 500, components=64)
    assert found(result.flagged, 500) >= 0.98
    assert roc_auc_score(np.arange(5500) >= 5000, result.scores.numpy()) >= 0.99
    assert result.components > 25


@pytest.mark.slow
@pytest.mark.parametrize(("poison", "budget", "strength"), [(500, 500, 3.40), (250, 250, 2.24), (250, 500, 2.74)])
def test_planted_clusters_are_found_whatever_the_assumed_number(poison, budget, strength):
    result = quantum_scores(planted(poison), budget)
    truth = np.arange(5000 + poison) >= 5000
    assert found(result.flagged, poison) >= 0.98
    assert roc_auc_score(truth, result.scores.numpy()) >= 0.99
    assert result.strength == pytest.approx(strength, abs=0.2)
    if budget == 2 * poison:
        assert result.flagged.numpy()[~truth].mean() == pytest.approx(0.10, abs=0.005)


@pytest.mark.slow
def test_clean_rows_are_not_strong():
    assert quantum_scores(planted(0), 500).strength < 1.4


def test_features_without_any_spread_still_give_finite_scores():
    for rows in (torch.ones(12, 5), torch.eye(5)[torch.arange(12) % 2], gaussian(4, 3), gaussian(9, 400)):
        result = quantum_scores(rows, 3)
        assert torch.isfinite(result.scores).all()
        assert math.isfinite(result.strength)


def test_wide_features_give_the_same_scores_as_their_principal_axes():
    rows = torch.cat([planted(20, clean=200, width=8, at=4), torch.zeros(220, 300, dtype=torch.float64)], dim=1)
    narrow, wide = quantum_scores(rows[:, :8], 20), quantum_scores(rows, 20)
    assert torch.allclose(narrow.scores, wide.scores, rtol=1e-8)


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (torch.ones(3, 2), {"budget": 1}, "n of 4 or more"),
        (torch.ones(9), {"budget": 1}, "n of 4 or more"),
        (torch.ones(9, 2), {"budget": 0}, "budget is 0"),
        (torch.ones(9, 2), {"budget": 1, "center": "mean"}, "write overall or robust"),
        (torch.full((9, 2), math.nan), {"budget": 1}, "not finite"),
    ],
)
def test_what_the_filter_refuses(rows, settings, words):
    with pytest.raises(ValueError, match=words):
        quantum_scores(rows, **settings)


# The target label --------------------------------------------------------------------------------------------------


def test_the_strongest_class_is_named_only_if_it_stands_out():
    assert strongest_class({0: 1.2, 1: 1.1, 2: 3.4, 3: 1.3}) == 2  # median 1.25
    assert strongest_class({0: 1.2, 1: 1.1, 2: 1.5, 3: 1.2}) is None  # 1.5 < 1.3 * 1.2
    assert strongest_class({0: 5.0}) is None
    assert strongest_class({}) is None


def test_an_oversized_class_is_named_by_its_count():
    assert oversized_class(torch.tensor([0] * 10 + [1] * 16 + [2] * 10 + [3] * 9), 4) == 1
    assert oversized_class(torch.tensor([0] * 10 + [1] * 15 + [2] * 10 + [3] * 9), 4) is None  # 15 = 1.5 * 10


def test_large_classes_of_a_set_that_was_never_balanced_are_not_named():
    svhn = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]  # its training digits
    gtsrb = [210, 2220, 2250, 1410, 1980, 1860, 420, 1440, 1410, 1470, 2010, 1320, 2100, 2160, 780, 630, 420, 1110]
    for counts in (svhn, gtsrb):
        labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        assert oversized_class(labels, len(counts)) is None


def test_the_rarest_class_is_not_named_for_being_rare_but_a_poisoned_one_is():
    sizes = [80, 300, 500, 1200]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    scale = (1 + torch.arange(32, dtype=torch.float64)).rsqrt()
    rows = gaussian(len(labels), 32, "classes") * scale
    assert strongest_class(class_strengths(rows, labels, seed=0)) is None
    poisoned = (labels == 2).nonzero().flatten()[:60]
    rows[poisoned, 6] = 8 * scale[6]
    assert strongest_class(class_strengths(rows, labels, seed=0)) == 2


def test_classes_of_few_rows_are_left_out_of_the_search():
    labels = torch.tensor([0] * 60 + [1] * 49 + [2] * 50)
    assert sorted(class_strengths(gaussian(159, 6), labels, seed=0)) == [0, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"poison_rate": 10},
        {"search_share": 0.5},
        {"search_ratio": 0.5},
        {"components": 0},
        {"alpha": -1},
        {"center": "mean"},
    ],
)
def test_wrong_settings_are_refused_before_any_compute(settings):
    with pytest.raises(ValueError, match=r"defense\.spectre\."):
        Spectre(**settings)


def test_a_class_at_the_very_ratio_is_named():
    assert strongest_class({0: 1.3, 1: 1.0, 2: 1.0}, ratio=1.3) == 0
    assert strongest_class({0: 1.29, 1: 1.0, 2: 1.0}, ratio=1.3) is None


def trimmed(points: np.ndarray, budget: int, fast: bool) -> np.ndarray:
    """(n,) bool: the rows that survive, step by step with the dense fourth moment."""
    count, k = points.shape
    kept, left = np.arange(count), 2 * budget
    least = math.ceil(left / 12) if fast else 0
    while left:
        rows = points[kept]
        white = rows @ np.linalg.inv(scipy.linalg.sqrtm(rows.T @ rows / len(rows)))
        far = np.square(white).sum(1)
        beyond = int((far >= 10 * k * math.log(len(rows) / 0.1)).sum())
        if beyond:
            drop = np.argsort(-far, kind="stable")[: min(beyond, left)]
        else:
            squares = np.einsum("ni,nj->nij", white, white).reshape(len(rows), k * k)
            unit = np.eye(k).reshape(-1)
            values, vectors = np.linalg.eigh(squares.T @ squares / len(rows) - np.outer(unit, unit))
            if values[-1] <= most_variance(budget / count):
                break
            projected = (squares - unit) @ vectors[:, -1] / math.sqrt(2)
            spread = np.abs(projected - np.median(projected))
            cut = tail_cut(torch.from_numpy(np.sort(spread)), budget / count)
            if cut is None:
                break
            drop = np.argsort(-spread, kind="stable")[: min(max(int((spread > cut).sum()), least), left)]
        kept = np.delete(kept, drop)
        left -= len(drop)
    return np.isin(np.arange(count), kept)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["heavy", "skewed", "far"])
def test_trimming_is_that_of_the_dense_fourth_moment_row_by_row(kind, fast):
    rows = gaussian(400, 3, kind)
    far = torch.cat([rows, 60 * gaussian(3, 3, "outliers")])
    rows = {"heavy": rows**3, "skewed": (1.5 * rows).exp(), "far": far}[kind]
    points = principal(rows, 3)
    expected = trimmed(points.numpy(), 40, fast)
    assert expected.sum() < len(rows) - 2
    np.testing.assert_array_equal(robust_rows(points, 40, fast=fast).numpy(), expected)


def test_the_score_on_one_component_is_its_square_over_the_mean_square():
    points = principal(gaussian(30, 4), 1)
    squares = points[:, 0] ** 2
    assert torch.equal(scores_of(points, 3), squares / squares.mean())
    assert not scores_of(torch.zeros(30, 1, dtype=torch.float64), 3).any()


def test_the_scores_of_a_class_with_one_component_ignore_a_scale_too():
    rows = gaussian(12, 6)
    for scale in (1.0, 100.0):
        assert quantum_scores(scale * rows, 2).scores.mean() == pytest.approx(1.0)
