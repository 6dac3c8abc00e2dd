"""The comparison that every export must pass."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from hf_opentrans.deploy.parity import (
    LIMITS,
    check_parity,
    compare,
    limits_of,
    measure_parity,
    parity_images,
)


def outputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeds = normalize(torch.randn(2, 8, 4, 5, generator=generator), dim=1)
    text = normalize(torch.randn(6, 8, generator=generator), dim=1)
    return {"logits": torch.einsum("bdhw,qd->bqhw", embeds, text), "dense_embeds": embeds}


def test_figures_by_hand():
    first = {"logits": torch.tensor([[[[1.0, 4.0]], [[2.0, -8.0]]]]), "dense_embeds": torch.eye(2).view(1, 2, 1, 2)}
    second = {"logits": torch.tensor([[[[1.0, 4.0]], [[0.0, -8.0]]]]), "dense_embeds": torch.ones(1, 2, 1, 2)}
    found = compare([(first, second)])
    assert (found.max_difference, found.max_relative) == (2.0, 0.25)
    assert found.agreement == 0.5  # 2 > 1 became 0 < 1 at the first position
    assert math.isclose(found.cosine, math.sqrt(0.5), rel_tol=1e-6)
    assert found.vectors == 2


def test_equal_outputs_pass_everywhere():
    found = {"pictures": compare([(outputs(), outputs())])}
    assert found["pictures"].agreement == 1.0
    for precision in ("fp32", "bf16", "int8-dynamic", "int8-weights-bf16"):
        check_parity(found, precision)


def changed(size):
    values = outputs()
    noise = torch.Generator().manual_seed(1)
    return {name: part + size * torch.randn(part.shape, generator=noise) for name, part in values.items()}


@pytest.mark.parametrize(("precision", "size"), [("fp32", 0.01), ("bf16", 0.3), ("int8-static", 0.3)])
def test_too_far_is_refused_with_figures(precision, size):
    found = {"pictures": compare([(outputs(), changed(size))])}
    with pytest.raises(RuntimeError, match=f"in {precision} is not the model: on pictures .*Nothing was written"):
        check_parity(found, precision)


def test_noise_counts_in_fp32_alone():
    found = {"noise": compare([(outputs(), outputs(1))]), "pictures": compare([(outputs(), outputs())])}
    check_parity(found, "int8-dynamic")
    with pytest.raises(RuntimeError, match="on noise"):
        check_parity(found, "fp32")


def test_values_that_are_not_finite():
    broken = outputs()
    broken["dense_embeds"][0, 0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="NaN or infinite dense_embeds"):
        compare([(outputs(), broken)])


def test_batches_of_one_and_three_and_few_names():
    seen = []

    def run(inputs):
        seen.append((len(inputs["pixel_values"]), len(inputs["text_embeddings"])))
        pooled = inputs["pixel_values"].mean((2, 3))
        return {"logits": torch.einsum("bc,qc->bq", pooled, inputs["text_embeddings"][:, :3])[..., None, None]}

    images = parity_images((6, 8))
    assert set(images) == {"noise", "pictures"}
    assert all(part.shape == (4, 3, 6, 8) for part in images.values())
    found = measure_parity(run, run, images, [{"text_embeddings": torch.randn(count, 4)} for count in (2, 5)])
    assert set(seen) == {(1, 2), (3, 5)}
    assert found["noise"].max_difference == 0


def test_limits():
    assert limits_of("int8-weights-bf16") is LIMITS["int8"]
    assert limits_of("fp32").difference is not None


def test_masks_are_judged_by_the_median():
    expected = {"logits": torch.randn(2, 3, 8, 8), "masks_queries_logits": torch.randn(2, 4, 8, 8)}
    tipped = {name: value.clone() for name, value in expected.items()}
    tipped["logits"][0, :, :3, :1] *= 1.3  # one mask of one image went the other way, and no class changed
    found = compare([(expected, tipped)])
    assert found.has_masks
    assert found.max_relative > 1e-3
    check_parity({"noise": found}, "fp32")
    moved = {**expected, "logits": expected["logits"] * 1.3}
    with pytest.raises(RuntimeError, match="on noise values differ by"):
        check_parity({"noise": compare([(expected, moved)])}, "fp32")
    without = compare([({"logits": expected["logits"]}, {"logits": tipped["logits"]})])
    with pytest.raises(RuntimeError, match="on noise values differ by"):
        check_parity({"noise": without}, "fp32")
