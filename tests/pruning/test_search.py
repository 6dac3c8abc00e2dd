"""The evolution: never worse, never over the budget, and better where errors do not add up."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans.pruning.allocation import Budget, allocate
from hf_opentrans.pruning.search import evolve
from hf_opentrans.pruning.sizes import Menu, Size


class Units:
    def fixed(self):
        return 4000.0

    def attention(self, heads, qk_head_dim, v_head_dim):
        return heads * (qk_head_dim + v_head_dim)

    def mlp(self, neurons):
        return neurons


def make_menu(layer, errors):
    dense = len(errors)
    sizes = tuple(Size(float(error), dense - i) for i, error in enumerate(errors))
    return Menu(layer, "neurons", tuple(range(dense)), sizes)


def make_budget(menus, units):
    """Return a budget of `units` for all sublayers together."""
    cost = Units()
    dense = cost.fixed() + sum(menu.cost(menu.sizes[0], cost) for menu in menus)
    return Budget("macs", cost, dense, (cost.fixed() + units) / dense, 0.0, "no floor")


def additive(sizes):
    return -sum(size.error for size in sizes)


def units_of(sizes):
    return [size.units for size in sizes]


@st.composite
def problems(draw):
    """Two to four sublayers with growing errors, and what the score adds to every choice of sizes."""
    counts = draw(st.lists(st.integers(2, 8), min_size=2, max_size=4))
    menus = []
    for layer, count in enumerate(counts):
        steps = draw(st.lists(st.integers(1, 20), min_size=count - 1, max_size=count - 1))
        menus.append(make_menu(layer, [0, *itertools.accumulate(steps)]))
    return menus, draw(st.integers(len(menus), sum(counts) - 1)), draw(st.integers(0, 99))


@settings(max_examples=20, deadline=None)
@given(problem=problems(), seed=st.integers(0, 5))
def test_never_worse_never_over_the_budget_and_reproducible(problem, seed):
    menus, units, salt = problem
    budget = make_budget(menus, units)
    start = allocate(menus, budget)
    scored, ticks = [], []

    def score(sizes):
        scored.append(tuple(sizes))
        return hash((salt, *units_of(sizes))) % 1000 / 10  # ints hash to themselves: the same in every process

    best, scores = evolve(menus, start, budget, score, steps=25, seed=seed, on_step=lambda: ticks.append(1))
    assert len(scores) == 26
    assert len(ticks) == 25
    assert scores == sorted(scores)
    assert scored[0] == tuple(start)
    assert len(scored) == len(set(scored))  # nothing is scored twice
    assert all(budget.share(menus, sizes) <= budget.keep + 1e-8 for sizes in scored)
    assert all(size in menu.sizes for sizes in scored for menu, size in zip(menus, sizes, strict=True))
    again, scores_again = evolve(menus, start, budget, score, steps=25, seed=seed)
    assert (again, scores_again) == (best, scores)
    values = [hash((salt, *units_of(sizes))) % 1000 / 10 for sizes in set(scored)]
    assert scores[-1] == max(values)
    assert tuple(best) in scored
    assert hash((salt, *units_of(best))) % 1000 / 10 == scores[-1]


def test_the_start_is_not_changed_and_stays_where_it_is_best():
    menus = [make_menu(0, [0, 1, 3, 6, 10]), make_menu(1, [0, 2, 5, 9, 14]), make_menu(2, [0, 1, 2, 8, 15])]
    budget = make_budget(menus, 10)
    start = allocate(menus, budget)
    before = list(start)
    best, scores = evolve(menus, start, budget, additive, steps=60, seed=0)
    assert start == before
    assert best == start  # the knapsack is optimal for additive errors
    assert set(scores) == {additive(start)}


@pytest.mark.parametrize("seed", range(4))
def test_finds_what_additive_errors_hide(seed):
    """The errors call the first sublayer cheap to prune; the score says it is the one that matters."""
    menus = [make_menu(0, range(8)), *(make_menu(layer, range(0, 16, 2)) for layer in (1, 2))]
    budget = make_budget(menus, 17)  # seven of 24 units have to go
    start = allocate(menus, budget)
    assert units_of(start) == [1, 8, 8]

    def score(sizes):
        first, *others = units_of(sizes)
        return 10 * first - sum((8 - units) ** 2 for units in others)

    found, scores = evolve(menus, start, budget, score, steps=150, seed=seed)
    options = itertools.product(*(menu.sizes for menu in menus))
    best = max(score(sizes) for sizes in options if sum(units_of(sizes)) <= 17)
    assert scores[0] == score(start) == 10
    assert scores[-1] == score(found) == best == 80 - 9 - 16


def test_seeds_differ():
    menus = [make_menu(layer, range(0, 3 * (layer + 1) * 10, 3 * (layer + 1))) for layer in range(4)]
    budget = make_budget(menus, 24)
    start = allocate(menus, budget)
    trails = []
    for seed in (0, 1):
        trail = []
        evolve(menus, start, budget, lambda sizes, t=trail: t.append(units_of(sizes)) or 0.0, steps=20, seed=seed)
        trails.append(trail)
    assert trails[0] != trails[1]
    assert len(trails[0]) > 5


def test_heads_and_their_widths_move_too():
    shapes = [(heads, qk, v) for heads in (4, 3, 2) for qk in (4, 2) for v in (4, 2)]
    heads = tuple(Size(float(32 - h * (qk + v)), h, qk, v) for h, qk, v in shapes)
    menus = [Menu(0, "heads", (3, 2, 1, 0), heads), make_menu(0, range(20))]
    budget = make_budget(menus, 36)
    start = allocate(menus, budget)
    _, scores = evolve(menus, start, budget, lambda s: -s[1].units, steps=100, seed=0)
    assert scores[-1] == -4  # the neurons that stay beside all four full heads


@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize("units", [2, 3])
def test_one_movable_sublayer_has_nothing_to_trade(others, units):
    fixed = [Menu(1 + i, "heads", (0,), (Size(0.0, 1, 1, 1),)) for i in range(others)]
    menus = [make_menu(0, [0, 1, 2]), *fixed]
    budget = make_budget(menus, units + 2 * others)
    start = allocate(menus, budget)
    calls = []
    best, scores = evolve(menus, start, budget, lambda s: calls.append(s) or 1.5, steps=10, seed=0)
    assert (best, set(scores), len(calls)) == (start, {1.5}, 1)


def test_no_steps_score_the_start_only():
    menus = [make_menu(0, [0, 1, 2]), make_menu(1, [0, 1, 2])]
    budget = make_budget(menus, 4)
    start = allocate(menus, budget)
    assert evolve(menus, start, budget, additive, steps=0, seed=0) == (start, [additive(start)])
