"""The benchmark of runtimes and precisions: what it plans, measures, writes, continues and refuses."""

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel
from typer.testing import CliRunner

from hf_opentrans import benchmark_runtime_plan, benchmark_runtimes
from hf_opentrans.benchmark_runtime_memory import peak_memory
from hf_opentrans.benchmark_runtime_plan import RUNTIMES, NotRun, RuntimeRow, Setting, plan_settings
from hf_opentrans.benchmark_runtime_tables import draw_runtimes, runtime_notes, runtime_table
from hf_opentrans.benchmark_runtimes import RuntimeFile, Towers, run_benchmark
from hf_opentrans.benchmark_tables import result_table
from hf_opentrans.cli import app
from hf_opentrans.cli._common import repeat_options
from hf_opentrans.pruning import latency_timing
from hf_opentrans.pruning.latency_timing import interleave

USAGE = 2
ROW = RuntimeRow("./a/dense", 1, 32, 1, 9.0, 1.0, (0.9, 1.1), 1.0, 1.0, 5, gain=1.0, bytes=2_000_000, cosine=1.0)
SMALL = replace(ROW, model="./a/small", median_ms=5.0, speed_up=1.8, mac_ratio=2.0, gain=1.8, efficiency=0.9)


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, repeat_options(["benchmark", "latency", *map(str, arguments)]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def tower(neurons=64, seed=0):
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=neurons,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModel(config).eval()


def noise(side, count):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def towers(tmp_path):
    return Towers({"dense": tower(), "small": tower(32)}, tmp_path, noise)


@pytest.fixture
def _able(monkeypatch):
    """A machine that can run everything."""
    monkeypatch.setattr(benchmark_runtime_plan, "supports_bfloat16", lambda: True)
    monkeypatch.setattr(benchmark_runtime_plan, "find_spec", lambda _: object())
    monkeypatch.setattr(benchmark_runtime_plan.shutil, "which", lambda _: "c++")


@pytest.mark.usefixtures("_able")
def test_settings_go_from_small_to_large():
    settings, missing = plan_settings(["eager", "openvino"], ["fp32", "int8"], [8, 1, 8], [64, 32])
    assert [(s.resolution, s.batch_size) for s in settings[::4]] == [(32, 1), (32, 8), (64, 1), (64, 8)]
    kinds = [(s.runtime, s.precision) for s in settings[:4]]
    assert kinds == [
        ("eager", "fp32"),
        ("openvino", "fp32"),
        ("openvino", "int8-weights"),
        ("openvino", "int8-weights-bf16"),
    ]
    assert missing == [NotRun("eager", "int8", "On the processor eager has fp32, bf16.")]
    assert str(settings[0]) == "eager fp32, batch 1, 32 px"


@pytest.mark.usefixtures("_able")
def test_a_kind_can_be_asked_for_alone():
    settings, missing = plan_settings(["onnxruntime"], ["int8-static", "bf16"], [1], [32])
    assert [setting.precision for setting in settings] == ["int8-static"]
    assert missing == [
        NotRun("onnxruntime", "bf16", "On the processor onnxruntime has fp32, int8-dynamic, int8-static.")
    ]


def test_what_a_machine_lacks_is_said(monkeypatch):
    monkeypatch.setattr(benchmark_runtime_plan, "supports_bfloat16", lambda: False)
    monkeypatch.setattr(benchmark_runtime_plan, "find_spec", lambda name: None if name == "nncf" else object())
    monkeypatch.setattr(benchmark_runtime_plan.shutil, "which", lambda _: None)
    settings, missing = plan_settings(list(RUNTIMES), ["fp32", "bf16"], [1], [32])
    assert [(s.runtime, s.precision) for s in settings] == [("eager", "fp32"), ("onnxruntime", "fp32")]
    reasons = {(found.runtime, found.precision): found.reason for found in missing}
    assert "no instructions for bfloat16" in reasons["eager", "bf16"]
    assert "needs a C++ compiler" in reasons["compile", "fp32"]
    assert 'nncf is not installed. Run: pip install "hf_opentrans[openvino]"' in reasons["openvino", "fp32"]
    with pytest.raises(ValueError, match="Nothing of what was asked for can be run here"):
        plan_settings(["eager"], ["bf16"], [1], [32])


def test_rounds_are_interleaved_and_warm_up_is_not_counted(monkeypatch):
    seen = []
    monkeypatch.setattr(latency_timing, "milliseconds", lambda passed, _: (passed(), float(len(seen)))[1])
    times = interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3, warmup=2, settle=0)
    assert seen == ["a", "b"] * 5
    assert times == {"a": [5.0, 7.0, 9.0], "b": [6.0, 8.0, 10.0]}


def test_ratios_are_against_the_first_model_in_eager(towers, monkeypatch):
    # The reference takes 12 ms in every round; in bf16 the dense tower 6 ms and the small one 4 ms.
    monkeypatch.setattr(
        benchmark_runtimes,
        "interleave",
        lambda passes, rounds, **_: dict(zip(passes, ([12.0] * rounds, [6.0] * rounds, [4.0] * rounds), strict=True)),
    )
    monkeypatch.setattr(benchmark_runtimes, "to_bfloat16", lambda model: model)
    results = RuntimeFile(None, {}, "")
    run_benchmark(towers, [Setting("eager", "bf16", 1, 32)], results, rounds=3, threads=1, memory=False)
    dense, small = results.rows
    assert (dense.speed_up, dense.gain, dense.efficiency) == (2, 1, 1)
    assert (small.speed_up, small.gain) == (3, 1.5)
    assert small.efficiency == pytest.approx(1.5 / small.mac_ratio)
    assert small.mac_ratio > 1.2
    assert small.cosine == pytest.approx(1)
    assert small.cosine_to_first is None  # weights are random


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_graphs_are_the_models(towers, runtime):
    for package in ("onnxscript", "onnxruntime") if runtime == "onnxruntime" else ("openvino", "nncf"):
        pytest.importorskip(package)
    kinds = RUNTIMES[runtime] if runtime == "onnxruntime" else ("fp32", "int8-weights")
    results = RuntimeFile(None, {}, "")
    run_benchmark(
        towers, [Setting(runtime, kind, 2, 32) for kind in kinds], results, rounds=3, threads=1, memory=False
    )
    rows: dict[Any, Any] = {(row.model, row.precision): row for row in results.rows}
    assert len(rows) == 2 * len(kinds)
    for (name, precision), row in rows.items():
        assert row.cosine == pytest.approx(1, abs=1e-6 if precision == "fp32" else 0.02), (name, precision)
        assert (row.cosine == 1) <= (precision == "fp32")
        assert row.bytes <= rows[name, "fp32"].bytes
    assert rows["small", "fp32"].bytes < rows["dense", "fp32"].bytes


def test_memory_is_that_of_a_process_of_its_own(towers):
    job = {"runtime": "eager", "precision": "fp32", "path": str(towers.saved("small"))}
    job |= {"batch_size": 1, "resolution": 32, "threads": 1}
    ballast = torch.ones(300_000_000)  # 1.2 GB here must not count there
    mib = peak_memory(job)
    assert mib is not None
    assert 100 < mib < ballast.numel() * 4 / 2**20
    with pytest.raises(RuntimeError, match="process that measures memory ended with code 1"):
        peak_memory({**job, "path": str(towers.folder / "nowhere")})


def test_a_benchmark_goes_on_setting_by_setting(towers, tmp_path):
    target = tmp_path / "latency.json"
    settings = [Setting("eager", "fp32", batch, 32) for batch in (1, 2)]
    run_benchmark(towers, settings[:1], RuntimeFile(target, {"a": 1}, "x"), rounds=3, threads=1, memory=False)
    said = []
    again = RuntimeFile(target, {"a": 1}, "x")
    first = again.rows[0]
    run_benchmark(towers, settings, again, rounds=3, threads=1, memory=False, say=said.append)
    assert said[0] == "1 settings to do, 1 done."
    assert "eager fp32, batch 2, 32 px" in said[1]
    assert (again.rows[0], [row.batch_size for row in again.rows]) == (first, [1, 1, 2, 2])
    with pytest.raises(ValueError, match="measured with other settings: a was 1 and is 2"):
        RuntimeFile(target, {"a": 2}, "x")


def test_the_command_writes_everything(tmp_path, tiny_clip_folder, images, tiny_images, write_segmentation_folder):
    target, classes = tmp_path / "latency.json", {"id_to_name": {"0": "cat", "1": "dog"}, "ignore_id": 255}
    splits = {"train": tiny_images[:2], "val": tiny_images[2:3]}
    dataset = write_segmentation_folder(splits, lambda image, _: np.zeros(image.size[::-1], np.uint8), classes)
    options = ["--models", tiny_clip_folder, "--batch", 1, "--rounds", 3, "--threads", 1, "--no-memory"]
    options += ["--images", images, "--segmentation", dataset, "--json", target]
    code, _, error = run(*options)
    assert (code, "Choose one of them as `split` (`--split`)" in error) == (1, True), error
    code, out, error = run(*options, "--split", "val")
    assert code == 0, error
    values = json.loads(target.read_text())
    (row,) = values["rows"]
    assert (row["runtime"], row["precision"], row["resolution"], row["speed_up"]) == ("eager", "fp32", 32, 1)
    assert row["cosine_to_first"] == pytest.approx(1)
    assert 0 <= row["mean_iou"] <= 1
    assert "Within" in out
    assert "What it takes" in out
    assert target.with_suffix(".png").exists()
    assert "| eager | fp32 |" in result_table(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--runtimes", "tensorrt"],
            "runtimes has 'tensorrt'. It must be one of eager, compile, onnxruntime, openvino",
        ),
        (["--precision", "int4"], "precision has 'int4'. It must be one of fp32, bf16, int8,"),
        (["--keep", 1.5], "keep is 1.5. It must lie in (0, 1]"),
        (["--segmentation", "d"], "--segmentation is given without --models."),
        (
            ["--segmentation", "d", "--models", "m", "--precision", "int8", "--runtimes", "eager", "onnxruntime"],
            "int8-static measures ranges on other images",
        ),
        (["--models", "nowhere"], "nowhere"),
    ],
)
@pytest.mark.usefixtures("_able")
def test_bad_options_end_before_anything_is_measured(options, message):
    code, _, error = run(*options)
    assert (code, message in error) == (USAGE, True), error
    assert "to do" not in error


def test_the_table_leaves_out_what_says_nothing():
    header, cells = runtime_table([ROW, SMALL])
    assert header == [
        "runtime",
        "precision",
        "model",
        "median",
        "speed-up",
        "range",
        "MACs",
        "within",
        "of MACs",
        "size",
        "cosine",
    ]
    assert cells[1] == [
        "eager",
        "fp32",
        "small",
        "5.0 ms",
        "1.80x",
        "0.90-1.10",
        "2.00x",
        "1.80x",
        "90%",
        "2.0 MB",
        "1.0000",
    ]
    assert runtime_table([replace(ROW, model="dense ViT-B/16")])[1][0][2] == "dense ViT-B/16"
    header, _ = runtime_table([ROW, replace(SMALL, batch_size=8)])
    assert "batch" in header
    assert "px" not in header


def test_rows_that_something_disturbed_are_named_and_are_not_the_best():
    quick = replace(SMALL, runtime="openvino", speed_up=4.0)
    disturbed = replace(SMALL, runtime="onnxruntime", speed_up=9.0, speed_up_range=(1.5, 30.0))
    notes = runtime_notes([ROW, SMALL, quick, disturbed], {})
    assert any("fastest way to run small: openvino fp32" in note for note in notes)
    (note,) = (note for note in notes if note.startswith("Unsteady"))
    assert "1 of 4 rows" in note
    assert "small in onnxruntime fp32, batch 1, 32 px, 1.50x to 30.00x" in note
    assert not any(note.startswith("Unsteady") for note in runtime_notes([ROW, SMALL, quick], {}))


def test_notes_name_the_best_and_what_was_not_run():
    quick = replace(SMALL, runtime="openvino", speed_up=4.0, efficiency=0.95)
    values = {
        "not_run": [NotRun("eager", "bf16", "No.").to_dict()],
        "settings": {"runtime_versions": {"openvino": "1"}},
    }
    notes = runtime_notes([ROW, SMALL, quick], values)
    assert "eager fp32 90%; openvino fp32 95%" in notes[1]
    assert notes[2] == "The fastest way to run small: openvino fp32, batch 1, 32 px, 4.00 times as fast."
    assert notes[3:] == ["With openvino 1.", "Not run: eager bf16. No."]


def test_the_picture_is_not_blank(tmp_path):
    draw_runtimes([ROW, SMALL, replace(SMALL, batch_size=8)], tmp_path / "a.png", title="t")
    with Image.open(tmp_path / "a.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6) or ()) > 20


def test_without_matplotlib_there_is_a_warning_and_no_picture(tmp_path, tiny_clip_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = tmp_path / "latency.json"
    options = ["--models", tiny_clip_folder, "--batch", 1, "--rounds", 3, "--threads", 1, "--no-memory"]
    code, _, error = run(*options, "--json", target)
    assert code == 0, error
    assert "Warning: No picture was drawn." in error
    assert not target.with_suffix(".png").exists()
