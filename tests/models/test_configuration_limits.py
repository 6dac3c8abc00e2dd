"""Bounds of configurations: whatever a file states is refused in one sentence, or small enough to be built."""

import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.initialization import no_init_weights

from hf_opentrans import SparseCLIPVisionConfig, SparseCLIPVisionModel
from hf_opentrans.models.configuration_limits import (
    LAYER_KEYS,
    MOST_PARAMETERS,
    SIZES,
    check_layers,
    check_number,
    check_size,
    shown,
)

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}
SMALL |= {"patch_size": 4}
# Parameters of the parts that the sum of sizes leaves out: norms, biases, class and patch embeddings.
REST = 2**32

sizes = st.one_of(st.integers(-3, 70), st.sampled_from([2**12, 2**16, 2**20, 2**31, 2**63, 10**30]))
junk = st.one_of(
    sizes, st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)
fields = st.dictionaries(st.sampled_from([*SMALL, "head_dim", "qk_head_dim", "v_head_dim", "num_channels"]), sizes)
layers = st.dictionaries(
    st.sampled_from([0, 1, "1", "2", -1, "x"]), st.dictionaries(st.sampled_from(LAYER_KEYS), junk)
)


@settings(max_examples=150, deadline=None)
@given(fields, st.none() | layers)
def test_a_configuration_is_refused_or_can_be_built(values, per_layer):
    given: dict[str, Any] = {**SMALL, **values, "per_layer_config": per_layer}
    try:
        config = SparseCLIPVisionConfig(**given)
    except (ValueError, StrictDataclassError):
        return
    if config.num_hidden_layers > 8:
        return  # possible, and slow
    with torch.device("meta"), no_init_weights():
        model = SparseCLIPVisionModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) <= MOST_PARAMETERS + REST


@pytest.mark.parametrize("name", SIZES)
def test_bounds_themselves_pass(name):
    lowest, most = SIZES[name]
    for value in (lowest, most):
        check_size(name, value, lowest, most)
    for value, words in ((lowest - 1, f"at least {lowest}"), (most + 1, f"at most {most}")):
        with pytest.raises(ValueError, match=rf"It has {name}=-?{abs(value)}\. It must be {words}.*orrect"):
            check_size(name, value, lowest, most, "It has ")


@pytest.mark.parametrize("value", [True, 1.0, "1", [1], math.nan])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match=r"width=.*\. It must be a whole number\. Correct the configuration"):
        check_size("width", value, 0, 10)
    check_size("width", None, 0, 10)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1, "0.5", True, [0.5]])
def test_numbers(value):
    with pytest.raises(ValueError, match=r"eps=.*\. It must be a number in \[0, 1\]\. Correct"):
        check_number("eps", value, 0, 1)
    for fine in (None, 0, 1, 0.5):
        check_number("eps", fine, 0, 1)


def test_long_values_are_cut():
    assert shown(3) == "3"
    assert shown(10**100) == f"1{'0' * 56}..."
    assert len(shown(list(range(10**6)))) == 60
    assert len(shown("x" * 10**6)) == 22


def test_layers_pass_as_they_are_saved():
    every: Any = {
        "0": {"num_attention_heads": 0, "skip": ["mlp"]},
        "01": {"masked_heads": [1], "masked_neurons": None},
    }
    check_layers(every, 2)
    check_layers(None, 0)
    check_layers({}, 0)
    with pytest.raises(ValueError, match="has 2 entries, and the model 1 layers"):
        check_layers(every, 1)
