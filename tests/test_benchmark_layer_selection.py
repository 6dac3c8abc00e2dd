"""The study of layer selection: what is drawn, what is compared, how it goes on, what is published."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_opentrans.benchmark_layer_selection import SelectionFile, Study
from hf_opentrans.benchmark_selection_tables import (
    QUALITY,
    SelectionRow,
    StepTiming,
    paired_difference,
    selection_notes,
    selection_table,
)
from hf_opentrans.benchmark_tables import result_table
from hf_opentrans.cli import app
from hf_opentrans.cli._common import repeat_options
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.loading import load_segmenter
from hf_opentrans.training.finetune import FinetuneConfig

USAGE = 2
NAMES = ("sky", "cat", "dog", "wall")


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, repeat_options(["benchmark", "layer-selection", *map(str, arguments)]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture
def dataset(write_segmentation_folder, tiny_images):
    """Return a folder with the splits train and val and four classes in stripes."""

    def mask_of(image, _):
        return np.repeat(np.arange(4, dtype=np.uint8), image.width // 4)[None].repeat(image.height, 0)

    classes = {"id_to_name": dict(enumerate(NAMES))}
    return write_segmentation_folder({"train": tiny_images[:4], "val": tiny_images[:2]}, mask_of, classes)


@pytest.fixture
def study(tiny_clip_folder, dataset):
    model, processor = load_segmenter(str(tiny_clip_folder))
    config = FinetuneConfig(steps=2, batch_size=2, decoder_channels=8, save_every=3, gradient_batches=1)
    train, val = (SegmentationFolder(dataset, split) for split in ("train", "val"))
    return Study(model, processor, train, val, config)


@pytest.fixture
def base(tiny_clip_folder, dataset):
    given = ["--model", tiny_clip_folder, "--dataset", dataset, "--steps", 2, "--batch-size", 2]
    return [*given, "--decoder-channels", 8, "--seeds", 2]


def row(rule, seed, seen, unseen=0.5, **values):
    return SelectionRow(rule, seed, seen, unseen, 0.9, **values)


def test_the_interval_of_paired_differences_by_hand():
    rows = [row("alpha", s, 0.1 * s) for s in range(3)] + [row("full", s, 0.1 * s + 0.01 * (s + 1)) for s in range(3)]
    found = paired_difference(rows, "full", "seen")
    assert found is not None
    # Differences 0.01, 0.02, 0.03: deviation 0.01, t(2 degrees, 97.5 %) = 4.302653 from printed tables.
    reach = 4.302653 * 0.01 / 3**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((0.02, 0.02 - reach, 0.02 + reach), abs=1e-8)
    assert not found.is_clear
    unseen = paired_difference(rows, "full", "unseen")
    assert unseen is not None
    assert (unseen.mean, unseen.low, unseen.high) == (0, 0, 0)


def test_only_seeds_of_both_are_paired():
    rows = [row("alpha", 0, 0.1), row("alpha", 1, 0.2), row("alpha", 2, 0.9), row("full", 0, 0.2), row("full", 1, 0.3)]
    found = paired_difference(rows, "full", "seen")
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.is_clear
    assert paired_difference(rows[:4], "full", "seen") is None
    assert paired_difference(rows, "depth", "seen") is None


def test_the_head_sees_the_same_classes_whatever_the_rule(study):
    drawn = [study.seen_classes(seed) for seed in range(6)]
    assert all(len(set(classes)) == 2 and classes == sorted(classes) for classes in drawn)
    assert len({tuple(classes) for classes in drawn}) > 1
    assert study.seen_classes(3) == drawn[3]
    rows = [study.run(rule, 1) for rule in ("full", "head")]
    assert rows[0].seen_classes == rows[1].seen_classes == [NAMES[index] for index in drawn[1]]
    assert rows[0].trainable_params > rows[1].trainable_params
    assert rows[0].macs_per_sample == rows[0].full_macs_per_sample > rows[1].macs_per_sample


def test_scores_are_means_over_seen_and_other_classes(study, monkeypatch):
    ious = (0.1, 0.2, float("nan"), 0.4)
    monkeypatch.setattr(Study, "_score", lambda *_: (ious, 0.7))
    monkeypatch.setattr(Study, "seen_classes", lambda *_: [0, 2])
    found = study.run("head", 0)
    assert (found.seen, found.unseen, found.pixel_accuracy) == pytest.approx((0.1, 0.3, 0.7))


def test_a_run_is_repeatable(study):
    first, second = study.run("random", 2), study.run("random", 2)
    assert (first.seen, first.unseen, first.trained) == (second.seen, second.unseen, second.trained)
    assert first.trained
    assert all(name.startswith("vision_model.") for name in first.trained)


@pytest.mark.parametrize("seen", [0.0, 0.1, 0.9, 1.0])
def test_classes_on_both_sides_are_needed(study, seen):
    with pytest.raises(ValueError, match=r"the head sees \d of 4 classes. It must see some"):
        Study(study.clip, study.processor, study.train, study.evaluate, study.config, seen)


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path, base):
    target = tmp_path / "study.json"
    rules = ["--rules", "full", "alpha", "lora"]
    code, _, error = run(*base, *rules, "--seeds", 1, "--json", target)
    assert code == 0, error
    assert "3 runs: 0 in the file already, 3 to do." in error
    before = json.loads(target.read_text())
    code, out, error = run(*base, *rules, "--json", target)
    assert code == 0, error
    assert "6 runs: 3 in the file already, 3 to do." in error
    values = json.loads(target.read_text())
    assert values["rows"][:4] == before["rows"]
    keys = {(each["rule"], each["seed"]) for each in values["rows"]}
    assert keys == {(rule, seed) for rule in ("training-free", "full", "alpha", "lora") for seed in (0, 1)}
    assert [timing["rule"] for timing in values["timings"]] == ["alpha", "lora"]
    assert all(timing["step_ms"] > 0 and timing["speed_up"] > 0 for timing in values["timings"])
    assert "what it learned" in out
    assert "drawn anew for every seed, and scored on all 4" in out
    with Image.open(target.with_suffix(".png")) as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    code, again, error = run(*base, *rules, "--json", target)
    assert (code, error, again) == (0, "6 runs: 6 in the file already, 0 to do.", out)
    published = result_table(values)
    assert "| alpha |" in published
    assert "Measured by `hf-opentrans" in published


@pytest.mark.slow
def test_other_settings_are_refused(tmp_path, base):
    target = tmp_path / "study.json"
    assert run(*base, "--rules", "head", "--json", target)[0] == 0
    before = target.read_text()
    code, _, error = run(*base, "--rules", "head", "--json", target, "--fraction", 0.25)
    assert (code, "fraction was 0.5 and is 0.25" in error) == (USAGE, True), error
    assert target.read_text() == before
    target.write_text('{"rows": []}')
    code, _, error = run(*base, "--rules", "head", "--json", target)
    assert (code, "no result of `benchmark layer-selection`" in error) == (USAGE, True), error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rules", "best"], "select is 'best'. It must be one of full, head, own, lora, alpha"),
        (["--fraction", 0], "fraction is 0.0. It must lie in (0, 1]"),
        (["--seen", 1], "seen is 1: the head sees 4 of 4 classes"),
        (["--eval-split", "test"], "There is no split 'test'"),
        (["--steps", 0], "steps is 0"),
    ],
)
def test_bad_options_end_before_anything_trains(base, options, message):
    code, _, error = run(*base, *options)
    assert (code, message in error) == (USAGE, True), error
    assert "to do" not in error


def test_the_table_tells_quality_from_cost():
    costs = {"macs_per_sample": 3 * 10**9, "full_macs_per_sample": 4 * 10**9, "trainable_params": 10**6}
    rows = [row("training-free", s, 0.4) for s in (0, 1)]
    rows += [row("alpha", s, 0.5 + 0.1 * s, **costs, seconds=10.0, peak_memory_mib=100.0) for s in (0, 1)]
    rows += [row("full", s, 0.5 + 0.1 * s + 0.01, **costs, seconds=12.0, peak_memory_mib=200.0) for s in (0, 1)]
    timings = [StepTiming("alpha", 80.0, 100.0, 1.25, 50.0, 70.0)]
    header, cells = selection_table(rows, timings)
    lines = {line[0]: dict(zip(header, line, strict=True)) for line in cells}
    assert lines["alpha"]["mIoU seen"] == "55.0% ± 5.0"
    assert lines["alpha"]["seen vs alpha"] == "-"
    assert lines["full"]["seen vs alpha"] == "+1.0 (+1.0 to +1.0) *"
    assert lines["alpha"]["cost / sample"] == "3.00 GMAC (75%)"
    assert (lines["alpha"]["step time"], lines["alpha"]["step memory"]) == ("80 ms (80%)", "50 MiB")
    assert (lines["full"]["step time"], lines["full"]["step memory"]) == ("100 ms", "70 MiB")
    assert lines["full"]["peak memory"] == "200 MiB"
    assert lines["training-free"]["run"] == "-"
    assert selection_table(rows, timings, QUALITY)[0] == list(QUALITY)
    note = selection_notes(rows, {"classes": 4, "steps": 3, "batch_size": 2, "side": 32})[0]
    assert "Means over 2 seeds" in note


def test_the_file_holds_timings_too(tmp_path):
    target = tmp_path / "study.json"
    first = SelectionFile(target, {"a": 1}, "command")
    first.timings.append(StepTiming("alpha", 1.0, 2.0, 2.0))
    first.add(row("alpha", 0, 0.5))
    second = SelectionFile(target, {"a": 1}, "command")
    assert (second.rows, second.timings) == (first.rows, first.timings)
