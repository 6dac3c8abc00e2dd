"""One budget over all sublayers: every solver against the enumeration of all choices."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from hf_opentrans.pruning.allocation import BINS, TOLERANCE, Budget, allocate, lower_hull, pareto, spend_rest
from hf_opentrans.pruning.sizes import Menu, Size

SOLVERS = ("dp", "lagrangian", "uniform")
# Spendable costs that divide the bins: the knapsack then rounds no whole number.
EXACT = [r for r in range(1, 101) if BINS % r == 0]


@dataclass(frozen=True)
class Units:
    """Every neuron costs one, every head its two widths."""

    base: float = 0.0

    def fixed(self):
        return self.base

    def attention(self, heads, qk_head_dim, v_head_dim):
        return heads * (qk_head_dim + v_head_dim)

    def mlp(self, neurons):
        return neurons


def make_menu(layer, errors, step=1):
    """Return a menu of neurons: `errors[i]` after the removal of `i` steps, the last leaving one step."""
    dense = len(errors) * step
    sizes = tuple(Size(float(error), dense - i * step) for i, error in enumerate(errors))
    return Menu(layer, "neurons", tuple(range(dense)), sizes)


def dense_cost(menus, base=0.0):
    return base + sum(menu.cost(menu.sizes[0], Units()) for menu in menus)


def make_budget(menus, keep, base=0.0):
    """Return a budget whose floor is what the smallest sizes take."""
    dense = dense_cost(menus, base)
    lowest = base + sum(min(menu.cost(size, Units()) for size in menu.sizes) for menu in menus)
    return Budget("macs", Units(base), dense, keep, lowest / dense, "the floors min_heads=1 and min_neurons=0.1")


def spendable(menus, rest):
    """Return a budget that leaves `rest` above the smallest sizes; fixed costs are so high that any choice is near."""
    base = 200.0 * dense_cost(menus)
    lowest = sum(min(menu.cost(size, Units()) for size in menu.sizes) for menu in menus)
    return make_budget(menus, (base + lowest + rest) / dense_cost(menus, base), base)


def error_of(sizes):
    return sum(size.error for size in sizes)


def cost_of(menus, sizes):
    return sum(menu.cost(size, Units()) for menu, size in zip(menus, sizes, strict=True))


def brute_force(menus, allowed):
    """Return the smallest error of all choices that cost `allowed` at most."""
    choices = itertools.product(*(menu.sizes for menu in menus))
    return min(error_of(sizes) for sizes in choices if cost_of(menus, sizes) <= allowed + 1e-6)


def check_valid(menus, sizes, budget):
    assert all(size in menu.sizes for menu, size in zip(menus, sizes, strict=True))
    assert budget.keep - TOLERANCE - 1e-9 <= budget.share(menus, sizes) <= budget.keep + 1e-8


@st.composite
def menus_of_towers(draw, most=3):
    """One to three sublayers of either kind, of any sizes; errors neither convex nor even monotone."""
    menus = []
    for layer in range(draw(st.integers(1, most))):
        errors = st.integers(0, 30)
        if draw(st.booleans()):
            others = draw(st.lists(st.tuples(st.integers(1, 24), errors), max_size=6))
            sizes = tuple(Size(float(error), units) for units, error in [(25, 0), *others])
            menus.append(Menu(layer, "neurons", tuple(range(25)), sizes))
        else:
            shape = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), errors)
            shapes = [(4, 4, 4, 0), *draw(st.lists(shape, max_size=6))]
            sizes = tuple(Size(float(error), units, qk, v) for units, qk, v, error in shapes)
            menus.append(Menu(layer, "heads", tuple(range(4)), sizes))
    return menus


# --- Budget --------------------------------------------------------------------------------------------------------


def test_budget_arithmetic():
    menus = [make_menu(0, [0, 1, 2, 3]), make_menu(1, [0] * 6)]
    budget = make_budget(menus, 0.7, base=10.0)
    assert budget.dense == 20
    assert budget.allowed == pytest.approx(4.0)
    assert budget.lowest == 12 / 20
    assert budget.share(menus, [menus[0].sizes[0], menus[1].sizes[0]]) == 1.0
    assert budget.share(menus, [menus[0].sizes[1], menus[1].sizes[4]]) == 15 / 20


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_budget_below_the_floors_names_the_floor_and_the_lowest_value(solver):
    menus = [make_menu(0, range(10))] * 3
    budget = make_budget(menus, 0.55, base=25.0)
    expected = r"keep=0\.5 of the macs .*min_heads=1 and min_neurons=0\.1 leave 0\.5091 .*keep to 0\.51 or more"
    with pytest.raises(ValueError, match=expected):
        allocate(menus, replace(budget, keep=0.5), solver)
    sizes = allocate(menus, replace(budget, keep=0.51), solver)  # what the message says
    assert [size.units for size in sizes] == [1, 1, 1]


@settings(max_examples=25, deadline=None)
@given(lowest=st.floats(0.01, 0.99))
def test_the_advice_of_the_message_is_possible(lowest):
    budget = Budget("params", Units(), 100.0, lowest / 2, lowest, "the floors")
    with pytest.raises(ValueError, match="Raise keep to") as caught:
        budget.check()
    advice = float(str(caught.value).split("Raise keep to ")[1].split()[0])
    assert lowest <= advice < lowest + 0.0011
    replace(budget, keep=advice).check()
    replace(budget, keep=lowest).check()


# --- all solvers ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(menus=menus_of_towers(), rest=st.integers(0, 80), solver=st.sampled_from(SOLVERS))
def test_choices_are_from_the_menus_within_the_budget_and_nothing_more_fits(menus, rest, solver):
    budget = spendable(menus, rest)
    sizes = allocate(menus, budget, solver)
    check_valid(menus, sizes, replace(budget, keep=min(budget.keep, 1.0)))
    if budget.keep >= 1:
        return
    left = budget.allowed - cost_of(menus, sizes)
    assert left >= -1e-6
    for menu, size in zip(menus, sizes, strict=True):
        better = [s for s in menu.sizes if s.error < size.error]
        assert all(menu.cost(s, Units()) - menu.cost(size, Units()) > left - 1e-6 for s in better)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("keep", [1.0, 1])
def test_keep_one_is_dense_even_where_a_smaller_size_is_free(solver, keep):
    menus = [make_menu(0, [0, 0, 0]), Menu(1, "heads", (0, 1), (Size(0.0, 2, 4, 4), Size(0.0, 1, 4, 4)))]
    assert allocate(menus, make_budget(menus, keep), solver) == [menus[0].sizes[0], menus[1].sizes[0]]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_free_reduction_is_taken_where_something_must_go(solver):
    menus = [make_menu(0, [0, 0, 7]), make_menu(1, [0, 1, 7])]
    sizes = allocate(menus, spendable(menus, 3), solver)  # five of six units
    assert [size.units for size in sizes] == [2, 3]


@pytest.mark.parametrize("solver", SOLVERS)
def test_sizes_that_are_too_coarse_raise(solver):
    menus = [Menu(0, "heads", (0, 1), (Size(0.0, 2, 4, 4), Size(1.0, 1, 4, 4)))]
    message = r"keep=0\.9 cannot be met within 0\.02: .* keeps 0\.500 because .* too coarse.*round_neurons"
    with pytest.raises(ValueError, match=message):
        allocate(menus, make_budget(menus, 0.9), solver)
    for keep in (0.5, 0.52):
        assert allocate(menus, make_budget(menus, keep), solver) == [menus[0].sizes[1]]


def test_an_unknown_solver_is_refused():
    menus = [make_menu(0, [0, 1])]
    with pytest.raises(KeyError, match="simplex"):
        allocate(menus, make_budget(menus, 0.5), "simplex")


# --- dp ------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(menus=menus_of_towers(), rest=st.sampled_from(EXACT))
def test_dp_finds_the_best_of_all_choices(menus, rest):
    budget = spendable(menus, rest)
    if budget.keep >= 1:
        return
    sizes = allocate(menus, budget, "dp")
    assert error_of(sizes) == brute_force(menus, budget.allowed)


@settings(max_examples=30, deadline=None)
@given(menus=menus_of_towers(), rest=st.floats(0.5, 70.0))
def test_dp_is_as_good_as_all_choices_of_a_budget_less_the_rounding(menus, rest):
    budget = spendable(menus, rest)
    if budget.keep >= 1:
        return
    sizes = allocate(menus, budget, "dp")
    check_valid(menus, sizes, budget)
    assert brute_force(menus, budget.allowed) <= error_of(sizes)
    # Every sublayer's cost is rounded up by one bin at most.
    assert error_of(sizes) <= brute_force(menus, budget.allowed - len(menus) * rest / BINS)


@settings(max_examples=30, deadline=None)
@given(menus=menus_of_towers(), rest=st.sampled_from(EXACT))
def test_dp_is_never_worse_than_the_other_solvers(menus, rest):
    budget = spendable(menus, rest)
    best, *others = (error_of(allocate(menus, budget, solver)) for solver in SOLVERS)
    assert all(best <= other + 1e-9 for other in others)


@settings(max_examples=20, deadline=None)
@given(menus=menus_of_towers())
def test_dp_loses_no_more_with_more_budget(menus):
    budgets = [budget for budget in (spendable(menus, rest) for rest in EXACT) if budget.keep < 1]
    errors = [error_of(allocate(menus, budget, "dp")) for budget in budgets]
    assert errors == sorted(errors, reverse=True)


def test_dp_beats_the_hulls_where_menus_are_not_convex():
    # 5 units of 10 may stay above the two that must: all of one menu's first step, or a useless bit of both.
    menus = [
        Menu(0, "neurons", tuple(range(7)), (Size(0.0, 7), Size(10.0, 4), Size(12.0, 1))),
        Menu(1, "neurons", tuple(range(7)), (Size(0.0, 7), Size(1.0, 3), Size(9.0, 1))),
    ]
    budget = spendable(menus, 5)
    assert [size.units for size in allocate(menus, budget, "dp")] == [4, 3]  # 11; dense first would leave 9
    assert error_of(allocate(menus, budget, "dp")) == brute_force(menus, budget.allowed) == 11.0


# --- lagrangian ----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(parts=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=5), min_size=1, max_size=3))
def test_lagrangian_is_exact_on_convex_menus(parts):
    """With convex errors and units of one price, taking the cheapest first is optimal at every budget."""
    menus = [make_menu(i, [0, *itertools.accumulate(sorted(part))]) for i, part in enumerate(parts)]
    for rest in range(sum(map(len, parts))):
        budget = spendable(menus, rest)
        sizes = allocate(menus, budget, "lagrangian")
        assert cost_of(menus, sizes) == len(menus) + rest
        assert error_of(sizes) == brute_force(menus, budget.allowed)


@settings(max_examples=20, deadline=None)
@given(menus=menus_of_towers())
def test_lagrangian_is_exact_where_a_corner_meets_the_budget(menus):
    fronts = [[(c, size.error) for c, size in pareto(menu, Units())] for menu in menus]
    gains = []
    for front in fronts:
        for a, b in itertools.pairwise(lower_hull(front)):
            price = front[b][0] - front[a][0]
            gains.append(((front[a][1] - front[b][1]) / price, price))
    rest = 0
    for gain, group in itertools.groupby(sorted(gains, reverse=True), key=lambda g: g[0]):
        assert gain > 0
        rest += sum(price for _, price in group)
        budget = spendable(menus, rest)
        if budget.keep < 1:
            assert error_of(allocate(menus, budget, "lagrangian")) == brute_force(menus, budget.allowed)


@settings(max_examples=50, deadline=None)
@given(heights=st.lists(st.integers(-20, 20), min_size=1, max_size=9), gaps=st.lists(st.integers(1, 5), min_size=9))
def test_lower_hull_is_the_greatest_convex_function_below(heights, gaps):
    xs = list(itertools.accumulate(gaps[: len(heights)]))
    corners = lower_hull(list(zip(xs, heights, strict=True)))
    assert (corners[0], corners[-1]) == (0, len(xs) - 1)
    slopes = [(heights[b] - heights[a]) / (xs[b] - xs[a]) for a, b in itertools.pairwise(corners)]
    assert all(a < b for a, b in itertools.pairwise(slopes))  # no corner lies on a straight line
    hull = np.interp(xs, [xs[c] for c in corners], [heights[c] for c in corners])
    for i, x in enumerate(xs):
        # The hull at x is the least value of all chords over x.
        chords = [
            heights[a] + (heights[b] - heights[a]) * (x - xs[a]) / (xs[b] - xs[a])
            for a in range(i)
            for b in range(i + 1, len(xs))
        ]
        assert hull[i] == pytest.approx(min([heights[i], *chords]))


@pytest.mark.parametrize("seed", range(5))
def test_lower_hull_agrees_with_scipy(seed):
    rng = np.random.default_rng(seed)
    points = np.stack([np.sort(rng.random(40)), rng.normal(size=40)], axis=1)
    # Points far above both ends make the upper hull: what is left of scipy's corners is the lower one.
    lifted = np.concatenate([points, points[[0, -1]] + [0, 100]])
    expected = sorted(int(i) for i in ConvexHull(lifted).vertices if i < 40)
    assert lower_hull([(float(x), float(y)) for x, y in points]) == expected


# --- uniform -------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(layers=st.integers(1, 4), width=st.sampled_from([10, 20, 40]), data=st.data())
def test_uniform_keeps_the_same_share_of_every_cost(layers, width, data):
    """Neurons and heads of any widths: where one share fits exactly, everything gets it, whatever the errors."""
    tenths = data.draw(st.integers(1, 9))
    menus = []
    for layer in range(layers):
        errors = data.draw(st.lists(st.integers(1, 30), min_size=9, max_size=9))
        menus.append(make_menu(layer, [0, *itertools.accumulate(errors)], step=width * (layer + 1) // 10))
        heads = tuple(Size(10.0 - h, h, 3, layer + 1) for h in range(10, 0, -1))
        menus.append(Menu(layer, "heads", tuple(range(10)), heads))
    sizes = allocate(menus, make_budget(menus, (tenths / 10 + 1) / 2, base=dense_cost(menus)), "uniform")
    shares = [m.cost(s, Units()) / m.cost(m.sizes[0], Units()) for m, s in zip(menus, sizes, strict=True)]
    assert shares == pytest.approx([tenths / 10] * len(menus))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), rest=st.integers(0, 60))
def test_uniform_gives_every_sublayer_the_largest_common_share_at_least(data, rest):
    counts = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=4))
    menus = [make_menu(i, range(n), step=i + 1) for i, n in enumerate(counts)]
    budget = spendable(menus, rest)
    if budget.keep >= 1:
        return
    costs = [[s.units for s in menu.sizes] for menu in menus]

    def common(share):
        return [max((c for c in front if c <= share * front[0]), default=front[-1]) for front in costs]

    best = max((s / 1000 for s in range(1001) if sum(common(s / 1000)) <= budget.allowed), default=0.0)
    sizes = allocate(menus, budget, "uniform")
    assert all(size.units >= least for size, least in zip(sizes, common(best), strict=True))
    assert cost_of(menus, sizes) <= budget.allowed


# --- pareto and the rest -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(menus=menus_of_towers(most=1))
def test_pareto_keeps_what_nothing_beats(menus):
    (menu,) = menus
    front = pareto(menu, Units())
    points = {(menu.cost(size, Units()), size.error) for size in menu.sizes}
    unbeaten = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    assert [(cost, size.error) for cost, size in front] == sorted(unbeaten)
    assert all(menu.cost(size, Units()) == cost and size in menu.sizes for cost, size in front)


@settings(max_examples=30, deadline=None)
@given(menus=menus_of_towers(), rest=st.integers(0, 70), data=st.data())
def test_spending_the_rest_only_improves(menus, rest, data):
    budget = spendable(menus, rest)
    start = [data.draw(st.sampled_from(menu.sizes)) for menu in menus]
    if cost_of(menus, start) > budget.allowed:
        start = [pareto(menu, Units())[0][1] for menu in menus]
    sizes = spend_rest(menus, start, budget)
    assert error_of(sizes) <= error_of(start)
    assert cost_of(menus, sizes) <= budget.allowed + 1e-6
    assert spend_rest(menus, sizes, budget) == sizes
    left = budget.allowed - cost_of(menus, sizes)
    for menu, size in zip(menus, sizes, strict=True):
        cost = menu.cost(size, Units())
        assert not any(s.error < size.error and menu.cost(s, Units()) - cost < left - 1e-6 for s in menu.sizes)


def test_the_rest_goes_where_a_unit_gains_most():
    menus = [make_menu(0, [0, 3, 6, 9]), make_menu(1, [0, 1, 9, 10])]
    start = [menus[0].sizes[3], menus[1].sizes[3]]
    gained = [[s.units for s in spend_rest(menus, start, spendable(menus, rest))] for rest in range(5)]
    # Gains per unit: 3, 3, 3 of the one; 1, 8, 1 of the other, whose first two together give 4.5 each.
    assert gained == [[1, 1], [2, 1], [1, 3], [2, 3], [3, 3]]
