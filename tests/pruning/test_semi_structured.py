"""2:4 sparsity of a tower: the closed form against brute force, the walk, the report, what is refused."""

from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPModel, CLIPVisionModel

from hf_opentrans import DenseCLIPForSegmentation, SparseCLIPModel, SparseCLIPVisionConfig, SparseCLIPVisionModel
from hf_opentrans.pruning import semi_structured as ours
from hf_opentrans.pruning import two_of_four as solver
from hf_opentrans.pruning.calibration import token_weights
from hf_opentrans.pruning.semi_structured import (
    SEMI_STRUCTURED_FILE,
    SemiStructuredConfig,
    SemiStructuredReport,
    prune_semi_structured,
)
from hf_opentrans.pruning.statistics import CovarianceStatistics
from hf_opentrans.pruning.surgery import to_sparse
from hf_opentrans.pruning.tower import Tower
from hf_opentrans.pruning.two_of_four import compensate_two_of_four, is_two_of_four, two_of_four

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def _problem(outputs, inputs, seed=0):
    """Return a weight and a covariance of inputs that depend on each other, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return weight, mixing @ mixing.T / inputs


def _damped(covariance, damping=solver.DAMPING):
    return covariance + damping * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)


def _error(change, covariance):
    return ((change @ covariance) * change).sum(1)


def _least_squares(row, kept, covariance):
    """Return the best row with weights at `kept` alone."""
    best = torch.zeros_like(row)
    best[kept] = torch.linalg.solve(covariance[kept][:, kept], covariance[kept] @ row)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_one_group_is_solved_exactly(seed):
    weight, covariance = _problem(8, 4, seed)
    found = compensate_two_of_four(weight, covariance)
    inner = _damped(covariance)
    for row, now in zip(weight, found, strict=True):
        tries = [_least_squares(row, list(kept), inner) for kept in combinations(range(4), 2)]
        best = min(tries, key=lambda tried: float(_error((row - tried)[None], inner)))
        torch.testing.assert_close(now, best, rtol=1e-8, atol=1e-10)


def test_every_row_ends_at_the_least_squares_weights_of_its_choice():
    weight, covariance = _problem(6, 16)
    found = compensate_two_of_four(weight, covariance)
    inner = _damped(covariance)
    for row, now in zip(weight, found, strict=True):
        kept = now.nonzero().flatten().tolist()
        assert len(kept) == 8
        torch.testing.assert_close(now, _least_squares(row, kept, inner), rtol=1e-5, atol=1e-7)


def test_the_greedy_choice_is_near_the_best_of_all_choices():
    weight, covariance = _problem(12, 8, 1)
    inner = _damped(covariance)
    found = _error(weight - compensate_two_of_four(weight, covariance), inner)
    pairs = list(combinations(range(4), 2))
    for row, error in zip(weight, found, strict=True):
        tries = (_least_squares(row, [*a, *(4 + i for i in b)], inner) for a, b in product(pairs, pairs))
        best = min(float(_error((row - tried)[None], inner)) for tried in tries)
        assert best <= float(error) * (1 + 1e-9)
    assert float(found.sum()) < 0.6 * float(_error(weight - weight * two_of_four(weight.abs()), inner).sum())


@given(
    st.integers(1, 9),
    st.integers(1, 40).map(lambda groups: 4 * groups),
    st.integers(0, 10**6),
    st.sampled_from([4, 8]),
)
@settings(max_examples=30, deadline=None)
def test_properties(outputs, inputs, seed, block):
    weight, covariance = _problem(outputs, inputs, seed)
    inner = _damped(covariance)
    found = compensate_two_of_four(weight, covariance)
    assert is_two_of_four(found)
    assert int((found != 0).sum()) == outputs * inputs // 2
    plain = weight * (found != 0)  # the same choice without compensation
    assert bool((_error(weight - found, inner) <= _error(weight - plain, inner) * (1 + 1e-9)).all())
    again = compensate_two_of_four(found, covariance)  # nothing is left to do
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-8)
    whole, before = found, solver._BLOCK
    try:
        solver._BLOCK = block  # late updates in blocks change nothing but rounding
        torch.testing.assert_close(compensate_two_of_four(weight, covariance), whole, rtol=1e-4, atol=1e-6)
    finally:
        solver._BLOCK = before


def test_inputs_that_never_change_are_no_obstacle():
    weight, covariance = _problem(4, 8)
    nothing = torch.zeros_like(covariance)
    torch.testing.assert_close(
        compensate_two_of_four(weight, nothing), weight * two_of_four(weight.abs()), rtol=1e-9, atol=1e-12
    )
    covariance[2] = covariance[:, 2] = 0.0  # a dead input
    found = compensate_two_of_four(weight, covariance)
    assert is_two_of_four(found)
    assert not found[:, 2].any()
    with pytest.raises(RuntimeError, match="The damped covariance of 8 inputs cannot be inverted"):
        compensate_two_of_four(weight, -torch.eye(8, dtype=torch.float64))


def test_masks():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 5.0, 6.0]])
    assert two_of_four(scores).tolist() == [[False, True, True, False, False, False, True, True]]
    assert is_two_of_four(scores * two_of_four(scores))
    assert not is_two_of_four(scores)
    assert not is_two_of_four(torch.zeros(3, 6))  # no multiple of four
    assert not is_two_of_four(torch.zeros(0, 8))
    assert not is_two_of_four(torch.zeros(8))


def _run(model, images, **values: Any):
    return prune_semi_structured(model, images, SemiStructuredConfig(**{"batch_size": 4, **values}))


@pytest.fixture
def many(tiny_images):
    """Return enough different pictures that the narrow layers can be solved."""
    turned = [image.transpose(how) for image in tiny_images for how in range(5)]
    return [*tiny_images, *turned]


@pytest.mark.filterwarnings("ignore:.*calibration images give:UserWarning")
def test_a_stock_model_keeps_class_and_text_and_gets_zeros(tiny_clip, many):
    before = {name: tensor.clone() for name, tensor in tiny_clip.state_dict().items()}
    result = _run(tiny_clip, many)
    assert type(result.model) is CLIPModel
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_clip.state_dict().items())
    now = result.model.state_dict()
    for name, tensor in before.items():
        is_linear = name.startswith("vision_model.encoder") and any(part in name for part in LINEARS)
        assert is_linear or torch.equal(now[name], tensor), name
    for index, part in product(range(3), LINEARS):
        assert is_two_of_four(now[f"vision_model.encoder.layers.{index}.{part}.weight"])
    report = result.report
    assert len(report.layers) == 18
    assert not report.skipped
    assert report.zeros == 0.5
    assert (report.unseen_images, report.fit_images) == (10, 38)
    assert report.resolution == 32


@pytest.mark.filterwarnings("ignore:.*calibration images give:UserWarning")
def test_ours_is_closer_than_the_controls(tiny_clip, many):
    found = {method: _run(tiny_clip, many, method=method).report for method in ("obs", "magnitude", "random")}
    losses = {method: 1 - report.patch_token_cosine for method, report in found.items()}
    assert losses["obs"] < 0.7 * losses["magnitude"] < 0.7 * losses["random"]
    assert all(layer.lost is not None and 0 < layer.lost < 1 for layer in found["obs"].layers)
    assert all(layer.lost is None for layer in found["magnitude"].layers)
    assert found["magnitude"].fit_images == 0
    again = _run(tiny_clip, many, method="random", seed=1).report
    assert again.patch_token_cosine != found["random"].patch_token_cosine


@pytest.mark.filterwarnings("ignore:.*calibration images give:UserWarning")
def test_the_magnitude_control_keeps_the_largest(tiny_clip, many):
    now = _run(tiny_clip, many, method="magnitude").model.state_dict()
    for name, tensor in tiny_clip.state_dict().items():
        if name.startswith("vision_model.encoder") and name.endswith("fc1.weight"):
            assert torch.equal(now[name], tensor * two_of_four(tensor.abs()))


@pytest.mark.filterwarnings("ignore:.*calibration images give:UserWarning")
@pytest.mark.parametrize(("structures", "parts"), [(("mlp",), LINEARS[4:]), ("attention", LINEARS[:4])])
def test_only_what_is_named_changes(tiny_clip, many, structures, parts):
    result = _run(tiny_clip, many, structures=structures)
    expected = {f"encoder.layers.{index}.{part}" for index, part in product(range(3), parts)}
    assert {layer.name for layer in result.report.layers} == expected
    now = result.model.state_dict()
    for name, tensor in tiny_clip.state_dict().items():
        path = name.removeprefix("vision_model.").rpartition(".")[0]
        assert path in expected or torch.equal(now[name], tensor), name


# Neither heads nor neurons; odd widths; no attention.
LAYERS = {
    0: {"num_attention_heads": 0, "intermediate_size": 0},
    1: {"num_attention_heads": 3, "qk_head_dim": 5, "v_head_dim": 5, "intermediate_size": 18},
    2: {"skip": ["attention"], "intermediate_size": 24},
}


@pytest.mark.filterwarnings("ignore:.*calibration images give:UserWarning")
@pytest.mark.parametrize("method", ["obs", "magnitude"])
def test_a_pruned_tower_with_odd_widths(tiny_clip, many, method):
    values: Any = Tower.of(to_sparse(tiny_clip)).vision.config.to_dict() | {"per_layer_config": LAYERS}
    tower = SparseCLIPVisionModel(SparseCLIPVisionConfig(**values)).eval()
    report = _run(tower, many, method=method).report
    names = [layer.name.removeprefix("encoder.layers.") for layer in report.layers]
    assert names == [*(f"1.self_attn.{n}_proj" for n in "qkv"), "1.mlp.fc1", "2.mlp.fc1", "2.mlp.fc2"]
    reasons = {layer.name.removeprefix("encoder.layers."): layer.reason for layer in report.skipped}
    assert reasons == {
        "1.self_attn.out_proj": "15 inputs are no multiple of 4",
        "1.mlp.fc2": "18 inputs are no multiple of 4",
    }
    assert 0.3 < report.zeros < 0.5


@pytest.mark.filterwarnings("ignore:.*calibration images give:UserWarning")
def test_saved_folders_load_as_any_other(tiny_clip, many, tmp_path, tiny_image_processor):
    config: Any = to_sparse(tiny_clip).config
    result = _run(DenseCLIPForSegmentation(config).eval(), many)
    result.save_pretrained(tmp_path / "out", tiny_image_processor, disk_dtype=torch.float16)
    assert SemiStructuredReport.load(tmp_path / "out") == result.report
    again = SparseCLIPModel.from_pretrained(tmp_path / "out", dtype=torch.float16)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.half()), name
    assert is_two_of_four(again.get_parameter("vision_model.encoder.layers.2.mlp.fc2.weight"))
    (tmp_path / "out" / SEMI_STRUCTURED_FILE).write_text('{"layers": 3}')
    with pytest.raises(ValueError, match="is no report on 2:4 sparsity"):
        SemiStructuredReport.load(tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*calibration images give:UserWarning")
def test_precision_and_mode_of_the_model_stay(tiny_clip, many):
    half = CLIPVisionModel(tiny_clip.config.vision_config).half().train()
    result = _run(half, many)
    assert result.model.dtype == torch.float16
    assert result.model.training
    assert is_two_of_four(result.model.state_dict()["encoder.layers.0.mlp.fc1.weight"])


def test_the_bias_takes_the_mean():
    linear = torch.nn.Linear(12, 5)
    parts, mixing = (CovarianceStatistics(17), CovarianceStatistics(17)), torch.randn(12, 12)
    for rows in parts:
        inputs = torch.randn(200, 12) @ mixing + 3
        rows.update(torch.cat([inputs, linear(inputs).detach() + 2], 1))
    with torch.no_grad():
        ours._solve({"layer.fc2": linear}, parts, 0)
    mean = parts[0].merge(parts[1]).mean
    assert is_two_of_four(linear.weight)
    found = linear.weight.detach().double() @ mean[:12] + linear.bias.detach().double()
    torch.testing.assert_close(found, mean[12:], rtol=1e-4, atol=1e-4)


def test_writers_aim_at_the_gap_of_the_stream_too(tiny_clip):
    tower = Tower.of(to_sparse(tiny_clip))
    mlp = list(ours._sublayers(tower, 1))[1]
    module: Any = mlp.module
    before = torch.randn(3, 5, 32)
    after = before + 0.5 + 0.1 * torch.randn(3, 5, 32)
    with torch.no_grad():
        target = mlp.branch(before)
        dense = [[before], [before]]
        fit, _ = ours._write(mlp, mlp, dense, [[after], [after]], int)
    weights = token_weights(module.activation_fn(mlp.readers["encoder.layers.1.mlp.fc1"](mlp.norm(after))).detach())
    for found, rows in ((fit.mean[64:96], target + before - after), (fit.mean[96:], before - after)):
        expected = (weights[:, None] * rows.flatten(0, 1)).sum(0) / weights.sum()
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense[0][0], before + target)  # the dense stream moved on


def test_what_is_refused(tiny_clip, tiny_images, make_tiny_clip):
    with pytest.raises(ValueError, match=r"method is 'wanda'. It must be of obs, magnitude, random"):
        SemiStructuredConfig(method="wanda")
    with pytest.raises(ValueError, match=r"structures is \('mlp', 'text'\). It must be of attention, mlp"):
        SemiStructuredConfig(structures=("mlp", "text"))
    with pytest.raises(ValueError, match="structures is"):
        SemiStructuredConfig(structures=())
    with pytest.raises(ValueError, match="num_images is 0"):
        SemiStructuredConfig(num_images=0)
    with pytest.raises(ValueError, match=r"There are 2 calibration images. At least 3 are needed"):
        _run(tiny_clip, tiny_images[:2])
    with pytest.raises(TypeError, match="CLIP vision tower"):
        _run(torch.nn.Linear(4, 4), tiny_images)
    odd = make_tiny_clip(hidden_size=30, intermediate_size=33, num_attention_heads=3)
    with pytest.raises(ValueError, match=r"None of the linear layers of attention, mlp has a multiple of 4 inputs"):
        _run(odd, tiny_images)
    broken = make_tiny_clip()
    with torch.no_grad():
        broken.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        _run(broken, tiny_images)
