"""The benchmark of checkpoints of several budgets: rows, going on, what is said of the targets, the picture."""

import json
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_opentrans import benchmark_elastic
from hf_opentrans.benchmark_elastic import (
    BudgetTiming,
    ElasticRow,
    FileSize,
    elastic_of_widths,
    measure_files,
    split_images,
    timings_of,
)
from hf_opentrans.benchmark_elastic_tables import (
    elastic_notes,
    elastic_table,
    fidelity_notes,
    method_rows,
    size_note,
    timing_table,
)
from hf_opentrans.benchmark_tables import result_table
from hf_opentrans.cli import app
from hf_opentrans.cli._common import repeat_options
from hf_opentrans.loading import load_dense_clip

pytestmark = pytest.mark.filterwarnings("ignore:.* calibration images give")
USAGE = 2


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, repeat_options(["benchmark", "elastic", *map(str, arguments)]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    for name in ("LOAD_ROUNDS", "SWITCH_ROUNDS", "LATENCY_ROUNDS"):
        monkeypatch.setattr(benchmark_elastic, name, 2)


def row(way, budget, cosine, patches=None, **values):
    figures = {"macs": round(1e9 * budget), "params": 10, "bytes_alone": 40, "bytes_added": None, "mean_iou": None}
    figures |= {"seconds": 5.0, "widths": "4:8:8:64", **values}
    cosines = {"class_token_cosine": cosine, "patch_token_cosine": cosine if patches is None else patches}
    return ElasticRow(way=way, budget=budget, **cosines, **figures)


def test_rows_are_measured_once_and_times_can_be_measured_again(
    tmp_path, tiny_clip_folder, tiny_images, write_segmentation_folder
):
    pytest.importorskip("matplotlib")
    classes = {"id_to_name": {"0": "cat", "1": "dog"}, "ignore_id": 255}
    data = write_segmentation_folder(
        {"val": tiny_images}, lambda image, index: np.full(image.size[::-1], index % 2, np.uint8), classes
    )
    target = tmp_path / "elastic.json"
    options = ["--model", tiny_clip_folder, "--images", data / "images", "--fidelity-images", data]
    options += ["--segmentation", data, "--budgets", 0.6, 0.8, "--json", target]
    code, out, error = run(*options, "--no-timing")
    assert code == 0, error
    assert "7 models: 0 in the file already, 7 to do." in error
    values = json.loads(target.read_text())
    rows = {(entry["way"], entry["budget"]): entry for entry in values["rows"]}
    assert list(rows) == [("dense", 1.0), *((way, b) for way in ("elastic", "single", "random") for b in (0.8, 0.6))]
    assert (values["timings"], len(values["files"])) == ([], 2)
    assert values["settings"]["budgets"] == [0.8, 0.6]
    assert "Picture:" in out
    assert target.with_suffix(".png").stat().st_size > 10_000
    check_rows(rows)

    # An interrupted run goes on with what is left; the times come at the end.
    values["rows"] = [entry for entry in values["rows"] if (entry["way"], entry["budget"]) != ("single", 0.6)]
    target.write_text(json.dumps(values))
    code, out, error = run(*options)
    assert code == 0, error
    assert "7 models: 6 in the file already, 1 to do." in error
    again = json.loads(target.read_text())
    found = {(entry["way"], entry["budget"]): entry for entry in again["rows"]}
    assert found["single", 0.6]["patch_token_cosine"] == pytest.approx(
        rows["single", 0.6]["patch_token_cosine"], abs=1e-5
    )
    check_timings(again)

    code, _, error = run(*options, "--retime")
    assert code == 0, error
    assert "Timing 2 budgets. Nothing else should run meanwhile." in error
    retimed = json.loads(target.read_text())
    assert retimed["timings"] != again["timings"]
    assert retimed["rows"] == again["rows"]
    code, _, error = run(*options, "--seed", 1)
    assert (code, "seed was 0 and is 1" in error) == (USAGE, True), error


def check_rows(rows):
    """What belongs together is alike, random is far off, and the smaller budget alone adds bytes."""
    assert rows["dense", 1.0]["class_token_cosine"] == pytest.approx(1, abs=1e-5)
    for budget in (0.8, 0.6):
        elastic, single, random = (rows[way, budget] for way in ("elastic", "single", "random"))
        assert elastic["macs"] == pytest.approx(single["macs"], rel=0.05)
        assert elastic["patch_token_cosine"] > random["patch_token_cosine"]
        assert 0 <= elastic["mean_iou"] <= 1
    assert rows["elastic", 0.8]["bytes_added"] == 0 < rows["elastic", 0.6]["bytes_added"]
    close = pytest.approx(rows["single", 0.8]["class_token_cosine"], abs=0.02)
    assert rows["elastic", 0.8]["class_token_cosine"] == close


def check_timings(values):
    """All times are there, for every budget, and in the published table."""
    timings = timings_of(values)
    assert [timing.budget for timing in timings] == [0.8, 0.6]
    for timing in timings:
        assert min(timing.whole_ms, timing.alone_ms, timing.plain_ms, timing.switch_ms, timing.elastic_ms) > 0
        assert timing.latency_range[0] <= timing.latency_ratio <= timing.latency_range[1]
        assert 0 < timing.bytes_read < timing.bytes_file
    text = result_table(values)
    assert "| 0.6 |" in text
    assert "| budget | load all |" in text


def test_bad_options_end_before_anything_runs(tmp_path, tiny_clip_folder, images):
    options = ["--model", tiny_clip_folder, "--images", images]
    code, _, error = run(*options, "--budgets", 0.6, 1.5)
    assert (code, "They must be shares in (0, 1]" in error) == (USAGE, True), error
    code, _, error = run(*options, "--budgets", 0.6, 0.6)
    assert (code, "none twice" in error) == (USAGE, True), error
    code, _, error = run(*options, "--retime", "--no-timing")
    assert (code, "Keep one." in error) == (USAGE, True), error
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    code, _, error = run(*options, "--json", other)
    assert (code, "is no result of `benchmark elastic`" in error) == (USAGE, True), error
    assert other.read_text() == '{"rows": []}'


def test_images_to_measure_on_are_others(tiny_images, images):
    many = [image.copy() for image in tiny_images * 3]
    chosen, unseen = split_images(many, None)
    assert (len(chosen), len(unseen)) == (21, 3)
    assert not {id(image) for image in chosen} & {id(image) for image in unseen}
    chosen, unseen = split_images(images, None)
    assert not {str(path) for path in chosen} & {str(path) for path in unseen}
    assert split_images(tiny_images[:3], tiny_images[4:6]) == (tiny_images[:3], tiny_images[4:6])
    with pytest.raises(ValueError, match="There is 1 image"):
        split_images(tiny_images[:1], None)


def test_sizes_and_times_need_the_widths_alone(tiny_clip_folder):
    dense, _ = load_dense_clip(tiny_clip_folder)
    widths = ["4:8:8:64 4:8:8:64 3:8:8:48", "3:8:6:40 4:4:8:64 1:8:8:16", "1:4:6:8 0:4:8:32 1:8:8:0"]
    shares = (0.8, 0.6, 0.4)
    rows = [replace(row("elastic", share, 0.9), widths=text) for share, text in zip(shares, widths, strict=True)]
    model = elastic_of_widths(dense, rows)
    assert model.budgets == shares
    layer: Any = cast("Any", model.set_budget(0.4)).vision_model.encoder.layers[0]
    assert (layer.self_attn.num_heads, layer.mlp.fc1.out_features) == (1, 8)
    sizes = measure_files(dense, rows)
    assert [(size.budgets, size.precision) for size in sizes] == [(shares, "float32"), (shares, "float16")]
    for size, itemsize in zip(sizes, (4, 2), strict=True):
        plain = model.set_budget(0.8).extract()
        tower = [p for name, p in plain.named_parameters() if name.startswith(("vision_model.", "visual_"))]
        largest = itemsize * sum(p.numel() for p in tower)
        added = sum(model.added_bytes(index) for index in (1, 2))
        assert size.ratio == pytest.approx(1 + added / largest, rel=0.1)  # names of tensors take bytes too
    more = [*rows, replace(rows[2], budget=0.3)]
    assert [size.budgets for size in measure_files(dense, more)][::2] == [shares, (*shares, 0.3)]


def test_targets_are_told_met_or_not():
    rows = [row("elastic", 0.8, 0.99), row("single", 0.8, 0.995), row("elastic", 0.5, 0.90), row("single", 0.5, 0.91)]
    first, second = fidelity_notes(rows)
    assert first.startswith("Budgets of 0.6 and more: at worst 0.0050 below a single model (patch tokens at 0.8)")
    assert first.endswith("; the target is 0.01: met.")
    assert "Budgets below 0.6: at worst 0.0100 below" in second
    assert second.endswith("the target is 0.03: met.")
    rows[0], rows[2] = row("elastic", 0.8, 0.995, 0.98), row("elastic", 0.5, 0.95)
    first, second = fidelity_notes(rows)
    assert "0.0150 below a single model (patch tokens at 0.8); the target is 0.01: not met." in first
    assert "0.0400 above a single model" in second
    three = FileSize((0.8, 0.6, 0.4), "float32", 150, 100, 20)
    assert "1.62 times the bytes of 0.8 alone in float32; the target is 1.5 at most: not met." in size_note(three)
    assert "target" not in size_note(replace(three, budgets=(0.8, 0.6)))
    six = FileSize((0.8, 0.7, 0.6, 0.5, 0.4, 0.3), "float16", 200, 100, 0)
    assert "the target is 2.4 at most: met." in size_note(six)
    notes = elastic_notes(rows, [three], {"num_images": 9, "seed": 3})
    assert notes[0].endswith("9 calibration images, seed 3.")
    assert len(notes) == 4


def test_the_table_is_for_people():
    rows = [row("dense", 1.0, 1.0, mean_iou=0.7, seconds=None), row("random", 0.6, 0.5, mean_iou=0.1)]
    rows += [row("elastic", 0.6, 0.98, mean_iou=0.6, bytes_added=10**6), row("single", 0.6, 0.99, mean_iou=0.61)]
    header, (dense, cells) = elastic_table(rows)
    found = dict(zip(header, cells, strict=True))
    assert (dense[0], found["budget"], found["MACs"]) == ("dense", "0.6", "600 M")
    assert [found[f"CLS cos, {way}"] for way in ("elastic", "single", "random")] == ["0.9800", "0.9900", "0.5000"]
    assert [found[f"mIoU, {way}"] for way in ("elastic", "single", "random")] == ["60.0%", "61.0%", "10.0%"]
    assert (found["alone"], found["adds"]) == ("0.00 MB", "1.00 MB")
    assert not any("mIoU" in name for name in elastic_table([replace(entry, mean_iou=None) for entry in rows])[0])
    assert [entry.method for entry in method_rows(rows)] == ["dense", "random", "single", "elastic"]
    timing = BudgetTiming(0.6, 300.0, 100.0, 90.0, 25, 100, 4.0, 11.0, 10.0, 10.5, 0.91, (0.8, 1.1))
    header, (line,) = timing_table([timing])
    shown = dict(zip(header, line, strict=True))
    assert (shown["load / switch"], shown["switch"], shown["reads"]) == ("25x", "4.0 ms", "25% of 0.0 MB")
    assert shown["plain / elastic (range)"] == "0.91 (0.80-1.10)"


def test_an_elastic_model_runs_as_fast_as_a_plain_one_can(tiny_clip_folder):
    """Its layers are what a plain model's are: the same shapes, contiguous, no extra operation."""
    dense, _ = load_dense_clip(tiny_clip_folder)
    rows = [
        replace(row("elastic", 0.8, 0.9), widths="4:8:8:64 " * 3),
        replace(row("elastic", 0.5, 0.9), widths="2:8:8:32 " * 3),
    ]
    elastic = elastic_of_widths(dense, rows).set_budget(0.5)
    plain = elastic.extract()
    pairs = zip(elastic.vision_model.named_parameters(), plain.vision_model.named_parameters(), strict=True)
    for (name, mine), (other, theirs) in pairs:
        assert (name, mine.shape, mine.stride()) == (other, theirs.shape, theirs.stride())
        assert torch.equal(mine, theirs)
