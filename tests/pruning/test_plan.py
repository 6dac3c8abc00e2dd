"""Configuration and plan: what they refuse, and the way to disk and back."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_opentrans import PruningConfig, PruningPlan
from hf_opentrans.pruning import LayerPlan
from hf_opentrans.pruning.plan import METHODS, WITHOUT_IMAGES, WITHOUT_STATISTICS

kept = st.sets(st.integers(0, 40)).map(sorted)
widths = st.none() | st.integers(1, 64)


@settings(max_examples=25, deadline=None)
@given(layers=st.lists(st.tuples(kept, kept, widths, widths), max_size=4))
def test_plans_survive_json(layers):
    plan = PruningPlan(tuple(LayerPlan(tuple(heads), tuple(neurons), qk, v) for heads, neurons, qk, v in layers))
    again = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert len(again) == len(layers)


def test_plans_survive_the_disk(tmp_path):
    plan = PruningPlan((LayerPlan((0, 2), (1,), qk_head_dim=24, v_head_dim=32), LayerPlan((), ())))
    plan.save_pretrained(tmp_path / "new" / "folder")
    assert PruningPlan.from_pretrained(tmp_path / "new" / "folder") == plan


def test_files_without_widths_still_load(tmp_path):
    old = {"layers": [{"heads": [0, 2], "neurons": [1]}, {"heads": [], "neurons": [0], "v_head_dim": 4}]}
    (tmp_path / "plan.json").write_text(json.dumps(old), encoding="utf-8")
    plan = PruningPlan.from_pretrained(tmp_path)
    assert plan == PruningPlan((LayerPlan((0, 2), (1,), None, None), LayerPlan((), (0,), None, 4)))
    assert plan.to_dict()["layers"][0] == {"heads": [0, 2], "neurons": [1], "qk_head_dim": None, "v_head_dim": None}


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
        ({"unit": "FLOPs"}, "unit is 'FLOPs'. It must be one of macs, params, latency"),
        (
            {"method": "taylor"},
            "method is 'taylor'. It must be one of obs, corp-refit, corp, flap, vbp, magnitude-compensated, "
            "magnitude, imp, random, torch-pruning",
        ),
        ({"structures": ()}, r"structures is \(\). It must name some of mlp, heads, ranks"),
        ({"structures": ("mlp", "layers")}, r"structures is \('mlp', 'layers'\)"),
        ({"structures": "tokens"}, r"structures is \('tokens',\)"),
        ({"solver": "simplex"}, "solver is 'simplex'. It must be one of dp, lagrangian, uniform"),
        ({"metric": "fisher"}, "metric is 'fisher'. It must be one of probes, identity"),
        ({"search": "grid"}, "search is 'grid'. It must be one of none, evolution"),
        ({"search_steps": 0}, "search_steps is 0. It must be a whole number >= 1"),
        ({"round_neurons": 0}, "round_neurons is 0. It must be a whole number >= 1"),
        ({"round_head_dim": 2.5}, "round_head_dim is 2.5. It must be a whole number >= 1"),
        ({"search_steps": None}, "search_steps is None"),
        ({"resolution": 0}, "resolution is 0. It must be a positive number of pixels"),
        ({"num_images": 0}, "num_images is 0. It must be a whole number >= 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5. It must be a whole number >= 1"),
        ({"probes": 0}, "probes is 0"),
        ({"probe_images": 0}, "probe_images is 0"),
        ({"min_heads": -1}, "min_heads is -1. It must be a whole number >= 0"),
        ({"min_neurons": 1.1}, r"min_neurons is 1.1. It must lie in \[0, 1\]"),
        ({"min_neurons": -0.1}, "min_neurons is -0.1"),
        ({"held_out": 0.51}, "held_out is 0.51"),
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


@pytest.mark.parametrize("name", METHODS)
def test_every_listed_method_is_accepted(name):
    assert PruningConfig(method=name).method == name


def test_method_groups_name_methods():
    assert len(set(METHODS)) == len(METHODS)
    assert set(WITHOUT_IMAGES) < set(WITHOUT_STATISTICS) < set(METHODS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("mlp", ("mlp",)),
        (["ranks", "mlp"], ("mlp", "ranks")),
        ({"heads"}, ("heads",)),
        (("heads", "heads", "ranks", "mlp"), ("mlp", "heads", "ranks")),
    ],
)
def test_structures_are_put_in_order(given, expected):
    config = PruningConfig(structures=given)
    assert config.structures == expected
    assert PruningConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_and_limits_are_allowed():
    config = PruningConfig(keep=1, min_heads=0, min_neurons=0, held_out=0.5, round_neurons=1, round_head_dim=1)
    assert (config.round_neurons, PruningConfig().round_neurons, PruningConfig().round_head_dim) == (1, None, None)
    assert PruningConfig().structures == ("mlp", "heads", "ranks")
