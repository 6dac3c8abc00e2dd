"""Protocols: their knobs, what they refuse, and what they make of a model and of class names."""

import json
from typing import Any

import pytest

from hf_opentrans import DeepLabV3PlusForSegmentation, DenseCLIPForSegmentation, OpenVocabularyProcessor
from hf_opentrans.evaluation_protocols import PROTOCOLS, Protocol, find_protocol, knobs_of_text
from hf_opentrans.models.prompt_templates import PROMPT_TEMPLATES


@pytest.fixture
def parts(tiny_clip_folder) -> Any:
    return (
        DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder).eval(),
        OpenVocabularyProcessor.from_pretrained(tiny_clip_folder),
    )


def test_published_protocols():
    dense, trained, native = (PROTOCOLS[name].to_dict() for name in ("dense336", "detectron2", "native"))
    assert dense == {
        "name": "dense336",
        "resolution": 336,
        "longest_side": 2048,
        "inference": "slide",
        "window": 224,
        "stride": 112,
        "templates": "imagenet80",
        "logit_scale": 40.0,
        "alias_reduce": "max_prob",
        "background": None,
        "threshold": 0.1,
        "prefilter": None,
        "absent": "zero",
        "mode": None,
    }
    assert (trained["resolution"], trained["longest_side"], trained["inference"]) == (640, 2560, "whole")
    assert (trained["templates"], trained["alias_reduce"], trained["absent"]) == ("vild14", "max_logit", "ignore")
    assert {name for name, value in native.items() if value is not None} == {
        "name",
        "inference",
        "alias_reduce",
        "absent",
    }


def test_overrides_change_the_name():
    assert find_protocol("dense336") is PROTOCOLS["dense336"]
    assert find_protocol("dense336", stride=112).name == "dense336"
    changed = find_protocol("dense336", inference="whole", mode="sclip")
    assert (changed.name, changed.window, changed.stride, changed.mode) == ("dense336+", None, None, "sclip")
    own = find_protocol("native", templates=["a {}", "the {}"])
    assert Protocol(**json.loads(json.dumps(own.to_dict()))) == own
    assert "templates [2]" in own.describe()
    assert "resolution 336, longest_side 2048, inference slide, window 224" in PROTOCOLS["dense336"].describe()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dense", {}, "There is no protocol 'dense'. The protocols are native, dense336, detectron2"),
        ("native", {"size": 3}, "A protocol has no knob 'size'. Its knobs are resolution, longest_side"),
        ("native", {"name": "mine"}, "no knob 'name'"),
        ("native", {"inference": "tiles"}, "inference is 'tiles'. It must be one of whole, slide"),
        ("native", {"alias_reduce": "mean"}, "one of max_prob, max_logit, mean_embedding"),
        ("native", {"absent": "one"}, "absent is 'one'. It must be one of zero, ignore"),
        ("native", {"mode": "magic"}, "mode is 'magic'. It must be one of vanilla"),
        ("native", {"resolution": 0}, "resolution is 0. It must be above 0"),
        ("native", {"prefilter": -1}, "prefilter is -1. It must be above 0"),
        ("native", {"threshold": 1.5}, "threshold is 1.5. It is a probability"),
        ("native", {"window": 32}, "inference is 'whole', with window 32"),
        ("detectron2", {"longest_side": 320}, "longest_side is 320, below the resolution 640"),
        ("native", {"templates": "imagenet"}, "no prompt templates named 'imagenet'"),
    ],
)
def test_impossible_knobs_are_refused(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        find_protocol(name, **overrides)


def test_what_is_left_to_the_model_is_filled_in(parts):
    native = find_protocol("native").resolve(*parts)
    assert (native.resolution, native.templates, native.logit_scale) == (32, "photo", 40.0)
    assert (native.mode, native.window, native.stride) == (parts[0].config.segmentation_mode, None, None)
    slide = find_protocol("native", inference="slide").resolve(*parts)
    assert (slide.resolution, slide.window, slide.stride) == (48, 32, 16)
    assert find_protocol("native", inference="slide", window=16).resolve(*parts).stride == 8
    dense = PROTOCOLS["dense336"].resolve(*parts)
    assert dense.to_dict() | {"mode": None} == PROTOCOLS["dense336"].to_dict()


def test_trained_segmenters_have_no_windows(parts):
    dense, processor = parts
    trained = DeepLabV3PlusForSegmentation.from_clip(dense, decoder_channels=8).eval()
    resolved = PROTOCOLS["detectron2"].resolve(trained, processor)
    assert (resolved.logit_scale, resolved.mode) == (None, dense.config.segmentation_mode)
    for name, overrides, asked in (
        ("dense336", {}, "inference='slide', logit_scale=40.0, and the model is a DeepLabV3Plus"),
        ("native", {"mode": "sclip"}, "sets mode='sclip'"),
        ("native", {"logit_scale": 10.0}, "sets logit_scale=10.0"),
    ):
        with pytest.raises(ValueError, match=asked):
            find_protocol(name, **overrides).resolve(trained, processor)


def test_names_of_a_protocol():
    names = ["background; sky; hill", "cat; kitten", "sky lamp; lamp"]
    protocol = find_protocol("dense336")
    assert protocol.vocabulary(names).queries == ("sky", "hill", "cat", "kitten", "sky lamp", "lamp")
    assert protocol.vocabulary(names).templates == PROMPT_TEMPLATES["imagenet80"]
    literal = find_protocol("dense336", background="background").vocabulary(names)
    assert literal.classes[0] == ("background",)
    assert find_protocol("dense336", background="hill").vocabulary([*names[1:], names[0]]).queries[-1] == "hill"
    words = find_protocol("dense336", background="words26").vocabulary(names)
    assert words.names == literal.names == ("background", "cat", "sky lamp")
    assert len(words.queries) == 25 + 4  # the lamp is a class
    assert find_protocol("dense336", background="words26").vocabulary(["cat", "dog"]).queries == ("cat", "dog")
    merged = find_protocol("dense336", alias_reduce="mean_embedding").vocabulary(names)
    assert (merged.is_merged, merged.queries) == (True, ("background", "cat", "sky lamp"))
    with pytest.raises(ValueError, match="leaves the templates to the model"):
        find_protocol("native").vocabulary(names)


def test_knobs_as_they_are_typed():
    typed = ["stride = 56", "threshold=0.3", "window=none", "templates=imagenet80", "background=sky; wall"]
    expected = {"stride": 56, "threshold": 0.3, "window": None, "templates": "imagenet80", "background": "sky; wall"}
    assert knobs_of_text(typed) == expected
    assert find_protocol("dense336", **knobs_of_text(["stride=56"])).stride == 56
    for wrong, message in (
        (["stride"], "Got 'stride'"),
        (["=3"], "KNOB=VALUE"),
        (["stride=5.5"], "stride is '5.5'. It must be a whole number"),
        (["threshold=high"], "It must be a number"),
        (["stride=1", "stride=2"], "set twice"),
    ):
        with pytest.raises(ValueError, match=message):
            knobs_of_text(wrong)
    with pytest.raises(ValueError, match="has no knob 'strides'"):
        find_protocol("dense336", **knobs_of_text(["strides=3"]))
