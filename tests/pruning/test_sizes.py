"""The sizes of one sublayer: roundings, what stays, and what it costs."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans.pruning.macs import CountedCost, TowerCost
from hf_opentrans.pruning.sizes import Menu, Size, head_dim_step, neuron_step, rounded_widths


@settings(max_examples=100, deadline=None)
@given(dense=st.integers(1, 200), fewest=st.integers(0, 200), step=st.integers(1, 64))
def test_widths_are_all_multiples_between_floor_and_dense(dense, fewest, step):
    widths = rounded_widths(dense, fewest, step)
    expected = {width for width in range(dense) if width % step == 0 and width >= fewest} | {dense}
    assert widths == sorted(expected, reverse=True)


def test_widths_by_hand():
    assert rounded_widths(10, 3, 4) == [10, 8, 4]
    assert rounded_widths(12, 0, 4) == [12, 8, 4, 0]
    assert rounded_widths(12, 12, 4) == [12]
    assert rounded_widths(5, 1, 8) == [5]
    assert rounded_widths(5, 0, 8) == [5, 0]


@pytest.mark.parametrize(
    ("step", "dense", "expected"),
    [
        (neuron_step, 3072, 32),
        (neuron_step, 512, 32),
        (neuron_step, 511, 31),
        (neuron_step, 64, 4),
        (neuron_step, 15, 1),
        (neuron_step, 1, 1),
        (head_dim_step, 64, 8),
        (head_dim_step, 32, 8),
        (head_dim_step, 31, 7),
        (head_dim_step, 8, 2),
        (head_dim_step, 3, 1),
        (head_dim_step, 1, 1),
    ],
)
def test_steps(step, dense, expected):
    assert step(dense, None) == expected
    assert step(dense, 5) == 5


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(9)), units=st.integers(0, 9))
def test_the_first_in_the_order_go(order, units):
    kept = Menu(0, "heads", tuple(order), ()).kept(Size(0.0, units))
    assert list(kept) == sorted(kept)
    assert set(kept) == set(range(9)) - set(order[: 9 - units])


def test_kept_by_hand():
    menu = Menu(0, "neurons", (2, 0, 3, 1), ())
    assert [menu.kept(Size(0.0, units)) for units in range(5)] == [(), (1,), (1, 3), (0, 1, 3), (0, 1, 2, 3)]


class Digits:
    """A cost whose digits tell what was asked."""

    def fixed(self):
        return 1e9

    def attention(self, heads, qk_head_dim, v_head_dim):
        return 100 * heads + 10 * qk_head_dim + v_head_dim

    def mlp(self, neurons):
        return 1000 + neurons


def test_cost_asks_for_the_right_sublayer():
    assert Menu(0, "neurons", (), ()).cost(Size(9.0, 7, 5, 4), Digits()) == 1007
    assert Menu(0, "heads", (), ()).cost(Size(9.0, 7, 5, 4), Digits()) == 754


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(0, 12),
    qk=st.integers(1, 64),
    v=st.integers(1, 64),
    neurons=st.integers(0, 99),
    tokens=st.integers(1, 50),
)
def test_counted_costs_by_formula(heads, qk, v, neurons, tokens):
    tower = TowerCost(hidden_size=24, tokens=tokens, patch_inputs=3, positions=tokens, projection_dim=0)
    macs, params = CountedCost(tower, "macs", 2), CountedCost(tower, "params", 2)
    attention, mlp = Menu(1, "heads", (), ()), Menu(1, "neurons", (), ())
    linear = 24 * heads * (qk + qk + v + v)
    assert attention.cost(Size(0.0, heads, qk, v), macs) == tokens * linear + 2 * tokens**2 * heads * max(qk, v)
    assert attention.cost(Size(0.0, heads, qk, v), params) == linear + heads * (qk + qk + v)
    assert mlp.cost(Size(0.0, neurons), macs) == tokens * 2 * 24 * neurons
    assert mlp.cost(Size(0.0, neurons), params) == (2 * 24 + 1) * neurons


def test_sizes_and_menus_are_values():
    assert Size(1.0, 2) == Size(1.0, 2, 0, 0)
    assert len({Size(1.0, 2), Size(1.0, 2), Size(1.0, 3)}) == 2
    for frozen, name in ((Size(0.0, 1), "units"), (Menu(0, "heads", (), ()), "layer")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 1)
