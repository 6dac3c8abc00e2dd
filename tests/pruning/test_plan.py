"""Configuration and plan: what they refuse, and the way to disk and back."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans import PruningConfig, PruningPlan
from hf_opentrans.pruning import LayerPlan

kept = st.sets(st.integers(0, 40)).map(sorted)


@settings(max_examples=25, deadline=None)
@given(layers=st.lists(st.tuples(kept, kept), max_size=4))
def test_plans_survive_json(layers):
    plan = PruningPlan(tuple(LayerPlan(tuple(heads), tuple(neurons)) for heads, neurons in layers))
    again = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert len(again) == len(layers)


def test_plans_survive_the_disk(tmp_path):
    plan = PruningPlan((LayerPlan((0, 2), (1,)), LayerPlan((), ())))
    plan.save_pretrained(tmp_path / "new" / "folder")
    assert PruningPlan.from_pretrained(tmp_path / "new" / "folder") == plan


def test_keep_all():
    plan = PruningPlan.keep_all([2, 0], [3, 1])
    assert plan == PruningPlan((LayerPlan((0, 1), (0, 1, 2)), LayerPlan((), (0,))))
    with pytest.raises(ValueError, match="zip"):
        PruningPlan.keep_all([2], [3, 1])


@pytest.mark.parametrize("wrong", [(1, 0), (1, 1), (-1, 2)])
def test_indices_must_ascend(wrong):
    with pytest.raises(ValueError, match=r"A layer keeps the heads .* must be ascending, distinct and not negative"):
        LayerPlan(wrong, ())
    with pytest.raises(ValueError, match=r"A layer keeps the neurons .* must be ascending, distinct and not negative"):
        LayerPlan((), wrong)


@pytest.mark.parametrize("values", [{}, {"layers": [{"heads": [0]}]}, {"layers": 3}, {"layers": [{"heads": 1}]}])
def test_broken_plans_are_refused(values):
    with pytest.raises(ValueError, match="It needs `layers`, each with `heads` and `neurons`"):
        PruningPlan.from_dict(values)


def test_plans_and_configs_are_frozen():
    for frozen, name in ((LayerPlan((0,), (0,)), "heads"), (PruningPlan(()), "layers"), (PruningConfig(), "keep")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0}, r"keep is 0. It must lie in \(0, 1\]"),
        ({"keep": 1.5}, r"keep is 1.5. It must lie in \(0, 1\]"),
        ({"keep": float("nan")}, "keep is nan"),
        ({"unit": "flops"}, "unit is 'flops'. It must be one of macs, params"),
        ({"method": "taylor"}, "method is 'taylor'. It must be one of obs, magnitude, random"),
        ({"resolution": 0}, "resolution is 0. It must be a positive number of pixels"),
        ({"num_images": 0}, "num_images is 0. It must be a whole number >= 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5. It must be a whole number >= 1"),
        ({"probes": 0}, "probes is 0"),
        ({"probe_images": 0}, "probe_images is 0"),
        ({"min_heads": -1}, "min_heads is -1. It must be a whole number >= 0"),
        ({"min_neurons": 1.1}, r"min_neurons is 1.1. It must lie in \[0, 1\]"),
        ({"held_out": 0}, r"held_out is 0. It must lie in \(0, 0.5\]"),
    ],
)
def test_impossible_configs_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**values)


def test_configs_become_dictionaries():
    values = PruningConfig(keep=0.4, unit="params").to_dict()
    assert (values["keep"], values["unit"], values["method"]) == (0.4, "params", "obs")
    assert PruningConfig(**values) == PruningConfig(keep=0.4, unit="params")
