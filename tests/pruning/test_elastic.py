"""Nested budgets from one run: prefixes of one tower, as good as budgets alone, honest figures, clear errors."""

import hashlib
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

from hf_opentrans import PruningConfig, PruningPlan, apply_masks, prune_model
from hf_opentrans.models.modeling_elastic_clip import (
    ElasticCLIPForSegmentation,
    ElasticCLIPModel,
    ElasticCLIPVisionModel,
    ElasticCLIPVisionModelWithProjection,
)
from hf_opentrans.pruning import LayerPlan
from hf_opentrans.pruning import elastic as elastic_module
from hf_opentrans.pruning.allocation import Budget, allocate
from hf_opentrans.pruning.elastic import prune_elastic
from hf_opentrans.pruning.elastic_order import NestedSizes, cut_model, nest, order_tower
from hf_opentrans.pruning.elastic_report import ElasticReport
from hf_opentrans.pruning.macs import TowerCost, count_macs, count_params, layer_widths
from hf_opentrans.pruning.sizes import Menu, Size
from hf_opentrans.pruning.surgery import to_sparse
from hf_opentrans.pruning.tower import Tower

BUDGETS = (0.8, 0.6, 0.4)
DONE: dict[Any, Any] = {}


def make_images(count=40, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, size=(count, 5, 6, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((48, 40), Image.Resampling.BICUBIC) for picture in coarse]


IMAGES, UNSEEN = make_images(), make_images(12, seed=1)


@pytest.fixture
def result(make_tiny_clip):
    """Return three budgets of the tiny CLIP; made once."""
    if "three" not in DONE:
        DONE["three"] = prune_elastic(make_tiny_clip(), IMAGES, BUDGETS, held_out_images=UNSEEN)
    DONE["three"].model.set_budget(0.8)
    return DONE["three"]


def tokens(model, seed=2):
    """Return unit tokens of new images."""
    arrays = np.stack([np.asarray(image.resize((32, 32))) for image in make_images(8, seed=seed)])
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 64 - 2
    with torch.no_grad():
        return Tower.of(model).tokens(pixels)


def cosines(model, dense):
    return float((tokens(model) * tokens(to_sparse(dense))).sum(-1).mean())


def test_every_budget_is_a_prefix_of_the_next_larger_one(result, make_tiny_clip):
    model = result.model
    assert (model.budgets, model.budget) == (BUDGETS, 0.8)
    dense = layer_widths(make_tiny_clip().config.vision_config)
    previous = [[w.heads, w.qk_head_dim, w.v_head_dim, w.neurons] for w in dense]
    for entry, figures in zip(model.config.elastic_budgets, result.report.budgets, strict=True):
        for wide, narrow in zip(previous, entry["layers"], strict=True):
            assert all(n <= w for w, n in zip(wide, narrow, strict=True))
        previous = entry["layers"]
        vision = model.set_budget(entry["budget"]).config.vision_config
        assert figures.macs == entry["macs"] == count_macs(vision)
        assert figures.params == count_params(vision) == figures.bytes_alone // 4
        assert entry["budget"] - 0.02 <= figures.realised_keep <= entry["budget"] + 1e-6
        assert figures.macs / result.report.dense_macs == pytest.approx(figures.realised_keep)
    assert model.config.elastic_budgets[2]["layers"] != model.config.elastic_budgets[0]["layers"]


@pytest.mark.parametrize("structures", [("heads",), ("mlp", "heads", "ranks")])
def test_one_budget_is_what_prune_model_gives(make_tiny_clip, structures):
    clip = make_tiny_clip()
    keep = 0.7 if "mlp" in structures else 0.85
    config = PruningConfig(keep=keep, structures=structures)
    one = prune_elastic(clip, IMAGES, [keep], config, held_out_images=UNSEEN)
    single = prune_model(clip, IMAGES, config)
    small: Any = one.model.config
    assert layer_widths(small.vision_config) == layer_widths(cast("Any", single.model.config).vision_config)
    torch.testing.assert_close(tokens(one.model), tokens(single.model), atol=2e-5, rtol=0)


def test_budgets_are_about_as_good_as_alone(result, make_tiny_clip):
    clip = make_tiny_clip()
    for budget, allowed in ((0.6, 0.01), (0.4, 0.03)):
        single = prune_model(clip, IMAGES, PruningConfig(keep=budget))
        assert cosines(result.model.set_budget(budget), clip) > cosines(single.model, clip) - allowed


def test_the_ordered_tower_computes_what_the_dense_one_does(make_tiny_clip, monkeypatch):
    seen = {}

    def keep(dense, nested, attention):
        seen["dense"], seen["nested"], seen["ordered"] = dense, nested, order_tower(dense, nested, attention)
        return seen["ordered"]

    monkeypatch.setattr(elastic_module, "order_tower", keep)
    prune_elastic(make_tiny_clip(), IMAGES, BUDGETS, held_out_images=UNSEEN)
    torch.testing.assert_close(tokens(seen["ordered"]), tokens(seen["dense"]), atol=2e-6, rtol=0)
    names = [name for name, value in seen["dense"].state_dict().items() if "fc1.weight" in name or "q_proj" in name]
    before, after = seen["dense"].state_dict(), seen["ordered"].state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in names)
    layers = seen["nested"].layers(Tower.of(seen["dense"]))
    small = Tower.of(cut_model(seen["ordered"], layers[2])).layers[0]
    menu = next(menu for menu in seen["nested"].menus if (menu.layer, menu.kind) == (0, "neurons"))
    kept = list(menu.order[::-1][: layers[2][0][3]])
    assert torch.equal(small.mlp.fc1.weight, Tower.of(seen["dense"]).layers[0].mlp.fc1.weight[kept])
    assert sorted(kept) == list(menu.kept(Size(0.0, len(kept))))


class _PerNeuron:
    """A cost model that counts neurons."""

    def fixed(self):
        return 0.0

    def attention(self, heads, qk_head_dim, v_head_dim):
        return 0.0

    def mlp(self, neurons):
        return float(neurons)


def test_sizes_never_grow_where_a_smaller_budget_would_like_to():
    rng, grown = np.random.default_rng(0), 0
    budgets = [Budget("neurons", _PerNeuron(), 192.0, keep, 0.1, "none") for keep in (0.8, 0.6, 0.3)]
    for _ in range(60):  # errors that fall in steps of any height
        menus = []
        for layer in range(3):
            errors = np.cumsum(rng.exponential(size=16) ** 3).tolist()
            sizes = [Size(0.0, 64), *(Size(error, 64 - 4 * (i + 1)) for i, error in enumerate(errors))]
            menus.append(Menu(layer, "neurons", tuple(range(64)), tuple(sizes)))
        nested = nest(menus, budgets)
        for budget, sizes in zip(budgets, nested.sizes, strict=True):
            assert budget.keep - 0.02 <= budget.share(menus, sizes) <= budget.keep + 1e-6
        for wide, narrow in pairwise(nested.sizes):
            assert all(small.units <= large.units for small, large in zip(narrow, wide, strict=True))
        assert nested.sizes[0] == tuple(allocate(menus, budgets[0]))
        alone = [allocate(menus, budget) for budget in budgets]
        grown += any(s.units > w.units for a, b in pairwise(alone) for w, s in zip(a, b, strict=True))
    assert grown > 5  # so there is something to prevent


def test_heads_that_are_gone_stay_gone_with_any_width(make_tiny_clip):
    menu = Menu(0, "heads", (0, 1, 2, 3), (Size(0.0, 4, 8, 8), Size(1.0, 2, 4, 6), Size(2.0, 0, 8, 8)))
    nested = NestedSizes((menu,), ((menu.sizes[1],), (menu.sizes[2],)))
    layers = nested.layers(Tower.of(to_sparse(make_tiny_clip())))
    assert [widths[0] for widths in layers] == [[2, 4, 6, 64], [0, 4, 6, 64]]


def test_fidelity_is_of_images_that_nothing_was_fitted_on(result, make_tiny_clip, monkeypatch):
    dense = to_sparse(make_tiny_clip())
    assert result.report.held_out_images == len(UNSEEN)
    pixels = torch.stack(elastic_module.prepare_images(UNSEEN, range(len(UNSEEN)), 32))
    with torch.no_grad():
        expected = Tower.of(dense).tokens(pixels)
        for figures in result.report.budgets:
            found = (Tower.of(result.model.set_budget(figures.budget)).tokens(pixels) * expected).sum(-1)
            assert figures.cosine_class == pytest.approx(float(found[:, 0].mean()), abs=1e-5)
            assert figures.cosine_patches == pytest.approx(float(found[:, 1:].mean()), abs=1e-5)
    values = [figures.cosine_patches for figures in result.report.budgets]
    assert values == sorted(values, reverse=True)
    seen = {}
    load = elastic_module.load_calibration

    def calibrate(images, *rest):
        seen["fit"] = {id(image) for image in images}
        return load(images, *rest)

    def prepare(images, *rest):
        seen["unseen"] = {id(image) for image in images}
        return prepare_images(images, *rest)

    prepare_images = elastic_module.prepare_images
    monkeypatch.setattr(elastic_module, "load_calibration", calibrate)
    monkeypatch.setattr(elastic_module, "prepare_images", prepare)
    report = prune_elastic(make_tiny_clip(), make_images(45), [0.6]).report
    assert (len(seen["fit"]), len(seen["unseen"]), report.held_out_images) == (40, 5, 5)
    assert not seen["fit"] & seen["unseen"]


def test_sizes_in_the_report_are_those_of_the_file(tmp_path, result, tiny_image_processor):
    for name, dtype in (("single", None), ("half", torch.float16)):
        result.save_pretrained(tmp_path / name, tiny_image_processor, disk_dtype=dtype)
        tensors = load_file(tmp_path / name / "model.safetensors")
        report = ElasticReport.load(tmp_path / name)
        tower = [k for k in tensors if k.startswith(("vision_model.", "visual_projection."))]
        assert report.budgets[0].bytes_alone == sum(tensors[k].nbytes for k in tower)
        for index, figures in enumerate(report.budgets):
            added = [value.nbytes for k, value in tensors.items() if k.startswith(f"elastic.{index}.")]
            assert figures.bytes_added == sum(added)
        added = sum(figures.bytes_added for figures in report.budgets)
        assert report.size_ratio == pytest.approx(1 + added / report.budgets[0].bytes_alone)
        assert 1 < report.size_ratio < 1.5
        model = ElasticCLIPModel.from_pretrained(tmp_path / name)
        assert model.dtype == torch.float32
        result.model.set_budget(0.4)
        expected = tokens(result.model)
        torch.testing.assert_close(
            tokens(model.set_budget(0.4)), expected, atol=1e-6 if dtype is None else 1e-2, rtol=0
        )
        result.model.set_budget(0.8)
    assert (tmp_path / "half" / "preprocessor_config.json").exists()
    assert replace(report, seconds={}) == replace(result.report.in_precision(torch.float16), seconds={})
    with pytest.raises(FileExistsError, match="already holds"):
        result.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["vision", "projection", "segmenter"])
def test_every_kind_of_model(make_tiny_clip, kind):
    clip = make_tiny_clip()
    if kind == "segmenter":
        sparse: Any = to_sparse(clip)
        model = ElasticCLIPForSegmentation.plain_class(sparse.config)
        model.load_state_dict(sparse.state_dict())
        expected = ElasticCLIPForSegmentation
    else:
        model = (CLIPVisionModel if kind == "vision" else CLIPVisionModelWithProjection)(clip.config.vision_config)
        vision = model if kind == "vision" else model.vision_model
        cast("Any", vision).load_state_dict(clip.vision_model.state_dict())
        expected = ElasticCLIPVisionModel if kind == "vision" else ElasticCLIPVisionModelWithProjection
    before = _fingerprint(model.half().eval())
    done = prune_elastic(model, IMAGES, (0.5, 1.0), held_out_images=UNSEEN)
    assert type(done.model) is expected
    assert done.model.budgets == (1.0, 0.5)
    assert cast("Any", done.model).dtype == torch.float16
    assert done.report.budgets[0].cosine_patches > 0.9999
    assert done.report.budgets[0].macs == TowerCost.of(
        Tower.of(cast("Any", done.model)).vision.config, projection=kind != "vision"
    ).total("macs", layer_widths(clip.config.vision_config))
    assert done.report.budgets[1].cosine_patches > 0.97
    assert _fingerprint(model) == before


def _fingerprint(model):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def test_the_same_seed_gives_the_same_budgets_and_leaves_the_model_alone(result, make_tiny_clip):
    clip = make_tiny_clip()
    before = _fingerprint(clip)
    again = prune_elastic(clip, IMAGES, BUDGETS[::-1], held_out_images=UNSEEN).model
    assert _fingerprint(clip) == before
    for budget in BUDGETS:
        first, second = (cast("Any", m).set_budget(budget).state_dict() for m in (result.model, again))
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_mistakes_are_named(make_tiny_clip):
    clip = make_tiny_clip()
    for budgets in ((), (0.6, 0.6), (0.5, 1.2), (0.0,)):
        with pytest.raises(ValueError, match="They must be shares in"):
            prune_elastic(clip, IMAGES, budgets)
    with pytest.raises(ValueError, match="Nested budgets need the orders of 'obs' and no search"):
        prune_elastic(clip, IMAGES, config=PruningConfig(method="magnitude"))
    with pytest.raises(ValueError, match=r"keep=0\.01 of the macs is below what the floors allow"):
        prune_elastic(clip, IMAGES, (0.6, 0.01))
    with pytest.raises(ValueError, match="There is 1 image"):
        prune_elastic(clip, IMAGES[:1])
    plan = PruningPlan((LayerPlan((0, 1), tuple(range(64))), *[LayerPlan(tuple(range(4)), tuple(range(64)))] * 2))
    with pytest.raises(ValueError, match="Layer 0 has masked heads or neurons"):
        prune_elastic(apply_masks(clip, plan), IMAGES)
    with pytest.raises(TypeError, match="needs a CLIP vision tower"):
        prune_elastic(cast("Any", clip.text_model), IMAGES)


def test_a_damaged_report_is_refused(tmp_path, result):
    with pytest.raises(FileNotFoundError, match=r"There is no elastic_report\.json"):
        ElasticReport.load(tmp_path)
    result.report.save(tmp_path)
    assert ElasticReport.load(tmp_path) == replace(result.report)
    (tmp_path / "elastic_report.json").write_text('{"budgets": [{}]}')
    with pytest.raises(ValueError, match="is no report of `prune_elastic`"):
        ElasticReport.load(tmp_path)
