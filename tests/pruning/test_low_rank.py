"""Subspaces inside heads against the singular value decomposition of numpy, and against real samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans.pruning.low_rank import query_key_bases, value_bases

HEADS, WIDTH, OUTPUTS, ROWS = 3, 5, 7, 40
seeds = st.integers(0, 10**6)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(seed, mean=0.0):
    """Return vectors per head, `(heads, rows, width)`, with correlated entries."""
    left, right = (torch.linalg.qr(draw(seed + k, HEADS, WIDTH, WIDTH)).Q for k in (1, 100))
    return draw(seed, HEADS, ROWS, WIDTH) @ (left * torch.linspace(0.2, 2.0, WIDTH).double() @ right) + mean


def second_moment(rows):
    return rows.mT @ rows / rows.shape[1]


def value_problem(seed):
    rows = samples(seed)
    rows = rows - rows.mean(1, keepdim=True)
    return draw(seed + 2, HEADS, OUTPUTS, WIDTH), rows


def tails(values):
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_value_errors_are_the_squared_singular_values_that_are_cut(seed):
    outgoing, rows = value_problem(seed)
    bases = value_bases(outgoing, second_moment(rows))
    assert bases.errors.shape == (HEADS, WIDTH + 1)
    for head in range(HEADS):
        root = np.linalg.cholesky(second_moment(rows)[head].numpy())  # any root has the same singular values
        singular = np.linalg.svd(outgoing[head].numpy() @ root, compute_uv=False)
        np.testing.assert_allclose(bases.errors[head].numpy(), tails(singular**2), rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, rank=st.integers(0, WIDTH))
def test_value_errors_are_met_on_samples(seed, rank):
    outgoing, rows = value_problem(seed)
    bases = value_bases(outgoing, second_moment(rows))
    back = rows @ bases.reduce[:, :rank].mT @ bases.expand[:, :rank]
    measured = ((rows - back) @ outgoing.mT).square().sum((1, 2)) / ROWS
    torch.testing.assert_close(measured, bases.errors[:, rank], rtol=1e-6, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, rank=st.integers(1, WIDTH - 1))
def test_no_other_map_of_that_rank_is_better(seed, rank):
    outgoing, rows = value_problem(seed)
    errors = value_bases(outgoing, second_moment(rows)).errors
    target = rows @ outgoing.mT
    for trial in range(5):  # least squares on any other subspace of that rank
        narrow = rows @ draw(seed + 10 + trial, HEADS, WIDTH, rank)
        solved = torch.linalg.lstsq(narrow, target).solution
        assert bool(((target - narrow @ solved).square().sum((1, 2)) / ROWS >= errors[:, rank] - 1e-9).all())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_rows_reproduce_the_truncated_map(rank):
    outgoing, rows = value_problem(3)
    inner = second_moment(rows)
    bases = value_bases(outgoing, inner)
    for head in range(HEADS):
        values, vectors = np.linalg.eigh(inner[head].numpy())
        root = vectors * np.sqrt(values) @ vectors.T
        u, s, vt = np.linalg.svd(outgoing[head].numpy() @ root)
        expected = u[:, :rank] * s[:rank] @ vt[:rank]
        found = outgoing[head] @ bases.expand[head, :rank].mT @ bases.reduce[head, :rank]
        np.testing.assert_allclose(found.numpy() @ root, expected, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_full_width_changes_nothing(seed):
    outgoing, rows = value_problem(seed)
    eye = torch.eye(WIDTH, dtype=torch.float64).expand(HEADS, -1, -1)
    values = value_bases(outgoing, second_moment(rows))
    torch.testing.assert_close(values.expand.mT @ values.reduce, eye, rtol=0, atol=1e-7)
    torch.testing.assert_close(values.reduce @ values.expand.mT, eye, rtol=0, atol=1e-7)
    queries, keys = samples(seed + 5, mean=1.0), samples(seed + 7, mean=-2.0)
    bases = query_key_bases(second_moment(keys), second_moment(queries))
    products = (queries @ bases.reduce.mT) @ (keys @ bases.expand.mT).mT
    torch.testing.assert_close(products, queries @ keys.mT, rtol=1e-6, atol=1e-6)
    assert float(bases.errors[:, -1].abs().max()) == 0.0


@settings(max_examples=20, deadline=None)
@given(seed=seeds, rank=st.integers(0, WIDTH))
def test_query_errors_are_met_on_samples(seed, rank):
    queries = samples(seed, mean=0.5)
    factor = draw(seed + 3, HEADS, WIDTH, WIDTH)
    metric = factor @ factor.mT
    bases = query_key_bases(metric, second_moment(queries))
    # q . k on the kept rows is (Pq) . k with P = expand_r^T reduce_r.
    moved = queries @ bases.reduce[:, :rank].mT @ bases.expand[:, :rank] - queries
    measured = torch.einsum("hni,hij,hnj->h", moved, metric, moved) / ROWS
    torch.testing.assert_close(measured, bases.errors[:, rank], rtol=1e-6, atol=1e-8)


def test_products_lose_least_when_the_metric_is_that_of_the_keys():
    queries, keys = samples(0, mean=1.0), samples(1)
    bases = query_key_bases(second_moment(keys), second_moment(queries))
    for head in range(HEADS):
        products = (queries[head] @ keys[head].T).numpy()
        singular = np.linalg.svd(products, compute_uv=False)[:WIDTH]
        np.testing.assert_allclose(bases.errors[head].numpy(), tails(singular**2) / ROWS**2, rtol=1e-6, atol=1e-9)
        for rank in range(1, WIDTH):
            narrow = (queries[head] @ bases.reduce[head, :rank].T) @ (keys[head] @ bases.expand[head, :rank].T).T
            lost = np.square(products - narrow.numpy()).sum() / ROWS**2
            assert lost == pytest.approx(float(bases.errors[head, rank]), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("find", [value_bases, query_key_bases])
def test_singular_moments_give_finite_bases(find):
    narrow = draw(0, HEADS, ROWS, 2) @ draw(1, HEADS, 2, WIDTH)
    first = draw(2, HEADS, WIDTH, WIDTH)
    first = first @ first.mT if find is query_key_bases else first
    for moment in (second_moment(narrow), torch.zeros(HEADS, WIDTH, WIDTH, dtype=torch.float64)):
        bases = find(first, moment)
        for part in (bases.reduce, bases.expand, bases.errors):
            assert bool(torch.isfinite(part).all())
    bases = find(first, second_moment(narrow))
    assert bool((bases.errors[:, 2:] <= 1e-6 * bases.errors[:, :1]).all())
    assert bool((bases.errors[:, 1] > 1e-6 * bases.errors[:, 0]).all())
    kept = narrow @ bases.reduce[:, :2].mT @ bases.expand[:, :2]  # two rows hold all there is
    torch.testing.assert_close(kept, narrow, rtol=1e-3, atol=1e-3)


def test_outputs_that_nobody_reads_cost_nothing():
    _, rows = value_problem(4)
    assert float(value_bases(torch.zeros(HEADS, OUTPUTS, WIDTH).double(), second_moment(rows)).errors.max()) == 0.0
    bases = query_key_bases(torch.zeros(HEADS, WIDTH, WIDTH).double(), second_moment(rows))
    assert float(bases.errors.max()) == 0.0
    assert bool(torch.isfinite(bases.reduce).all())
