"""Mask queries: pooling, pyramid, targets, matching and losses, against values derived by hand."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate, normalize

from hf_opentrans import Vocabulary
from hf_opentrans.models import modeling_mask_queries
from hf_opentrans.models.configuration_fcclip import FCCLIPConfig
from hf_opentrans.models.modeling_mask_queries import (
    LOWEST_LOGIT,
    CountedPixelMatcher,
    MaskQueriesLoss,
    MaskQueryDecoder,
    MaskTargets,
    TextClasses,
    ViTFeaturePyramid,
    _draw_pixels,
    _sample,
    hard_mask_pool,
    instance_targets,
    mask2former_config,
    semantic_logits,
    semantic_targets,
    text_classes,
)

IGNORED = 255


def config_of(**options: Any) -> Any:
    small: dict[str, Any] = {"hidden_dim": 32, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 2}
    small |= {"feedforward_dim": 48, "num_attention_heads": 4}
    return mask2former_config(FCCLIPConfig(**{**small, **options}))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


# Pooling


def test_pooling_averages_what_lies_inside():
    # Two channels on 2 x 2; the mask holds the first row, and zero is outside.
    features = torch.tensor([[[[1.0, 3.0], [100.0, 100.0]], [[-2.0, 4.0], [7.0, 7.0]]]])
    masks = torch.tensor([[[[0.1, 5.0], [0.0, -3.0]], [[-1.0, -1.0], [-1.0, 2.0]]]])
    pooled, is_valid = hard_mask_pool(features, masks)
    torch.testing.assert_close(pooled, torch.tensor([[[2.0, 1.0], [100.0, 7.0]]]))
    assert is_valid.tolist() == [[True, True]]


def test_masks_without_a_position_pool_to_zero():
    features = torch.randn(1, 3, 2, 2, requires_grad=True)
    pooled, is_valid = hard_mask_pool(features, -torch.ones(1, 2, 2, 2))
    assert torch.equal(pooled, torch.zeros(1, 2, 3))
    assert not is_valid.any()
    normalize(pooled, dim=-1).sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_masks_are_resized_to_the_features():
    """Halved, a 2 x 4 mask averages 2 x 2 blocks: (4 - 1 - 1 - 1) / 4 > 0 and (-4 + 1 + 1 + 1) / 4 < 0."""
    features = torch.tensor([[[[5.0, 9.0]]]])
    masks = torch.tensor([[[[4.0, -1.0, -4.0, 1.0], [-1.0, -1.0, 1.0, 1.0]]]])
    pooled, _ = hard_mask_pool(features, masks)
    assert pooled.flatten().tolist() == [5.0]


def test_no_gradient_reaches_the_masks():
    features, masks = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 4, requires_grad=True)
    pooled, _ = hard_mask_pool(features, masks)
    pooled.sum().backward()
    assert masks.grad is None
    assert features.grad is not None


# Text


def test_a_class_scores_as_its_best_alias():
    text = TextClasses(torch.randn(4, 2), torch.tensor([0, 1, 1, 2]), 3)
    logits = torch.tensor([[[1.0, -5.0, -2.0, 0.5], [0.0, 3.0, 1.0, -9.0]]])
    assert text.best_alias(logits).tolist() == [[[1.0, -2.0, 0.5], [0.0, 3.0, -9.0]]]


def test_the_first_alias_stands_for_its_class():
    text = TextClasses(torch.randn(5, 2), torch.tensor([0, 0, 1, 2, 2]), 3)
    spread = text.to_queries(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))
    assert spread.flatten().tolist() == [1.0, LOWEST_LOGIT, 2.0, 3.0, LOWEST_LOGIT]
    assert torch.isfinite(spread.half()).all()
    torch.testing.assert_close(spread.softmax(1)[0, [0, 2, 3], 0, 0], torch.tensor([1.0, 2.0, 3.0]).softmax(0))


def test_text_comes_from_a_vocabulary_or_from_embeddings():
    like = torch.zeros(1, 7, 2, 2)
    vocabulary = Vocabulary(["cat", "sofa; couch"]).encode(lambda texts: torch.randn(len(texts), 7))
    named, bare = (text_classes(*each, like) for each in ((vocabulary, None), (None, torch.randn(3, 7))))
    assert named is not None
    assert bare is not None
    assert (named.count, named.query_to_class.tolist()) == (2, [0, 1, 1])
    assert (bare.count, bare.query_to_class.tolist()) == (3, [0, 1, 2])
    assert text_classes(None, None, like) is None
    for wrong in (torch.randn(3, 8), torch.randn(7), torch.randn(0, 7)):
        with pytest.raises(ValueError, match=r"text_embeddings have the shape .* must be \(queries, 7\)"):
            text_classes(None, wrong, like)


# Pyramid and decoder


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 3), (1, 7)])
def test_the_pyramid_has_four_sizes(grid):
    pyramid = ViTFeaturePyramid(12, 32)
    height, width = grid
    maps = pyramid([torch.randn(2, 12, *grid) for _ in range(4)])
    expected = [(4 * height, 4 * width), (2 * height, 2 * width), grid, (-(-height // 2), -(-width // 2))]
    assert [tuple(x.shape) for x in maps] == [(2, 32, *size) for size in expected]


def test_one_map_serves_all_levels():
    pyramid, single = ViTFeaturePyramid(12, 32).eval(), torch.randn(1, 12, 3, 3)
    for one, four in zip(pyramid([single]), pyramid([single] * 4), strict=True):
        assert torch.equal(one, four)
    with pytest.raises(ValueError, match="zip"):
        pyramid([single] * 3)


def test_the_coarse_level_takes_the_largest_of_two_by_two():
    """In a level without norms, the third position of a row of three is a block of its own."""
    pool = ViTFeaturePyramid(4, 4).levels[3][0]  # pyright: ignore[reportIndexIssue]
    assert pool(torch.tensor([[[1.0, 5.0, 2.0], [3.0, 4.0, -1.0]]])).tolist() == [[[5.0, 2.0]]]


def test_there_is_one_prediction_per_layer_and_one_before():
    config = config_of(decoder_layers=3)
    assert (config.decoder_layers, config.encoder_feedforward_dim, config.dim_feedforward) == (4, 24, 48)
    decoder: Any = MaskQueryDecoder(config, 12)
    assert len(decoder.transformer_module.decoder.layers) == 3
    found = decoder([torch.randn(2, 12, 3, 5)])
    assert [tuple(x.shape) for x in found.masks] == [(2, 5, 12, 20)] * 4
    assert [tuple(x.shape) for x in found.queries] == [(2, 5, 32)] * 4
    assert found.mask_features.shape == (2, 32, 12, 20)


def test_the_parts_are_initialised_as_in_mask2former():
    attention: Any = MaskQueryDecoder(config_of(), 12).pixel_decoder.encoder.layers[0].self_attn
    assert not attention.sampling_offsets.weight.any()
    # The first head of four looks to the right, its points 1 to 4 steps away, on each of three levels.
    offsets = attention.sampling_offsets.bias.view(4, 3, 4, 2)[0]
    steps = torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]).expand(3, 4, 2)
    torch.testing.assert_close(offsets.detach(), steps)


def test_the_semantic_map_is_a_weighted_sum_of_masks():
    classes = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]]).log()
    masks = torch.tensor([0.9, 0.4]).logit().view(1, 2, 1, 1)
    expected = [math.log(0.7 * 0.9 + 0.1 * 0.4), math.log(0.2 * 0.9 + 0.3 * 0.4)]
    torch.testing.assert_close(semantic_logits(classes, masks).flatten(), torch.tensor(expected))
    nothing = semantic_logits(torch.tensor([[[-500.0, -500.0, 500.0]]]), -500 * torch.ones(1, 1, 1, 1))
    assert torch.isfinite(nothing).all()
    assert bool((nothing > LOWEST_LOGIT).all())


# Targets


def test_one_mask_per_class_that_is_present():
    labels = torch.tensor([[[2, 2, IGNORED], [0, 2, IGNORED]], [[IGNORED] * 3] * 2])
    targets = semantic_targets(labels.to(torch.uint8), 2, 3, IGNORED)
    assert [ids.tolist() for ids in targets.classes] == [[0, 2], []]
    assert targets.masks[0].int().tolist() == [[[0, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 1, 0]]]
    assert targets.masks[1].shape == (0, 2, 3)
    assert targets.counted[0].int().tolist() == [[1, 1, 0], [1, 1, 0]]
    assert not targets.counted[1].any()


def test_wrong_labels_are_refused():
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Labels reach from 0 to 3. They must lie in \[0, 2\], .*ignore_index=255"):
        semantic_targets(labels + 3 * torch.eye(4).long(), 2, 3, IGNORED)
    with pytest.raises(ValueError, match="Labels reach from -1 to 0"):
        semantic_targets(labels - torch.eye(4).long(), 2, 3, IGNORED)
    for wrong in (labels[:1], labels[0], labels[:, None]):
        with pytest.raises(ValueError, match=r"must be \(batch_size, height, width\) with batch_size 2"):
            semantic_targets(wrong, 2, 3, IGNORED)


def test_instances_are_taken_as_they_are():
    masks = [torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.zeros(0, 1, 2)]
    targets = instance_targets(masks, [torch.tensor([4, 4]), torch.zeros(0, dtype=torch.long)], 2, 5)
    assert targets.masks[0].tolist() == [[[True, False]], [[False, True]]]
    assert all(bool(counted.all()) for counted in targets.counted)
    with pytest.raises(ValueError, match=r"Labels reach from 4 to 4. They must lie in \[0, 3\]"):
        instance_targets(masks[:1], [torch.tensor([4, 4])], 1, 4)
    for wrong in ((masks, [torch.tensor([4, 4])], 2), (masks[:1], [torch.tensor([4])], 1)):
        with pytest.raises(ValueError, match=r"must be \(masks, height, width\) and \(masks,\) for each"):
            instance_targets(*wrong, 5)


def test_pixels_are_drawn_from_those_that_count():
    counted = torch.zeros(4, 5, dtype=torch.bool)
    counted[1, 2:] = counted[3, 0] = True
    assert _draw_pixels(counted, 2, 4).tolist() == [[7, 8, 9, 15]] * 2  # all of them, once
    drawn = _draw_pixels(counted, 3, 2)
    assert drawn.shape == (3, 2)
    assert set(_draw_pixels(counted, 50, 3).flatten().tolist()) == {7, 8, 9, 15}


def test_samples_are_those_of_the_resized_map():
    masks = torch.randn(2, 3, 4, 5)
    size = torch.Size((9, 7))
    full = interpolate(masks, size=size, mode="bilinear", align_corners=False).flatten(2)
    pixels = torch.randint(63, (2, 20))
    expected = full.gather(2, pixels[:, None].expand(-1, 3, -1))
    torch.testing.assert_close(_sample(masks, pixels, size), expected)


# The loss


def layer_loss(masks, classes, targets, **options):
    """Return the three parts, without their weights."""
    loss = MaskQueriesLoss(config_of(**options), targets, classes.shape[-1] - 1)
    return loss(masks, classes, targets.masks, targets.classes)


def test_the_matcher_gives_the_obvious_assignment():
    labels = torch.tensor([[[0, 0, 1, 1], [2, 2, IGNORED, IGNORED]]])
    targets = semantic_targets(labels, 1, 3, IGNORED)
    masks = torch.full((1, 5, 2, 4), -6.0)
    masks[0, 3, 0, :2] = masks[0, 1, 0, 2:] = masks[0, 4, 1] = 6.0  # classes 0, 1, 2
    matcher = CountedPixelMatcher(config_of(), targets.counted)
    ((queries, found),) = matcher(masks, torch.zeros(1, 5, 4), targets.masks, targets.classes)
    assert dict(zip(queries.tolist(), found.tolist(), strict=True)) == {3: 0, 1: 1, 4: 2}


def test_equal_masks_are_matched_by_class():
    targets = instance_targets([torch.ones(2, 2, 2)], [torch.tensor([1, 0])], 1, 2)
    classes = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]])
    matcher = CountedPixelMatcher(config_of(), targets.counted)
    ((queries, found),) = matcher(torch.zeros(1, 2, 2, 2), classes, targets.masks, targets.classes)
    assert (queries.tolist(), found.tolist()) == ([0, 1], [1, 0])


def test_broken_predictions_are_matched_last():
    targets = instance_targets([torch.ones(1, 2, 2)], [torch.tensor([0])], 1, 1)
    masks = torch.tensor([math.nan, -9.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    matcher = CountedPixelMatcher(config_of(), targets.counted)
    ((queries, _),) = matcher(masks, torch.zeros(1, 2, 2), targets.masks, targets.classes)
    assert queries.tolist() == [1]


def test_the_loss_by_hand():
    """One image of 1 x 3 pixels, class 1 in the first, the last ignored; query 1 fits it best."""
    targets = semantic_targets(torch.tensor([[[1, 0, IGNORED]]]), 1, 2, IGNORED)
    masks = torch.tensor([[[[-2.0, 1.5, 9.0]], [[2.5, -0.5, 9.0]], [[-4.0, -4.0, 9.0]]]])
    classes = torch.tensor([[[0.3, -0.2, 0.1], [0.0, 0.7, -0.4], [0.5, 0.1, 0.9]]])
    parts = layer_loss(masks, classes, targets)
    bce = dice = 0.0
    for query, truth in ((0, (0, 1)), (1, (1, 0))):  # class 0 is found by query 0, class 1 by query 1
        values = masks[0, query, 0, :2].tolist()
        p = [sigmoid(value) for value in values]
        bce -= sum(math.log(a if t else 1 - a) for a, t in zip(p, truth, strict=True)) / 2
        overlap = sum(a * t for a, t in zip(p, truth, strict=True))
        dice += 1 - (2 * overlap + 1) / (sum(p) + sum(truth) + 1)
    assert float(parts["loss_mask"]) == pytest.approx(bce / 2, rel=1e-5)  # two masks
    assert float(parts["loss_dice"]) == pytest.approx(dice / 2, rel=1e-5)
    total = weight = 0.0
    for row, label, share in zip(classes[0].tolist(), (0, 1, 2), (1.0, 1.0, 0.1), strict=True):
        total += share * (math.log(sum(math.exp(x) for x in row)) - row[label])
        weight += share
    assert float(parts["loss_cross_entropy"]) == pytest.approx(total / weight, rel=1e-5)
    loss = MaskQueriesLoss(config_of(class_weight=3.0, mask_weight=4, dice_weight=5.5), targets, 2)
    expected = 3 * total / weight + 4 * bce / 2 + 5.5 * dice / 2
    # Two layers that say the same count twice.
    assert float(loss.total([masks, masks], [classes, classes])) == pytest.approx(2 * expected, rel=1e-5)


def test_ignored_pixels_do_not_count():
    labels = torch.randint(0, 3, (1, 6, 6))
    labels[:, 2:4] = IGNORED
    targets = semantic_targets(labels, 1, 3, IGNORED)
    masks, classes = torch.randn(1, 5, 6, 6, requires_grad=True), torch.randn(1, 5, 4)
    parts = layer_loss(masks, classes, targets)
    (parts["loss_mask"] + parts["loss_dice"]).backward()
    assert masks.grad is not None
    # Rows 1 and 4 touch the ignored ones; at equal resolution no interpolation mixes them.
    assert not masks.grad[:, :, 2:4].any()
    assert int(masks.grad.any(0).any(0).sum()) == 24
    changed = masks.detach().clone()
    changed[:, :, 2:4] = 50 * torch.randn(1, 5, 2, 6)
    again = layer_loss(changed, classes, targets)
    for name, value in parts.items():
        torch.testing.assert_close(again[name], value.detach())


def test_an_image_without_labels_does_not_count():
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[1] = IGNORED
    masks, classes = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    both = layer_loss(masks, classes, semantic_targets(labels, 2, 3, IGNORED))
    alone = layer_loss(masks[:1], classes[:1], semantic_targets(labels[:1], 1, 3, IGNORED))
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value)
    torch.stack(list(both.values())).sum().backward()
    for part in (masks, classes):
        assert part.grad is not None
        assert part.grad[0].any()
        assert not part.grad[1].any()


def test_without_any_label_there_is_no_loss():
    targets = semantic_targets(torch.full((2, 4, 4), IGNORED), 2, 3, IGNORED)
    masks, classes = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    total = MaskQueriesLoss(config_of(), targets, 3).total([masks], [classes])
    total.backward()
    assert float(total.detach()) == 0
    assert all(part.grad is not None and not part.grad.any() for part in (masks, classes))


def test_an_image_without_masks_teaches_no_object():
    targets = instance_targets([torch.zeros(0, 4, 4)], [torch.zeros(0, dtype=torch.long)], 1, 3)
    parts = layer_loss(torch.randn(1, 5, 4, 4), torch.zeros(1, 5, 4), targets)
    assert float(parts["loss_cross_entropy"]) == pytest.approx(math.log(4))
    assert float(parts["loss_mask"]) == float(parts["loss_dice"]) == 0


def test_more_masks_than_queries():
    targets = instance_targets([(torch.rand(7, 4, 4) > 0.5).float()], [torch.arange(7)], 1, 7)
    parts = layer_loss(torch.randn(1, 2, 4, 4), torch.randn(1, 2, 8), targets)
    assert all(bool(torch.isfinite(part)) for part in parts.values())


def test_many_pixels_are_sampled_where_masks_are_undecided():
    """Of 64 x 64 pixels 400 are drawn: three quarters of them the most undecided of 1200."""
    targets = semantic_targets(torch.zeros(1, 64, 64), 1, 1, IGNORED)
    loss = MaskQueriesLoss(config_of(train_num_points=400), targets, 1)
    masks = torch.linspace(0, 10, 64)[:, None].expand(1, 1, 64, 64)
    pixels = loss._uncertain_pixels(masks, targets.counted[0])
    assert pixels.shape == (1, 400)
    rows = pixels[0] // 64
    assert int(rows[:300].max()) < 20  # 300 of 1200 random ones lie in the upper quarter
    assert int(rows[300:].max()) > 40
    sampled = layer_loss(masks, torch.zeros(1, 1, 2), targets, train_num_points=400)
    assert all(bool(torch.isfinite(part)) for part in sampled.values())


def test_masks_are_counted_over_all_processes(monkeypatch):
    targets = instance_targets([torch.ones(3, 2, 2)], [torch.zeros(3, dtype=torch.long)], 1, 1)
    loss = MaskQueriesLoss(config_of(), targets, 1)
    assert float(loss.get_num_masks(targets.classes, torch.device("cpu"))) == 3
    monkeypatch.setattr(modeling_mask_queries.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(modeling_mask_queries.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(modeling_mask_queries.distributed, "all_reduce", lambda count: count.add_(8))
    assert float(loss.get_num_masks(targets.classes, torch.device("cpu"))) == 5.5  # (3 + 8) / 2
    with torch.no_grad():  # one process may evaluate alone
        assert float(loss.get_num_masks(targets.classes, torch.device("cpu"))) == 3


def test_targets_need_not_have_one_size():
    targets = instance_targets([torch.ones(1, 3, 5), torch.ones(1, 6, 2)], [torch.tensor([0])] * 2, 2, 1)
    assert isinstance(targets, MaskTargets)
    parts = layer_loss(torch.full((2, 1, 4, 4), 20.0), torch.zeros(2, 1, 2), targets)
    assert float(parts["loss_mask"]) == pytest.approx(0, abs=1e-6)
