"""The best setting that is fast enough: what is timed, what is chosen, what is refused."""

import json
from itertools import product

import pytest
import torch

from hf_opentrans import OpenVocabularyProcessor, segment
from hf_opentrans.deploy import autotune as module
from hf_opentrans.deploy.autotune import TunedSettings, autotune, load_elastic
from hf_opentrans.models.modeling_elastic_clip import ElasticCLIPForSegmentation
from hf_opentrans.pruning.elastic import make_elastic
from hf_opentrans.pruning.elastic_order import cut_model

WIDTHS = [[4, 8, 8, 64], [3, 8, 8, 40], [2, 8, 8, 16]]
BUDGETS, COSINES = (0.9, 0.6, 0.3), (0.99, 0.97, 0.8)
# Of the stand-in for the clock: a budget's milliseconds per pixel of the short side; windows take twice as long.
SPEED = {0.9: 3.0, 0.6: 2.0, 0.3: 1.0}


@pytest.fixture
def elastic(parts):
    """Return an elastic segmenter of 32 pixels in patches of 8, and its processor."""
    depth = parts[0].config.vision_config.num_hidden_layers
    layers = [[widths] * depth for widths in WIDTHS]
    model = make_elastic([cut_model(parts[0], each) for each in layers], BUDGETS, layers)
    for entry, cosine in zip(model.config.elastic_budgets, COSINES, strict=True):
        entry["cosine_patches"] = cosine
    return model, parts[1]


@pytest.fixture
def clock(monkeypatch):
    """Count passes and give each a time of its own, whatever the machine does."""
    passes = []

    def watch(model, batch, inference):
        return lambda: (model.budget, batch.shape[-2:], inference, model(batch, inference=inference))

    def take(run, device):
        budget, (height, width), inference, _ = run()
        passes.append((budget, min(height, width), inference, (height, width)))
        return SPEED[budget] * min(height, width) * (2 if inference == "slide" else 1) + len(passes) % 3 * 0.01

    monkeypatch.setattr(module, "_pass", watch)
    monkeypatch.setattr(module, "milliseconds", take)
    return passes


def test_every_setting_is_timed_in_turn(elastic, clock):
    model, processor = elastic
    model.set_budget(0.6).train()
    found = autotune(model, processor, max_latency_ms=1e6, repeats=3)
    assert model.training
    assert model.budget == 0.6
    whole = [(budget, 32, "whole") for budget in BUDGETS]
    both = list(product(BUDGETS, [48], ["whole", "slide"]))
    settings = sorted([*whole, *both], reverse=True)  # at 32 pixels one window is the image
    assert sorted({entry[:3] for entry in clock}, reverse=True) == settings
    rounds = [clock[i : i + len(settings)] for i in range(0, len(clock), len(settings))]
    assert len(rounds) == 4  # one warms up
    assert all(len({entry[:3] for entry in turn}) == len(settings) for turn in rounds)
    assert {candidate.runs for candidate in found.candidates} == {3}
    times = [candidate.milliseconds for candidate in found.candidates]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("limit", "order", "expected"),
    [
        (1e6, None, (0.9, 48, "slide")),
        (150, None, (0.9, 48, "whole")),
        (100, None, (0.9, 32, "whole")),
        (100.5, ["resolution", "budget", "inference"], (0.6, 48, "whole")),
        (100, ["inference", "budget", "resolution"], (0.3, 48, "slide")),
        (40, None, (0.3, 32, "whole")),
    ],
)
def test_the_best_setting_within_the_limit_is_chosen(elastic, clock, limit, order, expected):
    model, processor = elastic
    options = {} if order is None else {"order": order}
    found = autotune(model, processor, max_latency_ms=limit, repeats=1, **options)
    assert (found.budget, found.resolution, found.inference) == expected
    assert found.fidelity == COSINES[BUDGETS.index(found.budget)]
    assert found.milliseconds <= limit
    assert all(candidate.fits == (candidate.milliseconds <= limit) for candidate in found.candidates)


def test_hopeless_settings_are_timed_once(elastic, clock):
    found = autotune(*elastic, max_latency_ms=34, repeats=4, resolutions=[32, 96], inferences=["whole"])
    runs = {(c.budget, c.resolution): c.runs for c in found.candidates}
    assert runs == {(0.9, 32): 4, (0.6, 32): 4, (0.3, 32): 4, (0.9, 96): 1, (0.6, 96): 1, (0.3, 96): 4}


def test_fidelity_and_not_the_size_of_the_budget_decides(elastic, clock):
    model, processor = elastic
    model.config.elastic_budgets[1]["cosine_patches"] = 0.995
    assert autotune(model, processor, max_latency_ms=1e6, repeats=1).budget == 0.6
    for entry in model.config.elastic_budgets:
        del entry["cosine_patches"]
    found = autotune(model, processor, max_latency_ms=1e6, repeats=1)
    assert (found.budget, found.fidelity) == (0.9, None)


def test_the_shapes_of_the_images_are_timed(elastic, clock, tiny_images):
    model, processor = elastic
    autotune(model, processor, tiny_images, max_latency_ms=1e6, resolutions=[40], inferences=["slide"], repeats=1)
    assert {entry[3] for entry in clock} == {(40, 48)}
    assert len(clock) == 2 * len(BUDGETS) * 4


def test_a_folder_is_tuned_for_real_and_the_settings_segment(tmp_path, elastic, tiny_images):
    model, processor = elastic
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    found = autotune(tmp_path / "model", max_latency_ms=1e6, resolutions=[32], repeats=2)
    assert (found.budget, found.resolution, found.inference) == (0.9, 32, "whole")
    assert all(candidate.milliseconds > 0 for candidate in found.candidates)
    assert found.device["threads"] == torch.get_num_threads()
    found.save(tmp_path / "tuned.json")
    assert json.loads((tmp_path / "tuned.json").read_text())["candidates"][0]["runs"] == 2
    loaded, reader = load_elastic(tmp_path / "model")
    assert (type(loaded), type(reader)) == (ElasticCLIPForSegmentation, OpenVocabularyProcessor)
    small = TunedSettings(0.3, 48, "slide", 0.8, 1.0, 2.0, module.ORDER, {}, ())
    options = small.apply(loaded)
    assert loaded.budget == 0.3
    masks = segment(loaded, reader, tiny_images[0], ["cat", "dog"], **options)
    expected = segment(
        model.set_budget(0.3), processor, tiny_images[0], ["cat", "dog"], resolution=48, inference="slide"
    )
    assert torch.equal(masks[0].segmentation, expected[0].segmentation)


def test_mistakes_are_named(tmp_path, elastic, parts, clock):
    model, processor = elastic
    with pytest.raises(
        ValueError, match=r"No setting takes 1 ms or less .* budget=0\.3 at 32 pixels, whole, with 32\.0"
    ):
        autotune(model, processor, max_latency_ms=1, repeats=1)
    with pytest.raises(TypeError, match="DenseCLIPForSegmentation without budgets"):
        autotune(parts[0], processor, max_latency_ms=1)
    with pytest.raises(TypeError, match="The processor is a NoneType"):
        autotune(model, max_latency_ms=1)
    for options, message in (
        ({"max_latency_ms": 0}, "max_latency_ms is 0. It must be a positive number"),
        ({"resolutions": [4]}, r"resolutions is \[4\]. It must be 8 pixels or more"),
        ({"inferences": ["all"]}, r"inferences is \['all'\]. It must be some of whole, slide"),
        ({"inferences": []}, r"inferences is \[\]"),
        ({"order": ["budget"]}, r"order is \['budget'\]. It must name budget, resolution and inference"),
        ({"repeats": 0}, "repeats is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            autotune(model, processor, **{"max_latency_ms": 9.0, **options})
    parts[0].save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'sparse_clip'"):
        autotune(tmp_path, max_latency_ms=1)
