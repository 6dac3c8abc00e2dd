"""Scoring data sets: against brute force, under every knob, interrupted, and in two processes."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_opentrans import DeepLabV3PlusForSegmentation, DenseCLIPForSegmentation, OpenVocabularyProcessor
from hf_opentrans import _distributed as distributed
from hf_opentrans import evaluation_runs as runs
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation_protocols import find_protocol
from hf_opentrans.evaluation_runs import (
    EvaluationResult,
    ProtocolSegmenter,
    data_fingerprint,
    evaluate_data,
    forget_state,
    model_fingerprint,
)

CLASSES = {"id_to_name": {"0": "background", "1": "cat; kitten", "2": "dog", "3": "sky"}, "ignore_id": 255}
NATIVE = find_protocol("native")
SMALL_SLIDE = find_protocol("dense336", resolution=64, window=32, stride=16, templates="photo", threshold=None)


def random_mask(image, index):
    rng = np.random.default_rng(index)
    mask = rng.integers(0, 3, (image.height, image.width), dtype=np.uint8)  # no sky
    mask[:5] = 255
    return mask


@pytest.fixture
def parts(tiny_clip_folder) -> Any:
    return (
        DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder).eval(),
        OpenVocabularyProcessor.from_pretrained(tiny_clip_folder),
    )


@pytest.fixture
def data(write_segmentation_folder, tiny_images):
    images = [image.resize((48 + 4 * i, 40)) for i, image in enumerate(tiny_images[:7])]
    return SegmentationFolder(write_segmentation_folder({"val": images}, random_mask, CLASSES))


def scored(parts, data, protocol, **options):
    model, processor = parts
    return evaluate_data(model, processor, data, protocol, **options)


def brute_force(parts, data, protocol, count, options=None):
    """Return the confusion matrix: whole model calls, interpolation of everything, argmax."""
    model, processor = parts
    vocabulary = model.encode_vocabulary(
        protocol.resolve(model, processor).vocabulary(data.class_names), processor.tokenizer
    )
    counts = np.zeros((4, 4), np.int64)
    for index in range(count):
        sample = data[index]
        with Image.open(sample.image_path) as image:
            pixels = processor(image, resolution=protocol.resolution, size_divisor=8)["pixel_values"]
        with torch.no_grad():
            logits = model(pixels, vocabulary=vocabulary, **(options or {})).logits
        wide = torch.nn.functional.interpolate(logits, sample.mask.shape, mode="bilinear")[0]
        ids = vocabulary.query_to_class[wide.argmax(0)].numpy()
        for truth, found in zip(sample.mask.flatten(), ids.flatten(), strict=True):
            if truth >= 0:
                counts[truth, found] += 1
    return counts


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        (NATIVE, {}),
        (SMALL_SLIDE, {"inference": "slide", "window_size": 32, "window_stride": 16}),
        (replace(NATIVE, alias_reduce="mean_embedding", mode="sclip"), {"mode": "sclip"}),
    ],
)
def test_scores_equal_brute_force(parts, data, protocol, options):
    calls = []
    result = scored(parts, data, protocol, limit=3, on_image=lambda: calls.append(1))
    counts = brute_force(parts, data, protocol, 3, options)
    hits, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    assert calls == [1] * 3
    assert result.images == 3
    assert result.scores.target_pixels == tuple(counts.sum(1))
    assert result.scores.pixel_accuracy == pytest.approx(hits.sum() / counts.sum(), abs=1e-3)
    assert result.scores.mean_iou == pytest.approx(float(np.nanmean(hits / np.where(union, union, np.nan))), abs=1e-3)


def test_every_knob_reaches_the_model(parts, data, monkeypatch):
    model, processor = parts
    seen = []
    forward = type(model).forward

    def spy(self, pixel_values, **options):
        seen.append({"shape": tuple(pixel_values.shape), **options})
        return forward(self, pixel_values, **options)

    monkeypatch.setattr(type(model), "forward", spy)
    protocol = replace(SMALL_SLIDE, stride=8, mode="clearclip", templates="vild14", longest_side=72)
    evaluate_data(model, processor, data, protocol, limit=1)
    (call,) = seen
    assert call["shape"] == (1, 3, 64, 72)  # 40 x 48 would be 64 x 77
    assert (call["inference"], call["mode"]) == ("slide", "clearclip")
    assert (call["window_size"], call["window_stride"]) == (32, 8)
    assert len(call["vocabulary"].templates) == 14
    assert call["vocabulary"].queries == ("background", "cat", "kitten", "dog", "sky")


def test_scale_threshold_alias_rule_and_prefilter_reach_the_processor(parts, data, monkeypatch):
    model, processor = parts
    calls = []
    original = processor.post_process_semantic_segmentation

    def spy(outputs, sizes, threshold, **options):
        calls.append((float(outputs.logits.abs().max()), threshold, options))
        return original(outputs, sizes, threshold, **options)

    monkeypatch.setattr(processor, "post_process_semantic_segmentation", spy)
    shares = []
    for scale in (10.0, 40.0):
        protocol = find_protocol("native", threshold=0.3, logit_scale=scale, alias_reduce="max_logit", prefilter=3)
        result = evaluate_data(model, processor, data, protocol, limit=1)
        shares.append(result.scores.predicted_pixels[0])
    assert calls[1][0] == pytest.approx(4 * calls[0][0], rel=1e-5)
    assert calls[0][1:] == (0.3, {"alias_reduce": "max_logit", "prefilter": 3})
    assert shares[0] >= shares[1]  # flatter probabilities pass the threshold less often
    monkeypatch.setattr(data, "class_names", ("wall", *data.class_names[1:]))
    evaluate_data(model, processor, data, protocol, limit=1)
    assert len(calls) == 2  # without a background the threshold is left out


def test_absent_classes_count_as_the_protocol_says(parts, data, monkeypatch):
    sky = torch.full((40, 48), 3)
    monkeypatch.setattr(ProtocolSegmenter, "classes", lambda *_: sky)
    zero, ignore = (scored(parts, data, replace(NATIVE, absent=rule), limit=1) for rule in ("zero", "ignore"))
    assert np.isnan(ignore.scores.per_class_iou[3])
    assert zero.scores.per_class_iou[3] == 0
    assert zero.protocol.absent == zero.scores.absent == "zero"


def test_a_result_says_what_it_depends_on_and_survives_saving(parts, data, tmp_path):
    result = scored(parts, data, NATIVE, limit=2)
    assert result.images_per_second > 0
    assert 0 < result.outside_share < 1
    assert (result.processes, result.device.split(",")[0]) == (1, "cpu")
    assert result.versions["torch"] == torch.__version__
    assert result.protocol.resolution == 32
    sky = result.per_class[3]
    assert (sky["name"], sky["accuracy"], sky["target_pixels"]) == ("sky", None, 0)
    result.save(tmp_path / "result.json")
    again = EvaluationResult.load(tmp_path / "result.json")
    assert again.to_dict() == result.to_dict()
    assert "NaN" not in (tmp_path / "result.json").read_text()
    assert np.isnan(again.scores.per_class_accuracy[3])
    assert again.protocol == result.protocol


def test_fingerprints_follow_weights_and_files(parts, data):
    model, _ = parts
    before = model_fingerprint(model), data_fingerprint(data)
    assert before == (model_fingerprint(model), data_fingerprint(data))
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    assert model_fingerprint(model) != before[0]
    path = data[0].image_path
    path.write_bytes(path.read_bytes() + b" ")
    assert data_fingerprint(data) != before[1]


def interrupt_after(count, monkeypatch):
    left = [count]
    original = ProtocolSegmenter.classes

    def classes(self, *args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(self, *args)

    monkeypatch.setattr(ProtocolSegmenter, "classes", classes)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_table(parts, data, tmp_path, monkeypatch):
    expected = scored(parts, data, NATIVE)
    state = tmp_path / "folder" / "state"
    for _ in range(2):
        with monkeypatch.context() as patch:
            interrupt_after(2, patch)
            with pytest.raises(KeyboardInterrupt):
                scored(parts, data, NATIVE, state=state)
    assert [path.name for path in state.parent.iterdir()] == ["state.0-of-1"]
    calls = []
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)  # of seven images four are done
        result = scored(parts, data, NATIVE, state=state, on_image=lambda: calls.append(1))
    assert result.scores.predicted_pixels == expected.scores.predicted_pixels
    assert result.to_dict()["scores"] == expected.to_dict()["scores"]
    assert (result.images, len(calls)) == (7, 7)
    with monkeypatch.context() as patch:
        interrupt_after(0, patch)
        assert scored(parts, data, NATIVE, state=state).scores.mean_iou == expected.scores.mean_iou
    forget_state(state)
    assert not list(state.parent.iterdir())


def test_progress_is_saved_on_the_way(parts, data, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(runs, "SAVE_SECONDS", 0)
    save = runs._Progress.save
    monkeypatch.setattr(runs._Progress, "save", lambda self: (save(self), sizes.append(len(self.done))))
    scored(parts, data, NATIVE, state=tmp_path / "state", limit=3)
    assert sizes == [1, 2, 3, 3]


def test_half_an_image_is_never_saved(parts, data, tmp_path, monkeypatch):
    update = runs.MeanIoU.update
    calls = []

    def stopped(self, *args):
        update(self, *args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "SAVE_SECONDS", 0)
        patch.setattr(runs.MeanIoU, "update", stopped)
        with pytest.raises(KeyboardInterrupt):
            scored(parts, data, NATIVE, state=tmp_path / "state")
    with np.load(tmp_path / "state.0-of-1") as values:
        assert values["done"].tolist() == [0]
        assert values["counts"].sum() == 40 * 48


def test_progress_of_something_else_is_refused(parts, data, tmp_path):
    state = tmp_path / "state"
    scored(parts, data, NATIVE, state=state, limit=1)
    with pytest.raises(ValueError, match=r"is of another run: the number of images changed.*Delete it"):
        scored(parts, data, NATIVE, state=state, limit=2)
    with pytest.raises(ValueError, match="the protocol changed"):
        scored(parts, data, SMALL_SLIDE, state=state, limit=1)
    with torch.no_grad():
        parts[0].visual_projection.weight[0, 0] += 1
    with pytest.raises(ValueError, match="the model changed"):
        scored(parts, data, NATIVE, state=state, limit=1)
    state.with_name("state.0-of-1").write_bytes(b"PK")
    with pytest.raises(ValueError, match="holds no progress of an evaluation"):
        scored(parts, data, NATIVE, state=state, limit=1)


def test_progress_of_several_processes_is_merged_once(parts, data, tmp_path):
    expected = scored(parts, data, NATIVE, state=tmp_path / "whole")
    with np.load(tmp_path / "whole.0-of-1") as values:
        key = str(values["key"])
    segmenter = ProtocolSegmenter(parts[0], parts[1], data.class_names, NATIVE)
    state = tmp_path / "state"
    for rank in range(2):
        progress = runs._Progress(runs.MeanIoU(4), tmp_path / "other", key)
        for index in range(rank, 4, 2):
            with Image.open(data[index].image_path) as image:
                progress.add(index, segmenter.classes(*segmenter.prepare(image)), data[index].mask, 1.0, 0.5)
        progress.save()
        (tmp_path / "other.0-of-1").rename(tmp_path / f"state.{rank}-of-2")
    left = (tmp_path / "state.1-of-2").read_bytes()
    result = scored(parts, data, NATIVE, state=state)
    assert result.to_dict()["scores"] == expected.to_dict()["scores"]
    assert sorted(path.name for path in tmp_path.glob("state.*")) == ["state.0-of-1"]
    # A process that was stopped between merging and deleting leaves a part that is counted already.
    (tmp_path / "state.1-of-2").write_bytes(left)
    again = scored(parts, data, NATIVE, state=state)
    assert again.to_dict()["scores"] == expected.to_dict()["scores"]


def test_errors_name_what_is_wrong(parts, data):
    with pytest.raises(ValueError, match=r"limit is 0\. At least 1 image"):
        scored(parts, data, NATIVE, limit=0)
    trained = DeepLabV3PlusForSegmentation.from_clip(parts[0], decoder_channels=8).eval()
    with pytest.raises(ValueError, match="A trained segmenter reads whole images"):
        evaluate_data(trained, parts[1], data, SMALL_SLIDE)
    assert evaluate_data(trained, parts[1], data, NATIVE, limit=1).images == 1
    data[1].image_path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png"):
        scored(parts, data, NATIVE)


SCRIPT = """
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_opentrans import _distributed
from hf_opentrans.cli import app
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.evaluation_protocols import find_protocol
from hf_opentrans.evaluation_runs import evaluate_data
from hf_opentrans.loading import load_segmenter

torch.set_num_threads(1)
model, folder, output = sys.argv[1:]
_distributed.start_processes()
data = SegmentationFolder(folder)
calls = []
options = {"state": Path(output) / "state", "on_image": lambda: calls.append(1)}
result = evaluate_data(*load_segmenter(model), data, find_protocol("native"), **options)
rank = dist.get_rank()
(Path(output) / f"{rank}.json").write_text(json.dumps({"calls": len(calls), **result.to_dict()}))
app(["evaluate", model, "--dataset", folder, "--json", f"{output}/cli.json"], standalone_mode=False)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_count_what_one_counts(parts, data, tmp_path, tiny_clip_folder):
    pytest.importorskip("accelerate")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = str(Path(distributed.__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(tmp_path / "script.py"), str(tiny_clip_folder), str(data.root), str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out, error = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, error[-3000:]
    expected = scored(parts, data, NATIVE).to_dict()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [values["calls"] for values in found] == [4, 3]
    for values in found:
        assert values["scores"] == json.loads(json.dumps(expected["scores"]))
        assert (values["processes"], values["images"]) == (2, 7)
        assert values["model_fingerprint"] == expected["model_fingerprint"]
    matrices = []
    for rank in range(2):
        with np.load(tmp_path / f"state.{rank}-of-2") as values:
            assert values["done"].tolist() == list(range(rank, 7, 2))
            matrices.append(values["counts"])
    alone = scored(parts, data, NATIVE, state=tmp_path / "alone")
    with np.load(tmp_path / "alone.0-of-1") as values:
        assert np.array_equal(sum(matrices), values["counts"])
    # The command says everything once, and keeps no progress.
    assert not list(tmp_path.glob(".cli.json*"))
    values = json.loads((tmp_path / "cli.json").read_text())
    assert values["rows"][0]["result"]["scores"] == found[0]["scores"]
    assert values["rows"][0]["result"]["processes"] == 2
    assert out.count(f"{values['mIoU']:.2%}") == 1
    # One process goes on from what two have done.
    merged = scored(parts, data, NATIVE, state=tmp_path / "state")
    assert merged.to_dict()["scores"] == alone.to_dict()["scores"]
