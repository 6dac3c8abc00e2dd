"""Reports of whole models: their numbers, files, tables and pictures, and the scores made of them."""

import json
import math
import sys
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GitConfig, GitForCausalLM, OwlViTConfig, OwlViTForObjectDetection
from transformers.pytorch_utils import Conv1D

from hf_opentrans.spectra import (
    LayerSpectrum,
    SpectralReport,
    TailFit,
    analyze_spectra,
    compute_spectrum,
    compute_windowed_spectrum,
    confidence_interval,
    ensemble_scores,
    fit_tail,
    hierarchical_scores,
    spectral_metrics,
)
from hf_opentrans.spectra.analysis import METRICS, layer_spectrum, weight_of
from hf_opentrans.spectra.esd import SpectralMetrics
from hf_opentrans.spectra.layers import MatrixLayer, find_layers
from hf_opentrans.spectra.plots import draw_spectrum

PATCHES = "vision_model.embeddings.patch_embedding"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def make_git():
    return GitForCausalLM(GitConfig(vision_config=VISION, **SIZES, **TOKENS))  # pyright: ignore[reportArgumentType]


def make_owl():
    text = {**SIZES, **TOKENS, "max_position_embeddings": 16}
    config = OwlViTConfig(text_config=text, vision_config=VISION, projection_dim=16)  # pyright: ignore[reportArgumentType]
    return OwlViTForObjectDetection(config)


def make_entry(name, *, group=None, alpha=2.0, interval=None, undecided=False, debiased=None, **metrics):
    """Return an entry whose group is its name without numbers, with the given values and dull others."""
    block = name.rpartition(".")[0]
    layer = MatrixLayer(name, name.rpartition(".")[2], group or name.rpartition(".")[2], block)
    is_fitted = math.isfinite(alpha)
    fit = TailFit(alpha, 1.0, 10, 0.1, 0.2, "hill", is_fitted, "" if is_fitted else "no", interval)
    plain: dict[str, Any] = {"spectral_norm": 1.0, "log_norm": 1.0, "log_spectral_norm": 0.0, "stable_rank": 4.0}
    plain |= {"effective_rank": 8.0, "entropy": 0.5, "mp_edge": 1.0, "mp_soft_rank": 1.0, "num_spikes": 0}
    return LayerSpectrum(
        layer,
        (20, 20),
        20,
        fit,
        SpectralMetrics(**(plain | metrics)),
        alpha_debiased=debiased,
        is_undecided=undecided or not is_fitted,
    )


def make_report(*entries):
    return SpectralReport("toy", "hill", False, entries, {})


def assert_has_ink(found, *colours):
    assert len(found) > 50
    assert set(colours) <= found


@pytest.mark.parametrize(("method", "compat"), [("hill", False), ("hill", True), ("peak", True), ("adaptive", False)])
def test_entries_equal_the_direct_functions(tiny_clip, method, compat):
    report = analyze_spectra(tiny_clip, fit=method, compat=compat, debias=True)
    layers = find_layers(tiny_clip)
    assert [entry.layer for entry in report.layers] == list(layers.values())
    assert (report.model, report.fit, report.compat, report.skipped) == ("CLIPModel", method, compat, {})
    for entry in report.layers:
        weight = weight_of(tiny_clip.get_submodule(entry.layer.name), compat=compat)
        spectrum = compute_spectrum(weight, compat=compat)
        fit, values = fit_tail(spectrum, method, compat=compat), spectrum.eigenvalues.numpy()
        assert entry.fit == fit
        assert entry.metrics == spectral_metrics(spectrum)
        assert (entry.shape, entry.num_eigenvalues) == (tuple(weight.shape), len(spectrum))
        assert entry.alpha_debiased == fit_tail(compute_windowed_spectrum(weight)).alpha
        assert entry.alpha_weighted == pytest.approx(fit.alpha * np.log10(values[-1]))
        assert entry.log_alpha_norm == pytest.approx(np.log10(np.sum(values**fit.alpha)))
        assert not entry.is_undecided


@pytest.mark.parametrize(
    ("make", "count", "skipped"),
    [(make_git, 26, set()), (make_owl, 30, {"class_head.logit_shift", "class_head.logit_scale", "box_head.dense2"})],
)
def test_any_model_works(make, count, skipped):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = analyze_spectra(model)
    assert len(report.layers) == count
    assert set(report.skipped) == skipped
    assert {entry.layer.name for entry in report.layers} | skipped == set(find_layers(model))
    for name, alpha in report.values("alpha").items():
        weight = weight_of(model.get_submodule(name))
        assert alpha == fit_tail(compute_spectrum(weight)).alpha
    assert report.model == type(model).__name__
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reports_are_the_same_in_single_precision_to_three_digits(tiny_clip):
    double, single = (analyze_spectra(tiny_clip, precision=kind) for kind in (torch.float64, torch.float32))
    assert double != single
    for name, alpha in double.values("alpha").items():
        assert single.values("alpha")[name] == pytest.approx(alpha, rel=1e-3)


def test_layers_can_be_chosen_and_are_counted(tiny_clip):
    progress = []
    report = analyze_spectra(
        tiny_clip,
        target_modules=["q_proj", "fc1"],
        exclude_modules="text_model.*",
        on_layer=lambda done, total: progress.append((done, total)),
    )
    expected = [name for name in find_layers(tiny_clip) if name.startswith("v") and name.endswith(("q_proj", "fc1"))]
    assert list(report.values("alpha")) == expected
    assert progress == [(place, 6) for place in range(1, 7)]


def test_models_are_named_without_local_folders(tiny_clip, tmp_path):
    chosen = ["visual_projection"]
    tiny_clip.config.name_or_path = "openai/clip"
    assert analyze_spectra(tiny_clip, target_modules=chosen).model == "openai/clip"
    (tmp_path / "my-clip").mkdir()
    tiny_clip.config.name_or_path = str(tmp_path / "my-clip")
    assert analyze_spectra(tiny_clip, target_modules=chosen).model == "my-clip"
    assert analyze_spectra(nn.Sequential(nn.Linear(12, 12))).model == "Sequential"


def test_a_patch_embedding_is_a_linear_layer_and_compat_keeps_its_slices(tiny_clip):
    weight = tiny_clip.vision_model.embeddings.patch_embedding.weight.detach()
    (entry,) = analyze_spectra(tiny_clip, target_modules=[PATCHES]).layers
    assert (entry.shape, entry.num_eigenvalues) == ((32, 192), 32)
    assert entry.fit.alpha == fit_tail(compute_spectrum(weight.reshape(32, 192))).alpha
    (entry,) = analyze_spectra(tiny_clip, target_modules=[PATCHES], compat=True).layers
    assert (entry.shape, entry.num_eigenvalues) == ((32, 3, 8, 8), 3 * 64)
    slices = np.linalg.svd(weight.double().permute(2, 3, 0, 1).numpy(), compute_uv=False) ** 2 / 2
    assert entry.metrics.spectral_norm == pytest.approx(np.sqrt(slices.max()))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(4, 6, 2, stride=2), (6, 16)),
        (nn.Conv2d(4, 6, 2), (6, 4, 2, 2)),  # windows overlap
        (nn.Conv2d(4, 6, 1), (6, 4, 1, 1)),
        (nn.Conv2d(4, 6, (2, 3), stride=(2, 2)), (6, 4, 2, 3)),
        (nn.Conv2d(4, 6, 2, stride=2, groups=2), (6, 2, 2, 2)),
        (nn.Conv1d(4, 6, 3, stride=3), (6, 12)),
        (nn.Conv3d(4, 6, 2, stride=2), (6, 32)),
        (nn.Linear(4, 6), (6, 4)),
        (Conv1D(6, 4), (6, 4)),  # stores its weight with the inputs first
    ],
)
def test_weights_have_their_outputs_first(module, shape):
    weight = weight_of(module)
    assert weight.shape == shape
    assert not weight.requires_grad
    if isinstance(module, nn.Conv2d):
        assert weight_of(module, compat=True).shape == module.weight.shape


def test_modules_without_a_weight_are_refused():
    with pytest.raises(TypeError, match=r"The LayerNorm has no weight tensor\. Leave this layer out"):
        weight_of(nn.LayerNorm(4, elementwise_affine=False))


def test_fused_projections_are_analysed_in_parts():
    model = named(qkv=nn.Linear(16, 48), plain=nn.Linear(16, 48))
    fused, plain = analyze_spectra(model).layers
    assert (fused.num_eigenvalues, plain.num_eigenvalues) == (48, 16)
    assert fused.fit == fit_tail(compute_spectrum(weight_of(model.get_submodule("qkv")), parts=3))
    spectrum = layer_spectrum(model, "qkv")
    assert (len(spectrum), spectrum.matrices) == (48, 3)
    with pytest.raises(ValueError, match=r"no linear or convolution layer 'gone'\. One of qkv, plain is meant"):
        layer_spectrum(model, "gone")


def test_missing_layers_are_suggested_in_part(tiny_clip):
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.out_proj, \.\.\. \(33 in all\) is meant"):
        layer_spectrum(tiny_clip, "gone")


def toy_with_unfit_layers():
    model = named(
        good=nn.Linear(16, 16),
        long=nn.Linear(16, 128),
        few=nn.Linear(9, 9),
        stem=nn.Conv2d(3, 8, (1, 3)),
        enough=nn.Conv2d(3, 8, (1, 4)),
        zero=nn.Linear(16, 16),
    )
    nn.init.zeros_(model.get_submodule("zero").weight)  # pyright: ignore[reportArgumentType]
    return model


def test_unfit_layers_are_skipped_for_a_reason():
    report = analyze_spectra(toy_with_unfit_layers())
    assert list(report.values("alpha")) == ["good", "enough"]
    assert report.skipped == {
        "long": "its sides (128, 16) differ by a factor of 8 or more",
        "few": "it has 9 eigenvalues, fewer than 10",
        "stem": "it has 9 eigenvalues, fewer than 10",
        "zero": "its weight is zero everywhere",
    }


def test_low_rank_layers_keep_their_metrics_and_have_no_alpha(tmp_path):
    model = named(low=nn.Linear(32, 32), full=nn.Linear(32, 32))
    low = model.get_submodule("low")
    low.weight = nn.Parameter(torch.randn(32, 9, dtype=torch.float64) @ torch.randn(9, 32, dtype=torch.float64))
    report = analyze_spectra(model, debias=True)
    entry = report.layers[0]
    assert (entry.fit.reliable, entry.fit.note, entry.is_undecided) == (False, "the weight is of low rank", True)
    assert entry.num_eigenvalues == 9
    for metric in ("alpha", "alpha_weighted", "log_alpha_norm", "alpha_debiased"):
        assert entry.value(metric) is None
        assert report.layers[1].value(metric) is not None
    assert 1 < (entry.value("stable_rank") or 0) < 9
    report.save(tmp_path / "report.json")
    loaded = SpectralReport.load(tmp_path / "report.json")
    assert loaded.to_dict() == report.to_dict()
    assert math.isnan(loaded.layers[0].fit.alpha)
    assert report.table()[1][0][2] == "- ?"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = named(good=nn.Linear(16, 16), bad=nn.Linear(16, 16))
    with torch.no_grad():
        weight_of(model.get_submodule("bad"))[3, 3] = value
    with pytest.raises(ValueError, match=r"Layer 'bad': The weight is not finite"):
        analyze_spectra(model)


def test_a_model_of_tiny_layers_is_refused():
    with pytest.raises(ValueError, match=r"None of the 2 layers has a spectrum to fit \('0': it has 4 eigenvalues"):
        analyze_spectra(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_unknown_fits_and_metrics_are_refused(tiny_clip):
    with pytest.raises(ValueError, match=r"The fit is 'best'\. It must be one of hill, peak"):
        analyze_spectra(tiny_clip, fit="best")
    report = make_report(make_entry("a"))
    for call in (report.values, report.layers[0].value, lambda name: hierarchical_scores(report, name)):
        with pytest.raises(ValueError, match=r"The metric is 'beta'\. It must be one of alpha, ks_distance, "):
            call("beta")


def test_every_metric_has_a_value(tiny_clip):
    (entry,) = analyze_spectra(tiny_clip, target_modules=["visual_projection"], debias=True).layers
    flat = entry.to_dict()
    assert {name: entry.value(name) for name in METRICS} == {name: flat[name] for name in METRICS}
    assert None not in [flat[name] for name in METRICS]


@pytest.mark.parametrize("options", [{}, {"fit": "peak", "compat": True}, {"debias": True, "intervals": True}])
def test_reports_survive_a_file(tiny_clip, tmp_path, options):
    report = analyze_spectra(tiny_clip, target_modules=["visual_projection", "0.mlp.fc1"], **options)
    report.save(tmp_path / "report.json")
    assert SpectralReport.load(tmp_path / "report.json") == report


def test_files_hold_one_flat_object_per_layer_and_no_nan(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    make_report(make_entry("a", alpha=float("nan")), make_entry("b")).save(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert set(values) == {"model", "fit", "compat", "layers", "skipped"}
    names = {"name", "type", "group", "block", "shape", "alpha", "xmin", "ks_distance", "tail_count", "interval"}
    names |= {"stable_rank", "num_spikes", "alpha_weighted", "log_alpha_norm", "alpha_debiased", "is_undecided"}
    for entry in values["layers"]:
        assert names <= set(entry)
        assert not any(isinstance(value, dict) for value in entry.values())
    assert (values["layers"][0]["alpha"], values["layers"][1]["alpha"]) == (None, 2.0)
    assert values["layers"][1]["shape"] == [20, 20]


@pytest.mark.parametrize("text", ["{", "[]", "3", "{}", '{"layers": [{"name": "a"}]}', '{"layers": []}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json' is no spectral report \(.*Give another file, or the model"):
        SpectralReport.load(tmp_path / "other.json")


def test_intervals_wider_than_the_spread_between_layers_are_undecided():
    # Aspect ratios of 1, 2, 4 and 7 spread alpha; 12 eigenvalues leave it wide open.
    model = named(
        square=nn.Linear(64, 64),
        wide=nn.Linear(96, 48),
        wider=nn.Linear(192, 48),
        longest=nn.Linear(336, 48),
        small=nn.Linear(12, 72),
    )
    report = analyze_spectra(model, intervals=True)
    alphas = [entry.fit.alpha for entry in report.layers]
    spread = np.quantile(alphas, 0.975) - np.quantile(alphas, 0.025)
    expected = []
    for entry in report.layers:
        interval = confidence_interval(compute_spectrum(weight_of(model.get_submodule(entry.layer.name))))
        assert entry.fit.interval == interval
        assert interval[0] < entry.fit.alpha < interval[1]
        expected.append(interval[1] - interval[0] > spread)
    assert [entry.is_undecided for entry in report.layers] == expected
    assert set(expected) == {False, True}
    assert not any(entry.is_undecided for entry in analyze_spectra(model).layers)


def test_tables_have_the_columns_that_were_measured():
    def cells_of(report, line=0):
        header, cells = report.table()
        return dict(zip(header, cells[line], strict=True))

    plain = make_report(make_entry("a.0.fc"), make_entry("a.1.fc", alpha=float("nan")))
    expected = {
        "layer": "a.0.fc",
        "shape": "20x20",
        "alpha": "2.000",
        "KS": "0.100",
        "stable rank": "4.0",
        "spikes": "0",
    }
    assert expected.items() <= cells_of(plain).items()
    assert cells_of(plain, 1).items() >= {"layer": "a.1.fc", "alpha": "- ?", "KS": "-"}.items()
    assert not {"interval", "debiased"} & set(cells_of(plain))
    full = make_report(make_entry("b", alpha=2.5, interval=(1.5, 4.25), undecided=True, debiased=2.125, num_spikes=3))
    expected = {"alpha": "2.500 ?", "interval": "1.50-4.25", "debiased": "2.125", "spikes": "3"}
    assert expected.items() <= cells_of(full).items()


@pytest.mark.parametrize("metric", ["alpha", "stable_rank"])
def test_hierarchical_scores_equal_numpy(tiny_clip, metric):
    report = analyze_spectra(tiny_clip)
    scores, values = hierarchical_scores(report, metric), report.values(metric)
    layers = find_layers(tiny_clip)
    expected = {}
    for name, layer in layers.items():
        kin = np.array([values[other] for other in layers if layers[other].group == layer.group], dtype=float)
        expected[name] = (values[name] - kin.mean()) / kin.std() if len(kin) > 1 else 0.0
    assert scores.metric == metric
    assert scores.modules == pytest.approx(expected)
    assert list(scores.modules) == list(layers)
    members = {}
    for name, layer in layers.items():
        members.setdefault(layer.block, []).append(expected[name])
    blocks = {block: np.mean(found) for block, found in members.items()}
    assert scores.blocks == pytest.approx(blocks)
    means = np.array(list(blocks.values()))
    assert list(scores.model.values()) == pytest.approx((means - means.mean()) / means.std())
    assert list(scores.model) == list(scores.blocks)
    assert np.std(list(scores.modules.values())) > 0.5


def test_hierarchical_scores_of_what_was_not_measured_are_zero():
    nan = float("nan")
    layers = [("0.fc", 1.0), ("1.fc", nan), ("2.fc", 3.0), ("0.qk", 5.0), ("1.qk", 5.0), ("2.qk", nan)]
    scores = hierarchical_scores(make_report(*(make_entry(name, alpha=alpha) for name, alpha in layers)))
    # fc: mean 2, deviation 1 over the two known; qk: no deviation.
    assert scores.modules == {"0.fc": -1.0, "1.fc": 0.0, "2.fc": 1.0, "0.qk": 0.0, "1.qk": 0.0, "2.qk": 0.0}
    assert scores.blocks == {"0": -0.5, "1": 0.0, "2": 0.5}
    assert scores.model == pytest.approx({"0": -math.sqrt(1.5), "1": 0.0, "2": math.sqrt(1.5)})


def test_ensemble_ranks_by_hand():
    report = make_report(
        make_entry("0.fc", stable_rank=1.0, num_spikes=5),
        make_entry("1.fc", stable_rank=2.0, num_spikes=None),
        make_entry("2.fc", stable_rank=2.0, num_spikes=1),
        make_entry("3.fc", stable_rank=9.0, num_spikes=1),
        make_entry("0.qk", stable_rank=100.0, num_spikes=0),
    )
    # Stable rank, fc: ranks 1, 2.5, 2.5, 4 of 4 -> (rank - 1/2) / 4. A layer without company is in the middle.
    ranks = {"0.fc": 0.125, "1.fc": 0.5, "2.fc": 0.5, "3.fc": 0.875, "0.qk": 0.5}
    assert ensemble_scores(report, {"stable_rank": 2.0}) == pytest.approx(ranks)
    # Spikes, fc: ranks 3, -, 1.5, 1.5 of 3 -> 5/6, middle, 1/3, 1/3; few are good: 1 - rank.
    spikes = {"0.fc": 1 / 6, "1.fc": 0.5, "2.fc": 2 / 3, "3.fc": 2 / 3, "0.qk": 0.5}
    assert ensemble_scores(report, {"num_spikes": -0.5}) == pytest.approx(spikes)
    both = {name: (3 * ranks[name] + spikes[name]) / 4 for name in ranks}
    assert ensemble_scores(report, {"stable_rank": 3.0, "num_spikes": -1.0}) == pytest.approx(both)
    unused = {"stable_rank": 1.0, "entropy": 0.0}
    assert ensemble_scores(report, unused) == pytest.approx(ranks)


def test_an_undecided_alpha_is_in_the_middle_and_other_metrics_of_the_layer_count():
    entries = [
        make_entry("0.fc", alpha=1.5, stable_rank=1.0),
        make_entry("1.fc", alpha=9.0, stable_rank=2.0, undecided=True),
        make_entry("2.fc", alpha=2.5, stable_rank=3.0),
    ]
    scores = ensemble_scores(make_report(*entries), {"alpha": 1.0})
    assert scores == pytest.approx({"0.fc": 0.25, "1.fc": 0.5, "2.fc": 0.75})
    scores = ensemble_scores(make_report(*entries), {"stable_rank": 1.0})
    assert scores == pytest.approx({"0.fc": 1 / 6, "1.fc": 0.5, "2.fc": 5 / 6})
    decided = make_report(*(replace(entry, is_undecided=False) for entry in entries))
    assert ensemble_scores(decided, {"alpha": 1.0}) == pytest.approx({"0.fc": 1 / 6, "1.fc": 5 / 6, "2.fc": 0.5})


def test_the_default_ensemble_is_four_metrics(tiny_clip):
    report = analyze_spectra(tiny_clip, target_modules=["q_proj", "fc1"], debias=True)
    weights = {"alpha_debiased": 1.0, "stable_rank": 1.0, "effective_rank": 1.0, "num_spikes": -1.0}
    single = [ensemble_scores(report, {metric: weight}) for metric, weight in weights.items()]
    found = ensemble_scores(report)
    assert found == pytest.approx({name: np.mean([scores[name] for scores in single]) for name in found})
    assert all(0 < score < 1 for score in found.values())
    assert len(set(found.values())) > 2


def test_ensembles_without_a_metric_are_refused(tiny_clip):
    report = make_report(make_entry("0.fc"))
    with pytest.raises(ValueError, match=r"The report has no 'alpha_debiased'.*debias=True"):
        ensemble_scores(report)
    for weights in ({}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match="At least one must not be zero"):
            ensemble_scores(report, weights)
    with pytest.raises(ValueError, match="The metric is 'beta'"):
        ensemble_scores(report, {"beta": 1.0})


def entries_to_draw():
    blocks = [(f"layers.{index}.{kind}", kind) for index in range(4) for kind in ("fc1", "q_proj")]
    entries = [
        make_entry(name, group=f"layers.*.{kind}", alpha=2.0 + place / 4, interval=(1.5, 5.0))
        for place, (name, kind) in enumerate(blocks)
    ]
    entries[3] = replace(entries[3], is_undecided=True)
    return [*entries, make_entry("stem.conv"), make_entry("head.out", alpha=float("nan"))]


def test_the_picture_of_a_report_is_not_blank(tmp_path, colours_of):
    report = make_report(*entries_to_draw())
    figure = report.plot(tmp_path / "report.png")
    assert_has_ink(colours_of(tmp_path / "report.png"), (0, 114, 178), (230, 159, 0))  # the first two lines
    (axis,) = figure.axes
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert labels == ["fc1", "q_proj", "other", "median 2.75"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "2", "3", "stem", "head"]
    assert points_of(axis, label="fc1") == [(0, 2.0), (1, 2.5), (2, 3.0), (3, 3.5)]
    assert points_of(axis, label="q_proj") == [(0, 2.25), (1, 2.75), (2, 3.25), (3, 3.75)]
    assert points_of(axis, label="other") == [(4, 2.0)]  # the head has no alpha
    assert points_of(axis, markerfacecolor="white") == [(1, 2.75)]
    bars = [line.get_xdata()[0] for line in axis.lines if list(line.get_ydata()) == [1.5, 5.0]]
    assert sorted(bars) == [0, 0, 1, 1, 2, 2, 3, 3]


def points_of(axis, **wanted):
    """Return the points of the lines with given properties."""
    lines = [line for line in axis.lines if all(getattr(line, f"get_{name}")() == v for name, v in wanted.items())]
    return [point for line in lines for point in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_intervals_are_drawn_for_alpha_alone():
    (axis,) = make_report(*entries_to_draw()).plot(metric="stable_rank").axes
    assert axis.get_ylabel() == "stable rank"
    assert not [line for line in axis.lines if list(line.get_ydata()) == [1.5, 5.0]]
    assert points_of(axis, label="other") == [(4, 4.0), (5, 4.0)]


def test_metrics_that_cannot_be_drawn_are_refused(tmp_path):
    report = make_report(make_entry("a"))
    with pytest.raises(ValueError, match=r"No layer of the report has 'alpha_debiased'\. Measure it first"):
        report.plot(tmp_path / "a.png", metric="alpha_debiased")
    with pytest.raises(ValueError, match="The metric is 'beta'"):
        report.plot(tmp_path / "a.png", metric="beta")
    assert not (tmp_path / "a.png").exists()


def test_pictures_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spectrum = compute_spectrum(torch.randn(16, 16))
    for draw in (make_report(make_entry("a")).plot, lambda: draw_spectrum(spectrum, fit_tail(spectrum))):
        with pytest.raises(ImportError, match=r"`matplotlib` is needed .* pip install \"hf_opentrans\[demo\]\""):
            draw()


def test_the_picture_of_a_spectrum_shows_the_fit(tmp_path, colours_of):
    spectrum = compute_spectrum(torch.randn(40, 60))
    fit = fit_tail(spectrum)
    figure = draw_spectrum(spectrum, fit, tmp_path / "a.png", title="layers.3.fc1")
    assert_has_ink(colours_of(tmp_path / "a.png"), (158, 202, 225), (193, 18, 31))  # bars, fit
    left, right = figure.axes
    assert left.get_legend().get_texts()[0].get_text() == f"alpha {fit.alpha:.2f}, KS {fit.ks_distance:.3f}"
    points, line = right.lines
    assert len(points.get_xdata()) == 40
    assert points.get_ydata()[[0, -1]].tolist() == pytest.approx([1, 1 / 40])
    x, share = line.get_xdata(), line.get_ydata()
    assert (x[0], share[0]) == pytest.approx((fit.xmin, fit.tail_count / 40))
    assert np.diff(np.log(share)) / np.diff(np.log(x)) == pytest.approx([1 - fit.alpha] * 49)
    # The drawn density is the derivative of the drawn share of smaller eigenvalues.
    density = left.lines[0].get_ydata()
    assert density == pytest.approx(share * (fit.alpha - 1) / x)
    assert figure.get_suptitle() == "layers.3.fc1"


def test_the_picture_of_a_spectrum_without_a_fit_has_no_line():
    spectrum = compute_spectrum(torch.randn(20, 20))
    nan = float("nan")
    left, right = draw_spectrum(spectrum, TailFit(nan, nan, 0, 1.0, nan, "hill", reliable=False)).axes
    assert (len(left.lines), len(right.lines)) == (0, 1)
    assert left.get_legend() is None
