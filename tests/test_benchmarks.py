"""Paired latencies with a fake clock, and the comparison of methods. Nothing here depends on real time."""

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig

from hf_opentrans import DenseCLIPForSegmentation, OpenVocabularyProcessor, PruningConfig, benchmarks
from hf_opentrans.benchmarks import BenchmarkData, compare_methods, environment, paired_latency, tower_bytes
from hf_opentrans.pruning.macs import count_macs, count_params

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


class Clock:
    """Time that passes only when a model runs."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(benchmarks, "_now", lambda _device: self.now)

    def model(self, name, seconds, neurons=64):
        return _Timed(self, name, iter(seconds), CLIPVisionConfig(intermediate_size=neurons, **SMALL))


class _Timed:
    device = torch.device("cpu")

    def __init__(self, clock, name, seconds, config):
        self.clock, self.name, self.seconds, self.config = clock, name, seconds, config

    def __call__(self, pixels, interpolate_pos_encoding):
        assert interpolate_pos_encoding
        self.clock.calls.append((self.name, tuple(pixels.shape)))
        self.clock.now += next(self.seconds)


def test_models_are_timed_in_turn(monkeypatch):
    clock = Clock(monkeypatch)
    models: dict[str, Any] = {name: clock.model(name, [1.0] * 5) for name in "abc"}
    paired_latency(models, batch_size=2, resolution=48, rounds=3, warmup=2)
    assert [name for name, _ in clock.calls] == list("abc") * 5
    assert {shape for _, shape in clock.calls} == {(2, 3, 48, 48)}


def test_speed_up_is_the_median_of_paired_ratios(monkeypatch):
    clock = Clock(monkeypatch)
    # The warm-up round is slow, and the machine grows slower: only the ratios of a round mean something.
    dense = clock.model("dense", [50.0, 4.0, 8.0, 20.0])
    small = clock.model("small", [99.0, 2.0, 2.0, 8.0], neurons=0)
    first, second = paired_latency({"dense": dense, "small": small}, rounds=3, warmup=1)
    assert (first.speed_up, first.speed_up_range, first.mac_ratio, first.efficiency) == (1.0, (1.0, 1.0), 1.0, 1.0)
    assert first.median_ms == pytest.approx(8000)
    assert second.median_ms == pytest.approx(2000)
    assert second.speed_up == pytest.approx(2.5)  # of 2, 4, 2.5
    assert second.speed_up_range == pytest.approx((2.0, 4.0))
    macs = [count_macs(model.config, projection=False) for model in (dense, small)]
    assert second.mac_ratio == pytest.approx(macs[0] / macs[1])
    assert second.efficiency == pytest.approx(2.5 * macs[1] / macs[0])
    row = second.to_dict()
    assert (row["model"], row["batch_size"], row["resolution"], row["rounds"]) == ("small", 1, 32, 3)
    assert row["threads"] == torch.get_num_threads()


@pytest.fixture
def segmenter(tiny_clip_folder):
    return DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder).eval()


def test_methods_are_compared_on_the_same_data(segmenter, tiny_images, tiny_image_processor, tiny_tokenizer):
    masks = [torch.zeros(40, 48, dtype=torch.long), torch.ones(40, 48, dtype=torch.long)]
    data = BenchmarkData(
        calibration=tiny_images * 5,
        fidelity_images=tiny_images[:4],
        segmentation=list(zip(tiny_images, masks, strict=False)),
        segmentation_names=["cat", "sky"],
        classification=tiny_images[:4],
        classification_targets=[0, 1, 0, 1],
        classification_names=["cat", "sky"],
        segmentation_options={"mode": "vanilla"},
    )
    configs = [PruningConfig(keep=0.6, method=method) for method in ("obs", "random")]
    seen = []
    processor = OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)
    compared = compare_methods(segmenter, processor, data, configs, on_row=seen.append)
    rows = [entry.row for entry in compared]
    assert seen == rows
    assert [(row.method, row.keep) for row in rows] == [("dense", 1.0), ("obs", 0.6), ("random", 0.6)]
    dense, ours, random = rows
    assert compared[0].model is segmenter
    assert dense.class_token_cosine == pytest.approx(1, abs=1e-6)
    assert dense.seconds is None
    assert (ours.class_token_cosine or 0) > (random.class_token_cosine or 0)
    for entry in compared:
        vision: Any = entry.model.config.vision_config
        assert (entry.row.macs, entry.row.params) == (count_macs(vision), count_params(vision))
        assert entry.row.bytes == tower_bytes(entry.model)
        assert 0 <= (entry.row.top1 or 0) <= 1
        assert entry.row.pixel_accuracy is not None
        assert entry.row.mean_iou is not None
    assert ours.bytes < dense.bytes
    assert compared[1].result is not None
    assert ours.seconds == compared[1].result.report.seconds["total"]
    assert ours.to_dict()["method"] == "obs"


def test_parts_without_data_are_not_measured(segmenter, tiny_images, tiny_image_processor, tiny_tokenizer):
    processor = OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)
    (only,) = compare_methods(segmenter, processor, BenchmarkData(calibration=tiny_images), [])
    measured = only.row.to_dict()
    assert all(measured[name] is None for name in ("class_token_cosine", "top1", "mean_iou", "pixel_accuracy"))


def test_bytes_are_those_of_the_tower_on_disk(segmenter):
    tensors = segmenter.vision_model.state_dict().values()
    content = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert content < tower_bytes(segmenter) < content + 16_000


def test_environment_states_versions_and_threads():
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) >= {"python", "hf_opentrans", "transformers", "numpy"}
    assert found["threads"] == torch.get_num_threads()
    assert found["processor"]
