"""Streamed mean and covariance against numpy in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans.pruning import statistics as statistics_module
from hf_opentrans.pruning.statistics import CovarianceStatistics

DIM = 3


def draw(seed, count, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=generator)
    rows = torch.randn(count, DIM, generator=generator) @ mixing + mean
    return rows, torch.rand(count, generator=generator) + 0.1


def reference(rows, weights):
    values, weights = rows.double().numpy(), weights.double().numpy()
    mean = np.average(values, axis=0, weights=weights)
    centred = values - mean
    return mean, (centred * weights[:, None]).T @ centred / weights.sum()


def streamed(rows, weights, sizes):
    statistics = CovarianceStatistics(DIM)
    for part, share in zip(rows.split(sizes), weights.split(sizes), strict=True):
        statistics.update(part, share)
    return statistics


def assert_equals(statistics, rows, weights):
    mean, covariance = reference(rows, weights)
    np.testing.assert_allclose(statistics.mean.numpy(), mean, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(statistics.covariance.numpy(), covariance, atol=1e-4 * max(1.0, covariance.max()))
    assert statistics.rows == len(rows)
    assert statistics.weight == pytest.approx(float(weights.double().sum()))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    mean=st.sampled_from([0.0, -3.0, 1e3, 1e5]),
    seed=st.integers(0, 10**6),
)
def test_streamed_statistics_equal_numpy(sizes, mean, seed):
    rows, weights = draw(seed, sum(sizes), mean)
    assert_equals(streamed(rows, weights, sizes), rows, weights)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    mean=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 10**6),
    order=st.randoms(use_true_random=False),
)
def test_merging_in_any_order_equals_one_pass(sizes, mean, seed, order):
    rows, weights = draw(seed, sum(sizes), mean)
    parts = [streamed(r, w, [len(r)]) for r, w in zip(rows.split(sizes), weights.split(sizes), strict=True)]
    while len(parts) > 1:
        left = parts.pop(order.randrange(len(parts)))
        right = parts.pop(order.randrange(len(parts)))
        parts.append(left.merge(right))
    assert_equals(parts[0], rows, weights)


@pytest.mark.parametrize("dim", [1, 511, 512, 1100])
def test_wide_rows_form_half_of_the_products_and_all_of_the_matrix(dim):
    generator = torch.Generator().manual_seed(dim)
    rows, weights = torch.randn(40, dim, generator=generator) + 2, torch.rand(40, generator=generator) + 0.1
    statistics = CovarianceStatistics(dim)
    statistics.update(rows[:7], weights[:7])
    statistics.update(rows[7:], weights[7:])
    assert_equals(statistics, rows, weights)
    torch.testing.assert_close(statistics.covariance, statistics.covariance.T, rtol=0, atol=0)
    torch.testing.assert_close(statistics.moment, statistics.moment.T, rtol=0, atol=0)


@pytest.mark.parametrize(("start", "middle", "tail"), [(2, 1, 3), (600, 40, 40), (0, 2, 2)])
def test_tail_columns_meet_the_first_columns_alone(start, middle, tail):
    dim = start + middle + tail
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(30, dim, generator=generator) + 1
    whole, parts = CovarianceStatistics(dim), [CovarianceStatistics(dim, tail=tail, tail_with=start) for _ in range(2)]
    for batch in rows.split(10):
        whole.update(batch)
    parts[0].update(rows[:10])
    parts[1].update(rows[10:])
    found = parts[0].merge(parts[1])
    for name in ("covariance", "moment"):
        expected = getattr(whole, name).clone()
        expected[start:, start + middle :] = 0
        expected[start + middle :, start:] = 0
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean, whole.mean)


def test_merging_changes_neither_part_and_accepts_empty_ones():
    rows, weights = draw(0, 12)
    left, right = streamed(rows[:5], weights[:5], [5]), streamed(rows[5:], weights[5:], [7])
    left.merge(right)
    assert_equals(left, rows[:5], weights[:5])
    assert_equals(right, rows[5:], weights[5:])
    empty = CovarianceStatistics(DIM)
    assert_equals(left.merge(empty), rows[:5], weights[:5])
    assert_equals(empty.merge(left), rows[:5], weights[:5])


def test_rows_without_weights_count_once():
    rows, _ = draw(1, 20)
    statistics = CovarianceStatistics(DIM)
    statistics.update(rows)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(rows.double().T, bias=True), atol=1e-5)


def test_half_precision_rows_are_summed_in_double_precision():
    rows, weights = draw(2, 30, mean=8.0)
    assert_equals(streamed(rows.half(), weights, [10] * 3), rows.half(), weights)


@pytest.mark.parametrize("mean", [0.0, 2.0, 100.0])
def test_moment_is_the_mean_square_of_the_rows(mean):
    rows, weights = draw(3, 15, mean=mean)
    statistics = streamed(rows, weights, [4, 11])
    values, shares = rows.double().numpy(), (weights.double() / weights.double().sum()).numpy()
    np.testing.assert_allclose(statistics.moment.numpy(), (values * shares[:, None]).T @ values, rtol=1e-5, atol=1e-5)


def test_positive_rate_is_the_weighted_share_of_positive_rows():
    rows, weights = draw(5, 40)
    rows[::4] = 0.0  # zero is not positive
    expected = np.average(rows.numpy() > 0, axis=0, weights=weights.double().numpy())
    statistics = streamed(rows, weights, [7, 13, 20])
    np.testing.assert_allclose(statistics.positive_rate.numpy(), expected, rtol=1e-5)
    merged = streamed(rows[:7], weights[:7], [7]).merge(streamed(rows[7:], weights[7:], [13, 20]))
    np.testing.assert_allclose(merged.positive_rate.numpy(), expected, rtol=1e-5)
    assert 0.05 < expected.min() < expected.max() < 0.95


def test_reduce_changes_nothing_in_one_process():
    rows, weights = draw(6, 12)
    statistics = streamed(rows, weights, [5, 7])
    statistics.reduce()
    assert_equals(statistics, rows, weights)


def test_reduce_adds_up_what_two_processes_gathered(monkeypatch):
    rows, weights = draw(7, 20, mean=50.0)
    shift = (weights[:9] @ rows[:9]) / weights[:9].sum()
    monkeypatch.setattr(statistics_module, "from_first", lambda _: shift)  # both use the first process's shift
    first, second = streamed(rows[:9], weights[:9], [9]), streamed(rows[9:], weights[9:], [4, 7])

    def add_up(counts, *sums):
        counts += torch.tensor([second.weight, float(second.rows)], dtype=torch.float64)
        for own, other in zip(sums, (second._first, second._second, second._positive), strict=True):
            own += other

    monkeypatch.setattr(statistics_module, "add_up", add_up)
    first.reduce()
    assert_equals(first, rows, weights)
    expected = np.average(rows.numpy() > 0, axis=0, weights=weights.double().numpy())
    np.testing.assert_allclose(first.positive_rate.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("read", [lambda s: s.mean, lambda s: s.covariance, lambda s: s.moment])
def test_statistics_without_rows_raise(read):
    with pytest.raises(ValueError, match="hold no rows"):
        read(CovarianceStatistics(DIM))


def test_an_empty_batch_changes_nothing():
    rows, weights = draw(4, 6)
    assert_equals(streamed(rows, weights, [0, 6, 0]), rows, weights)
