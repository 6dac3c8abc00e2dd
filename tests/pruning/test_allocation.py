"""The budget over layers: hulls, optimality and range against brute force."""

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_opentrans.pruning.allocation import TOLERANCE, Budget, allocate, allocate_uniform, lower_hull
from hf_opentrans.pruning.importance import ErrorCurve

steps = st.lists(st.integers(0, 20), min_size=1, max_size=6)


def make_curve(layer, kind, increments, total=None):
    errors = (0.0, *itertools.accumulate(map(float, increments)))
    return ErrorCurve(layer, kind, tuple(range(total or len(increments) + 1)), errors)


def make_budget(curves, keep, *, fixed=0, head=1, neuron=1, lowest=None):
    """Return a budget over the curves' units; what no curve removes and `fixed` stay."""
    unit_costs = {(c.layer, c.kind): head if c.kind == "heads" else neuron for c in curves}
    dense = fixed + sum(len(c.order) * unit_costs[c.layer, c.kind] for c in curves)
    removable = sum((len(c.errors) - 1) * unit_costs[c.layer, c.kind] for c in curves)
    lowest = (dense - removable) / dense if lowest is None else lowest
    return Budget("macs", dense, keep, unit_costs, lowest, "the floors min_heads=1 and min_neurons=0.1")


def cost_of(removed, curves, budget):
    return sum(r * budget.unit_costs[c.layer, c.kind] for r, c in zip(removed, curves, strict=True))


def error_of(removed, curves):
    return sum(curve.errors[r] for r, curve in zip(removed, curves, strict=True))


def brute_force(curves, budget, cost):
    """Return the least error of all ways to remove at least `cost`."""
    choices = itertools.product(*(range(len(curve.errors)) for curve in curves))
    return min(error_of(c, curves) for c in choices if cost_of(c, curves, budget) >= cost)


@settings(max_examples=60, deadline=None)
@given(errors=st.lists(st.integers(-20, 20), min_size=1, max_size=9))
def test_lower_hull_is_the_greatest_convex_function_below(errors):
    corners = lower_hull(tuple(map(float, errors)))
    assert (corners[0], corners[-1]) == (0, len(errors) - 1)
    for x in range(len(errors)):
        # The hull at x is the least value of all chords over x.
        chords = [
            errors[a] + (errors[b] - errors[a]) * (x - a) / (b - a)
            for a in range(x)
            for b in range(x + 1, len(errors))
        ]
        expected = min([errors[x], *chords])
        left = max(c for c in corners if c <= x)
        right = min(c for c in corners if c >= x)
        slope = (errors[right] - errors[left]) / (right - left) if right > left else 0.0
        assert errors[left] + slope * (x - left) == pytest.approx(expected)
    slopes = [(errors[b] - errors[a]) / (b - a) for a, b in itertools.pairwise(corners)]
    assert slopes == sorted(slopes)


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(steps, min_size=1, max_size=3), costs=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_allocation_is_optimal_at_every_corner(parts, costs):
    kinds = ["neurons", "heads", "neurons"]
    curves = [make_curve(i, kinds[i], part) for i, part in enumerate(parts)]
    reference = make_budget(curves, 1.0, head=costs[0], neuron=costs[1], fixed=3)
    segments = []
    for curve in curves:
        cost = reference.unit_costs[curve.layer, curve.kind]
        for a, b in itertools.pairwise(lower_hull(curve.errors)):
            segments.append(((curve.errors[b] - curve.errors[a]) / (b - a) / cost, curve.layer, a, (b - a) * cost))
    cost = 0
    for *_, size in sorted(segments):
        cost += size
        keep = 1 - cost / reference.dense
        budget = make_budget(curves, keep, head=costs[0], neuron=costs[1], fixed=3, lowest=0.0)
        removed = allocate(curves, budget)
        assert cost_of(removed, curves, budget) == cost
        assert error_of(removed, curves) == pytest.approx(brute_force(curves, budget, cost))


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(steps, min_size=1, max_size=3), target=st.integers(0, 18))
def test_convex_curves_of_equal_units_are_solved_exactly_for_every_budget(parts, target):
    curves = [make_curve(i, "neurons", sorted(part)) for i, part in enumerate(parts)]
    assume(target <= sum(map(len, parts)))
    reference = make_budget(curves, 1.0, fixed=2)
    budget = make_budget(curves, 1 - target / reference.dense, fixed=2, lowest=0.0)
    removed = allocate(curves, budget)
    assert sum(removed) == target
    assert error_of(removed, curves) == pytest.approx(brute_force(curves, budget, target))


@st.composite
def towers(draw):
    """Layers of 4 heads and 40 neurons whose heads cost more than the tolerance."""
    curves = []
    for layer in range(draw(st.integers(1, 3))):
        curves.append(make_curve(layer, "heads", draw(st.lists(st.integers(0, 99), min_size=3, max_size=3)), 4))
        curves.append(make_curve(layer, "neurons", draw(st.lists(st.integers(0, 99), min_size=36, max_size=36)), 40))
    return curves


@settings(max_examples=60, deadline=None)
@given(curves=towers(), keep=st.floats(0.05, 1.0), head=st.integers(5, 30))
def test_realised_cost_lies_in_the_tolerance_and_floors_hold(curves, keep, head):
    reference = make_budget(curves, 1.0, head=head, fixed=60)
    keep = max(keep, reference.lowest)
    budget = make_budget(curves, keep, head=head, fixed=60)
    removed = allocate(curves, budget)
    realised = 1 - cost_of(removed, curves, budget) / budget.dense
    assert keep - TOLERANCE - 1e-9 <= realised <= keep + 1e-9
    assert all(0 <= r < len(curve.errors) for r, curve in zip(removed, curves, strict=True))


@settings(max_examples=20, deadline=None)
@given(curves=towers())
def test_a_smaller_budget_never_costs_less_error(curves):
    neurons = [curve for curve in curves if curve.kind == "neurons"]
    convex = [
        make_curve(c.layer, "neurons", sorted(b - a for a, b in itertools.pairwise(c.errors)), 40) for c in neurons
    ]
    removed = [allocate(convex, make_budget(convex, keep / 20)) for keep in range(20, 2, -1)]
    for larger, smaller in itertools.pairwise(removed):
        assert error_of(larger, convex) <= error_of(smaller, convex)
        assert all(a <= b for a, b in zip(larger, smaller, strict=True))


def test_nothing_goes_at_keep_one():
    curves = [make_curve(0, "heads", [0, 0, 0]), make_curve(0, "neurons", [0, 0, 0])]
    assert allocate(curves, make_budget(curves, 1.0)) == [0, 0]
    assert allocate_uniform(curves, [4, 4], make_budget(curves, 1.0)) == [0, 0]


def test_a_coarse_head_gives_its_surplus_back_to_the_most_expensive_neurons():
    curves = [make_curve(0, "neurons", [1, 1, 5, 5], 90), make_curve(1, "heads", [12], 2)]
    # Prices: neurons 1, 1, 5, 5 per unit; the head 12 / 5 per unit. To remove: 6 of 100 + 5 units.
    budget = make_budget(curves, 1 - 6 / 105, head=5, fixed=5)
    assert budget.dense == 105
    # Neurons 1, 2 (cost 2), then the head (cost 7, one too many): one cheap neuron comes back.
    assert allocate(curves, budget) == [1, 1]


def test_neurons_come_back_where_only_one_more_head_meets_the_budget():
    curves = [make_curve(0, "neurons", [1] * 20, 21), make_curve(0, "heads", [1000], 2)]
    # 35 of 81 must go: all neurons are 15 too few, a head more (30) is 15 too many, so 15 neurons stay after all.
    assert allocate(curves, make_budget(curves, 1 - 35 / 81, head=30)) == [5, 1]


def test_units_that_are_too_coarse_raise():
    curves = [make_curve(0, "neurons", [1] * 20, 21), make_curve(0, "heads", [1000], 2)]
    with pytest.raises(ValueError, match="too coarse"):  # 20 is the most that neurons give, 30 the least with a head
        allocate(curves, make_budget(curves, 1 - 25 / 81, head=30))
    with pytest.raises(ValueError, match="too coarse"):
        allocate(curves[1:], make_budget(curves[1:], 0.75))


@pytest.mark.parametrize("solve", [allocate, lambda curves, budget: allocate_uniform(curves, [4, 10], budget)])
def test_a_budget_below_the_floors_names_the_floor_and_the_lowest_value(solve):
    curves = [make_curve(0, "heads", [1, 1, 1], 4), make_curve(0, "neurons", [1] * 9, 10)]
    budget = make_budget(curves, 0.1, head=2)
    with pytest.raises(ValueError, match=r"keep=0\.1 .*min_heads=1 and min_neurons=0\.1 .*0\.1667.*0\.167 or more"):
        solve(curves, budget)
    removed = solve(curves, make_budget(curves, 0.167, head=2))
    assert removed == [3, 9]


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(1, 4), keep=st.floats(0.3, 1.0), head=st.integers(1, 12))
def test_uniform_allocation_takes_the_same_share_in_every_layer(layers, keep, head):
    kinds = [(layer, kind, n) for layer in range(layers) for kind, n in (("heads", 8), ("neurons", 100))]
    curves = [make_curve(layer, kind, [0] * (n - n // 10 - (kind == "heads")), n) for layer, kind, n in kinds]
    budget = make_budget(curves, keep, head=head, fixed=20)
    assume(keep >= budget.lowest)
    removed = allocate_uniform(curves, [n for *_, n in kinds], budget)
    realised = 1 - cost_of(removed, curves, budget) / budget.dense
    assert keep - TOLERANCE - 1e-9 <= realised <= keep + 1e-9
    assert len(set(removed[::2])) == 1
    assert max(removed[1::2]) - min(removed[1::2]) <= 1


def test_uniform_allocation_balances_heads_and_neurons():
    curves = [make_curve(0, "heads", [0] * 9, 10), make_curve(0, "neurons", [0] * 90, 100)]
    removed = allocate_uniform(curves, [10, 100], make_budget(curves, 0.6, head=10))
    assert removed == [4, 40]


def test_uniform_allocation_without_enough_neurons_raises():
    curves = [make_curve(0, "heads", [0, 0], 3)]
    with pytest.raises(ValueError, match="one share for all layers"):
        allocate_uniform(curves, [3], make_budget(curves, 0.8))
