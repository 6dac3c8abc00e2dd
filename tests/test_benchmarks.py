"""Paired latencies with a fake clock, the comparison of methods, and many runs that can be interrupted.

Nothing here depends on real time.
"""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig

from hf_opentrans import DenseCLIPForSegmentation, OpenVocabularyProcessor, PruningConfig, benchmarks
from hf_opentrans.benchmark_memory import PeakMemory
from hf_opentrans.benchmark_plots import draw_pruning
from hf_opentrans.benchmark_pruning import (
    ABLATION,
    ResultFile,
    forecast,
    plan_ablation,
    plan_methods,
    run_benchmark,
)
from hf_opentrans.benchmark_rows import duration, fingerprint
from hf_opentrans.benchmark_tables import (
    QUALITY,
    markdown_table,
    method_notes,
    method_table,
    result_table,
    summarise,
)
from hf_opentrans.benchmarks import (
    BenchmarkData,
    MethodRow,
    compare_methods,
    environment,
    paired_latency,
    tower_bytes,
    tower_of_widths,
    write_widths,
)
from hf_opentrans.pruning import latency_timing
from hf_opentrans.pruning.macs import count_macs, count_params
from hf_opentrans.pruning.prune import prune_model

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
        monkeypatch.setattr(latency_timing, "_now", lambda _device: self.now)

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


DENSE = MethodRow("dense", 1.0, 1000, 100, 400, 1.0, 1.0, speed_up=1.0, measuring_seconds=4.0)


def row_of(method="obs", keep=0.5, seed=0, error=0.1, variant="", **values):
    cosine = 1 - error
    made = MethodRow(method, keep, int(1000 * keep), 50, 200, cosine, cosine, variant=variant, seed=seed)
    return replace(made, **{"seconds": 6.0, "measuring_seconds": 4.0, **values})


class Engine:
    """Pruning that returns the model as it is, at once."""

    def __init__(self, monkeypatch):
        self.calls, self.timed, self.refuse, self.stop_after = [], [], lambda _config: None, None
        monkeypatch.setattr(benchmarks, "prune_model", self)
        monkeypatch.setattr(benchmarks, "paired_latency", self.latency)
        monkeypatch.setattr(benchmarks, "time", SimpleNamespace(perf_counter=lambda: 0.0))
        monkeypatch.setattr(PeakMemory, "mib", property(lambda _: 5.0, lambda *_: None), raising=False)

    def __call__(self, model, images, config, **_):
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.refuse(config)
        self.calls.append((config.method, config.keep, config.seed))
        figures = {"nominal_macs": None, "predicted_error": 0.5, "realised_error": 0.25, "seconds": {"total": 6.0}}
        return SimpleNamespace(model=model, report=SimpleNamespace(**figures))

    def latency(self, towers, **_):
        self.timed.append(count_macs(list(towers.values())[-1].config))
        return [SimpleNamespace(median_ms=2.0, speed_up=1.5)] * len(towers)


@pytest.fixture
def engine(monkeypatch):
    return Engine(monkeypatch)


@pytest.fixture
def benchmark(segmenter, tiny_images, tiny_image_processor, tiny_tokenizer):
    """Return a function that starts a benchmark with a result file and returns the file and what was said."""
    data = BenchmarkData(calibration=tiny_images, fidelity_images=tiny_images[:2])
    processor = OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)

    def start(path, runs, settings=None):
        said = []
        results = ResultFile(path, settings or {"model": "tiny"}, "hf-opentrans benchmark pruning")
        run_benchmark(lambda: (segmenter, processor), data, runs, results, say=said.append)
        return results, said

    return start


RUNS = plan_methods(["obs", "random"], [0.7, 0.5], [0, 1])


def test_runs_cover_methods_budgets_and_seeds_once():
    assert len(RUNS) == 8
    assert len({run.key for run in RUNS}) == 8
    assert [run.config.method for run in RUNS[:2]] == ["obs", "random"]  # all methods of a budget and seed first
    assert len(plan_methods(["obs", "obs"], [0.5, 0.5], [0], num_images=8)) == 1
    ladder = plan_ablation([0.5], [3], num_images=8)
    assert [run.variant for run in ladder] == list(ABLATION)
    assert {(run.config.method, run.config.seed, run.config.num_images) for run in ladder} == {("obs", 3, 8)}
    sweep = next(run for run in ladder if run.variant == "+ sweep")
    assert sweep.config == PruningConfig(keep=0.5, seed=3, num_images=8)  # the method as it is


@pytest.mark.slow
def test_an_interrupted_benchmark_goes_on(tmp_path, engine, benchmark):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    results, _ = benchmark(whole, RUNS)
    assert [row.key for row in results.rows[1:]] == [run.key for run in RUNS]
    first = results.rows[1]
    assert first.to_dict() | {"speed_up": 1.5, "predicted_error": 0.5} == first.to_dict()
    assert first.class_token_cosine is not None
    assert first.patch_token_cosine is not None
    lost = 4 - 2 * first.class_token_cosine - 2 * first.patch_token_cosine  # of unit vectors, on unseen images
    assert first.realised_error == pytest.approx(max(lost, 0))
    engine.calls.clear()
    engine.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        benchmark(parts, RUNS)
    assert len(json.loads(parts.read_text())["rows"]) == 4
    assert [path.name for path in tmp_path.glob(".*")] == []
    engine.stop_after = None
    first = list(engine.calls)
    _, said = benchmark(parts, RUNS)
    assert said[0] == "8 runs: 3 in the file already, 5 to do."
    assert parts.read_text() == whole.read_text()
    again = engine.calls[3:]
    assert (len(again), set(again) & set(first)) == (5, set())
    engine.calls.clear()
    _, said = benchmark(parts, RUNS)
    assert (engine.calls, said) == ([], ["8 runs: 8 in the file already, 0 to do."])


@pytest.mark.slow
def test_latencies_come_last_and_can_be_measured_again(tmp_path, engine, benchmark, segmenter):
    path = tmp_path / "a.json"
    engine.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        benchmark(path, RUNS)
    assert engine.timed == []
    assert {row["speed_up"] for row in json.loads(path.read_text())["rows"]} == {None}
    engine.stop_after = None
    results, said = benchmark(path, RUNS)
    assert said[-1] == "Timing 9 models, one image at a time. Nothing else should run meanwhile."
    assert engine.timed == [count_macs(segmenter.config.vision_config)] * 9
    assert {row["latency_ms"] for row in json.loads(path.read_text())["rows"]} == {2.0}
    kept = MethodRow("obs", 0.3, 1, 1, 1, latency_ms=9.0, speed_up=9.0)  # of an older file, without widths
    results.add(kept)
    results.rows[2] = replace(results.rows[2], latency_ms=7.0, speed_up=7.0)
    results.forget_times()
    assert results.rows[-1] == kept
    assert {row.speed_up for row in results.rows[:-1]} == {None}
    results.save()
    engine.timed.clear()
    results, said = benchmark(path, RUNS)
    assert (len(engine.timed), engine.calls[8:]) == (9, [])
    assert results.rows[2].speed_up == 1.5


def test_a_tower_is_built_from_its_widths(segmenter, tiny_images):
    dense: Any = segmenter.vision_model
    assert write_widths(dense.config) == "4:8:8:64 4:8:8:64 4:8:8:64"
    pruned: Any = prune_model(segmenter, tiny_images * 5, PruningConfig(keep=0.5)).model.vision_model
    other = tower_of_widths(dense, write_widths(pruned.config))
    assert count_macs(other.config) == count_macs(pruned.config) < count_macs(dense.config)
    assert [(n, p.shape) for n, p in other.named_parameters()] == [(n, p.shape) for n, p in pruned.named_parameters()]
    empty = tower_of_widths(dense, "0:8:8:64 4:8:8:0 1:4:8:16")
    assert write_widths(empty.config) == "0:8:8:64 4:8:8:0 1:4:8:16"
    assert torch.isfinite(empty(torch.zeros(1, 3, 32, 32), interpolate_pos_encoding=True).pooler_output).all()


def test_a_file_with_other_settings_is_refused(tmp_path, engine, benchmark, monkeypatch):
    path = tmp_path / "a.json"
    benchmark(path, RUNS[:1], {"model": "tiny", "mode": None})
    before = path.read_text()
    with pytest.raises(ValueError, match=r"mode was None and is 'plus'.*delete this one"):
        ResultFile(path, {"model": "tiny", "mode": "plus"}, "")
    for text in ("[]", "{", '{"rows": []}', '{"settings": {}, "environment": {}, "rows": [{"a": 1}], "skipped": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no result of `benchmark pruning` that can be continued"):
            ResultFile(path, {"model": "tiny"}, "")
    path.write_text(before.replace('"threads": 1', '"threads": 64'))
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    with pytest.raises(ValueError, match="threads was 64 and is 1"):
        ResultFile(path, {"model": "tiny", "mode": None}, "")


@pytest.mark.slow
def test_runs_without_a_model_are_noted_and_tried_again(tmp_path, engine, benchmark):
    def refuse(config):
        if config.keep < 0.6 and config.method == "obs":
            raise ValueError("keep=0.5 is\nbelow. Raise keep to 0.6.")

    engine.refuse = refuse
    path = tmp_path / "a.json"
    _, said = benchmark(path, RUNS)
    values = json.loads(path.read_text())
    skipped = {
        "method": "obs",
        "variant": "",
        "keep": 0.5,
        "seed": 0,
        "reason": "keep=0.5 is below. Raise keep to 0.6.",
    }
    assert values["skipped"] == [skipped, skipped | {"seed": 1}]
    assert len(values["rows"]) == 1 + 6
    assert "5 of 8: obs at keep 0.5, seed 0 skipped. keep=0.5 is below." in " ".join(said)
    notes = result_table(values)
    assert notes.count("Not run: obs at keep 0.5. keep=0.5 is below. Raise keep to 0.6.") == 1
    assert benchmark(path, RUNS)[0].skipped[0].reason.endswith("0.6.")
    engine.refuse = lambda _: None
    results, _ = benchmark(path, RUNS)
    assert (results.skipped, len(results.rows)) == ([], 9)


def test_no_model_at_all_is_an_error(engine, benchmark):
    def refuse(config):
        raise ImportError("torch_pruning is missing. Install it.")

    engine.refuse = refuse
    with pytest.raises(ValueError, match=r"No run gave a model\. torch_pruning is missing"):
        benchmark(None, RUNS)


def test_the_time_is_told_before_and_during_the_runs(engine, benchmark):
    _, said = benchmark(None, RUNS[:3])
    assert said[0] == "3 runs: 0 in the file already, 3 to do."
    assert said[1].startswith("The dense model is measured. 3 runs x 0.0 s to measure a model: at least 0.0 s")
    assert said[2].endswith("About 12 s left for 2 runs.")
    assert said[3].endswith("About 6.0 s left for 1 run.")
    assert said[4] == "3 of 3: obs at keep 0.7, seed 1 done, pruned in 6.0 s."


def test_forecasts_use_what_is_known_of_each_method():
    assert "8 runs x 4.0 s to measure a model: at least 32 s" in forecast(RUNS, [DENSE])
    rows = [DENSE, row_of("obs", seconds=40.0), row_of("obs", seconds=20.0), row_of("random", seconds=0.0)]
    # Four of 30 s, four of nothing, and 4 s of measuring each: 152 s.
    assert forecast(RUNS, rows) == "About 3 min left for 8 runs."
    assert forecast(plan_methods(["imp"], [0.5], [0]), rows) == "About 24 s left for 1 run."  # as the mean of all
    assert [duration(s) for s in (1.25, 119, 121, 7300)] == ["1.2 s", "119 s", "2 min", "2.0 h"]


def test_seeds_are_combined():
    rows = [row_of(seed=seed, error=error) for seed, error in enumerate((0.1, 0.2, 0.6))]
    others = [row_of("random", keep=0.7), row_of("imp", keep=0.5, macs=1000, nominal_macs=500), row_of(keep=0.7)]
    found = summarise([*others, *rows, DENSE])
    order = [("dense", 1.0), ("ours", 0.7), ("random", 0.7), ("ours", 0.5), ("imp", 0.5)]
    assert [(summary.label, summary.keep) for summary in found] == order
    ours = found[3]
    assert ours.seeds == 3
    assert ours.mean["class_token_cosine"] == pytest.approx(0.7)
    assert ours.spread("class_token_cosine") == pytest.approx(0.25)  # 0.4 to 0.9
    assert ours.spread("top1") is None
    assert found[1].spread("class_token_cosine") is None  # one seed
    header, cells = method_table([DENSE, *rows, *others])
    assert header == ["model", "keep", "MACs", "speed-up", "params / size", "CLS cos", "patch cos", "time"]
    assert cells[3][5] == "0.7000 ± 0.2500"
    assert "(nominal 0 M)" in cells[4][2]
    assert method_table([DENSE, *rows], QUALITY)[0] == ["model", "keep", "MACs", "CLS cos", "patch cos"]
    notes = method_notes([DENSE, *rows, *others])
    assert notes[0] == "Means over 1 to 3 seeds; ± is half their range."
    assert notes[1].startswith("Nominal MACs")
    assert method_notes([DENSE, rows[0]]) == []


def test_an_ablation_shows_its_variants_and_errors():
    rows = [DENSE, *(row_of(variant=name, predicted_error=0.5, realised_error=0.25) for name in ABLATION)]
    header, cells = method_table(rows)
    assert header[-3:] == ["predicted", "realised", "time"]
    assert [line[0] for line in cells] == ["dense", *ABLATION]
    assert cells[1][-3:-1] == ["0.5", "0.25"]
    assert "predicted" not in method_table([row_of(predicted_error=0.5)])[0]


def test_published_files_of_the_first_version_still_load():
    old = {"method": "obs", "keep": 0.6, "macs": 10**9, "params": 10**6, "bytes": 10**7, "seconds": 3.0, "top1": None}
    assert "| ours | 0.6 | 1,000 M | 1.00 M / 10.0 MB | 3.0 s |" in markdown_table(method_table([MethodRow(**old)]))


@pytest.mark.parametrize("keeps", [(0.7, 0.5), (0.5,)])
def test_the_picture_is_not_blank(tmp_path, colours_of, keeps):
    rows = [DENSE]
    for keep in keeps:
        rows += [row_of(keep=keep, seed=seed, error=0.1 * (seed + 1)) for seed in range(3)]
        rows.append(row_of("imp", keep=keep, macs=1000, nominal_macs=int(1000 * keep), error=0.0))
    assert draw_pruning(rows, tmp_path / "a.png", title="tiny")
    colours = colours_of(tmp_path / "a.png")
    assert len(colours) > 50
    assert (193, 18, 31) in colours  # ours
    assert not draw_pruning([DENSE], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_peak_memory_is_that_of_the_block():
    with PeakMemory(torch.device("cpu")) as before:
        pass
    with PeakMemory(torch.device("cpu"), interval=0.001) as during:
        block = np.ones(64 * 2**20, np.uint8)
        threading.Event().wait(0.05)
        del block
    assert before.mib is not None
    assert during.mib is not None
    assert during.mib > before.mib + 48


def test_fingerprints_notice_other_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_text("one")
    before = fingerprint(tmp_path / "a")
    assert before == fingerprint(tmp_path / "a")
    (tmp_path / "a" / "1.png").write_text("other")
    assert before != fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "a" / "1.png")
