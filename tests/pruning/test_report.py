"""The report: what is written comes back, and what is drawn can be seen."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hf_opentrans import PruningConfig, prune_model
from hf_opentrans.pruning.report import REPORT_FILE, LayerReport, MenuCurve, PruningReport


def make_report(method="obs", **changes):
    """Return a report with every field filled, as of a tower of two layers."""
    layers = (
        LayerReport(2, 20, 4, 64, 4, 6, 8, 8, 0.25, 0.125, 0.5, 0.25, 0.75, 1e-3, None, 0.5, 1.0),
        LayerReport(4, 64, 4, 64, 8, 8, 8, 8),
    )
    curves = (
        MenuCurve(0, "heads", (0.0, 0.5, 1.0), (0.9, 0.2, 0.0), 1),
        MenuCurve(0, "neurons", (0.25, 1.0), (0.3, 0.0), None),
        MenuCurve(1, "heads", (1.0,), (0.0,), 0),
    )
    values = {
        "config": PruningConfig(method=method).to_dict(),
        "layers": layers,
        "resolution": 32,
        "dense_macs": 1000,
        "macs": 600,
        "dense_params": 500,
        "params": 300,
        "realised_keep": 0.6,
        "calibration_images": 40,
        "calibration_tokens": 680,
        "seconds": {"selection": 1.5, "total": 2.25},
        "notes": ("A note.", "Another one: ü."),
        "predicted_error": 0.125,
        "realised_error": 0.1,
        "nominal_macs": 601,
        "curves": curves,
    }
    return PruningReport(**values | changes)


@pytest.fixture
def pruned(tiny_clip, tiny_images):
    """Return a function that prunes `tiny_clip` by any method and returns the report."""

    def get(method):
        images = [image.rotate(turn) for image in tiny_images for turn in (0, 90, 180, 270, 45)]
        return prune_model(tiny_clip, images, PruningConfig(keep=0.6, method=method)).report

    return get


def drawn(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def texts(panel):
    return [text.get_text() for text in panel.texts]


def test_every_field_comes_back(tmp_path):
    report = make_report()
    report.save(tmp_path)
    loaded = PruningReport.load(tmp_path)
    assert loaded == replace(report, config=loaded.config)
    assert PruningConfig(**loaded.config) == PruningConfig(**report.config)  # its tuple is a list in JSON
    values = json.loads((tmp_path / REPORT_FILE).read_text(encoding="utf-8"))
    assert values["layers"][0]["v_head_dim"] == 6
    assert values["curves"][0] == {
        "layer": 0,
        "kind": "heads",
        "costs": [0.0, 0.5, 1.0],
        "errors": [0.9, 0.2, 0.0],
        "chosen": 1,
    }
    assert PruningConfig(**values["config"]) == PruningConfig()


@pytest.mark.parametrize("method", ["obs", "magnitude", "imp"])
def test_the_report_of_a_run_comes_back_and_is_drawn(tmp_path, pruned, colours_of, method):
    report = pruned(method)
    report.save(tmp_path)
    loaded = PruningReport.load(tmp_path)
    assert loaded.to_dict() == json.loads(json.dumps(report.to_dict())) | {
        "layers": loaded.to_dict()["layers"],
        "curves": loaded.to_dict()["curves"],
        "notes": report.notes,
        "config": loaded.config,
    }
    assert (loaded.layers, loaded.curves, loaded.notes) == (report.layers, report.curves, report.notes)
    figure = loaded.plot(tmp_path / "report.png")
    pixels = drawn(tmp_path / "report.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    assert 0.01 < (pixels != 255).any(-1).mean() < 0.9
    assert len(colours_of(tmp_path / "report.png")) > 50
    widths, errors, heads, neurons = figure.axes
    assert len(widths.patches) == 4 * 3  # four widths of three layers
    kept = [bar.get_height() for bar in widths.containers[0]]
    assert kept == [layer.heads / layer.dense_heads for layer in report.layers]
    if method == "obs":
        # The protected attention has nothing to choose; every other curve has a marker.
        assert (len(heads.lines), len(neurons.lines)) == (2 * 2, 3 * 2)
        assert len(errors.lines) >= 3
        assert texts(errors) == texts(heads) == texts(neurons) == []
        line, marker = neurons.lines[:2]
        curve = report.curves[1]
        assert list(line.get_xdata()) == list(curve.costs)
        assert list(marker.get_xdata()) == [curve.costs[curve.chosen or 0]]
    else:
        assert texts(errors) == ["this method measures no errors"]
        assert texts(heads) == texts(neurons) == ["nothing to choose here"]
    title = figure.get_suptitle()
    assert title == f"{method}, {report.macs / report.dense_macs:.1%} of the MACs at 32 px"


def test_drawing_needs_no_file(tmp_path):
    figure = make_report().plot()
    assert len(figure.axes) == 4
    assert list(tmp_path.iterdir()) == []
    figure = make_report("random", curves=(), layers=(LayerReport(0, 0, 4, 64, 0, 0, 8, 8),)).plot()
    assert texts(figure.axes[1]) == ["this method measures no errors"]


def test_older_reports_without_curves_are_read(tmp_path):
    make_report().save(tmp_path)
    values = json.loads((tmp_path / REPORT_FILE).read_text(encoding="utf-8"))
    for name in ("curves", "notes", "predicted_error", "realised_error", "nominal_macs"):
        del values[name]
    for layer in values["layers"]:
        for name in ("qk_head_dim", "v_head_dim", "predicted_error", "heads_gap_factor"):
            del layer[name]
    (tmp_path / REPORT_FILE).write_text(json.dumps(values), encoding="utf-8")
    loaded = PruningReport.load(tmp_path)
    assert (loaded.curves, loaded.notes, loaded.predicted_error, loaded.nominal_macs) == ((), (), None, None)
    loaded.plot(tmp_path / "old.png")
    assert (drawn(tmp_path / "old.png") != 255).any()


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"There is no {REPORT_FILE} in .*that pruning wrote"):
        PruningReport.load(tmp_path)


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib.*hf_opentrans\[demo\]"):
        make_report().plot()
