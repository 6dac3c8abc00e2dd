"""Channels of a CLIP ResNet: errors and refits against brute force, budget, quality against controls, disk."""

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hf_opentrans import CLIPResNetVisionConfig, CLIPResNetVisionModel, PruningConfig, prune_model
from hf_opentrans.cli import app
from hf_opentrans.pruning import ChannelPruningReport, channel_statistics, prune_channels
from hf_opentrans.pruning.calibration import Calibration
from hf_opentrans.pruning.channel_rebuild import rebuild_channels
from hf_opentrans.pruning.channel_selection import channel_menu
from hf_opentrans.pruning.channel_statistics import embed_parts, gather_inputs, trunk_metrics
from hf_opentrans.pruning.channel_trunk import Trunk, TrunkCost, observe, slice_channels
from hf_opentrans.pruning.importance import SELECTION_RIDGE

TINY: dict[str, Any] = {"depths": [2, 1, 1, 1], "width": 8, "projection_dim": 16, "num_attention_heads": 4}
DONE: dict[PruningConfig, Any] = {}


@torch.no_grad()
def make_model(seed=0, **changes) -> Any:
    """Return a ResNet whose normalisations have random scales and shifts, and the statistics of some images."""
    torch.manual_seed(seed)
    model = CLIPResNetVisionModel(CLIPResNetVisionConfig(**{**TINY, "image_size": 64, **changes})).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.add_(0.1 * torch.randn_like(module.weight))
            module.bias.add_(0.1 * torch.randn_like(module.bias))
            module.momentum = 1.0
    model(make_pixels(16, seed=2))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


def make_images(count=40, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, size=(count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC) for picture in coarse]


def make_pixels(count=24, seed=1):
    arrays = np.stack([np.array(image) for image in make_images(count, seed)])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 64 - 2


def make_calibration(fit=6, held_out=3):
    pixels = make_pixels(fit + held_out, seed=0)
    return Calibration(pixels[:fit].split(4), (pixels[fit:],), "none", fit + held_out)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pruned(model):
    """Return a function that prunes `model`; the same options are pruned once in all tests."""

    def get(**options):
        config = PruningConfig(**options)
        if config not in DONE:
            DONE[config] = prune_channels(model, make_images(), config)
        return DONE[config]

    return get


@torch.no_grad()
def cosine(small, dense, pixels):
    return float(torch.cosine_similarity(small(pixels).pooler_output, dense(pixels).pooler_output).mean())


@torch.no_grad()
def count_macs(model, side=64):
    """Count all convolutions by running them, from their outputs' sizes alone."""
    total = 0

    def count(conv, inputs, output):
        nonlocal total
        total += output[0].numel() * inputs[0].shape[1] * conv.kernel_size[0] ** 2

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    model(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return total


def sizes_of(menu) -> Any:
    return menu.sizes


def blocks_of(*trunks) -> Any:
    return [trunk.bottlenecks for trunk in trunks]


def windows(maps):
    """Return the 3 x 3 surroundings of every position, `(images * positions, channels * 9)`, without unfold."""
    padded = np.pad(maps.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    found = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return found.transpose(0, 2, 3, 1, 4, 5).reshape(-1, maps.shape[1] * 9)


def positions(maps):
    return maps.double().numpy().transpose(0, 2, 3, 1).reshape(-1, maps.shape[1])


# --- what is kept as it is ---


def test_keeping_everything_changes_no_bit(model):
    result = prune_channels(model, make_images(4), PruningConfig(keep=1.0))
    pixels = make_pixels(4)
    with torch.no_grad():
        ours, dense = result.model(pixels), model(pixels)
    assert torch.equal(ours.pooler_output, dense.pooler_output)
    assert torch.equal(ours.last_hidden_state, dense.last_hidden_state)
    assert result.report.realised_keep == 1
    assert result.report.embedding_error == pytest.approx(0, abs=1e-6)
    assert result.model.config.inner_channels is None


def test_input_stays_and_the_same_seed_gives_the_same_model(model, pruned):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = pruned(keep=0.5)
    second = prune_channels(model, make_images(), PruningConfig(keep=0.5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    states = [result.model.state_dict() for result in (first, second)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_only_inner_channels_change(model, pruned):
    small = pruned(keep=0.5).model
    untouched = [n for n in model.state_dict() if not n.startswith("layer") or "downsample" in n]
    assert len(untouched) > 30
    for name in untouched:
        assert torch.equal(small.state_dict()[name], model.state_dict()[name]), name
    for name in ("running_var", "weight", "bias"):  # of the widths between bottlenecks
        assert torch.equal(small.state_dict()[f"layer1.0.bn3.{name}"], model.state_dict()[f"layer1.0.bn3.{name}"])


@torch.no_grad()
def test_slicing_equals_silencing_the_other_channels(model):
    kept = tuple((tuple(range(1, a, 2)), tuple(range(0, b, 3))) for a, b in Trunk(model).widths)
    silenced = copy.deepcopy(model)
    for block, pair in zip(blocks_of(Trunk(silenced))[0], kept, strict=True):
        for norm, channels in zip((block.bn1, block.bn2), pair, strict=True):
            gone = sorted(set(range(norm.num_features)) - set(channels))
            norm.weight[gone], norm.bias[gone] = 0.0, 0.0
    small, pixels = slice_channels(model, kept), make_pixels(4)
    assert small.config.inner_channels == [[len(first), len(second)] for first, second in kept]
    expected = silenced(pixels).pooler_output
    assert float((small(pixels).pooler_output - expected).abs().max()) < 1e-5 * float(expected.abs().max())


# --- errors and refits against brute force ---


def test_errors_of_groups_equal_least_squares(model):
    trunk, calibration, config = Trunk(model), make_calibration(), PruningConfig(min_neurons=0.1)
    metrics = trunk_metrics(trunk, calibration, config)
    found = gather_inputs(trunk, 0, embed_parts(trunk, calibration), calibration, 0)
    price = TrunkCost.of(trunk, "macs", 64).bottlenecks[0]
    menu = channel_menu(trunk, 0, found, metrics, price, config)
    with torch.no_grad():
        seen = observe(trunk.bottlenecks[0], trunk.stem(torch.cat([*calibration.fit, *calibration.held_out])))
    block, full = trunk.bottlenecks[0], 8
    for name, group, rows, order in (
        ("conv2", 9, windows(seen.inputs["conv2"]), menu.order),
        ("conv3", 1, positions(seen.inputs["conv3"]), menu.second_order),
    ):
        root = np.linalg.cholesky(metrics[0, name].numpy() + 1e-12 * np.eye(len(metrics[0, name])))
        weight = getattr(block, name).weight.detach().flatten(1).double().numpy()
        centred = (rows - rows.mean(0)) / len(rows) ** 0.5
        ridge = SELECTION_RIDGE * (centred**2).sum(0).mean()
        data = np.concatenate([centred, ridge**0.5 * np.eye(rows.shape[1])])
        for removed in (1, 4, 7):
            kept = np.concatenate([np.arange(group) + group * unit for unit in order[removed:]])
            target = data @ weight.T @ root
            left = target - data[:, kept] @ np.linalg.lstsq(data[:, kept], target, rcond=None)[0]
            widths = (full - removed, full) if name == "conv2" else (full, full - removed)
            size = next(s for s in sizes_of(menu) if (s.units, s.second) == widths)
            assert size.error == pytest.approx((left**2).sum(), rel=1e-3), (name, removed)


def test_output_metric_is_the_second_moment_of_all_gradients(model):
    trunk, calibration = Trunk(model), make_calibration(fit=2, held_out=1)
    metrics = trunk_metrics(trunk, calibration, PruningConfig(probes=300))
    hidden = trunk.stem(torch.cat(calibration.fit)).detach()
    for block in trunk.bottlenecks[:3]:
        hidden = block(hidden).detach()
    seen = observe(trunk.bottlenecks[3], hidden.requires_grad_())
    tokens = trunk.finish(trunk.bottlenecks[4](seen.output))
    for name in ("conv2", "conv3"):
        exact = torch.zeros_like(metrics[3, name])
        for token in range(tokens.shape[1]):
            weight = 1.0 if token == 0 else 1 / (tokens.shape[1] - 1)
            for value in tokens[:, token].sum(0):  # images do not mix
                (gradient,) = torch.autograd.grad(value, seen.outputs[name], retain_graph=True)
                rows = gradient.transpose(0, 1).flatten(1).double()
                exact += weight * rows @ rows.T / len(tokens)
        assert float((metrics[3, name] - exact).norm() / exact.norm()) < 0.1
        assert float(metrics[3, name].trace() / exact.trace()) == pytest.approx(1, abs=0.05)


def ridge_solution(weight, rows, target, ridge):
    """Return weights and bias of the regression that shrinks towards `weight`, by numpy's lstsq."""
    centred = rows - rows.mean(0)
    residual = target - rows @ weight.T
    scale = (centred**2).sum(0).mean()
    data = np.concatenate([centred, (ridge * scale) ** 0.5 * np.eye(rows.shape[1])])
    change = np.linalg.lstsq(data, np.concatenate([residual - residual.mean(0), 0 * weight.T]), rcond=None)[0].T
    return weight + change, (residual - rows @ change.T).mean(0)


@torch.no_grad()
def test_refit_equals_lstsq_on_the_same_rows(model):
    calibration, config = make_calibration(fit=36, held_out=10), PruningConfig(keep=0.5)
    dense = Trunk(model)
    metrics = {
        (i, name): torch.eye(getattr(block, name).out_channels).double()
        for i, block in enumerate(dense.bottlenecks)
        for name in ("conv2", "conv3")
    }
    kept = tuple((tuple(range(0, a, 2)), tuple(range(1, b, 2))) for a, b in dense.widths)
    sliced, small = (Trunk(slice_channels(model, kept)) for _ in range(2))
    rebuilt = rebuild_channels(dense, small, kept, calibration, metrics, config)
    streams = [dense.stem(torch.cat([*calibration.fit, *calibration.held_out]))] * 2
    triples = zip(*blocks_of(dense, small, sliced), strict=True)
    for index, (block, thin, before) in enumerate(list(triples)[:3]):  # the third's shortcut has weights and a stride
        expected = observe(block, streams[0])
        reads = observe(thin, streams[1])
        target2 = positions(expected.outputs["conv2"][:, list(kept[index][1])])
        stretch = (block.bn3.weight / (block.bn3.running_var + block.bn3.eps).sqrt())[:, None, None]
        shortcuts = [b.downsample(s) if b.downsample else s for b, s in zip((block, thin), streams, strict=True)]
        gap = rebuilt[index, "conv3"].gap_factor * (shortcuts[0] - shortcuts[1]) / stretch
        target3 = positions(expected.outputs["conv3"] + gap)
        for number, rows, target in (
            (2, windows(reads.inputs["conv2"]), target2),
            (3, positions(reads.inputs["conv3"]), target3),
        ):
            done = rebuilt[index, f"conv{number}"]
            assert done.ridge is not None
            assert done.error < done.error_before
            weight = getattr(before, f"conv{number}").weight.flatten(1).double().numpy()
            solution, bias = ridge_solution(weight, rows, target, done.ridge)
            found = getattr(thin, f"conv{number}").weight.flatten(1).double().numpy()
            assert np.abs(found - solution).max() < 2e-3 * np.abs(solution).max()
            means = [getattr(b, f"bn{number}").running_mean for b in (before, thin)]
            assert (means[0] - means[1]).double().numpy() == pytest.approx(bias, abs=1e-3 * np.abs(target).max())
        streams = [expected.output, thin(streams[1])]


@torch.no_grad()
def plant_redundancy(model, is_dead):
    """Make the second half of the inner channels of the first three bottlenecks dead, or copies of the first half."""
    for block in blocks_of(Trunk(model))[0][:3]:
        for conv, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
            half = conv.out_channels // 2
            if is_dead:
                norm.weight[half:], norm.bias[half:] = 0.0, -0.1
            else:
                conv.weight[half:] = conv.weight[:half]
                for part in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    part[half:] = part[:half]


@pytest.mark.parametrize("is_dead", [True, False])
def test_planted_redundancy_leaves_without_loss(is_dead):
    model = make_model(seed=3)
    plant_redundancy(model, is_dead)
    noise = torch.randn(48, 3, 64, 64)  # smooth images leave some channels that nothing depends on
    trunk, calibration, config = Trunk(model), Calibration((noise[:40],), (noise[40:],), "none", 48), PruningConfig()
    metrics = trunk_metrics(trunk, calibration, config)
    hidden, kept = embed_parts(trunk, calibration), [(tuple(range(a)), tuple(range(b))) for a, b in trunk.widths]
    for index, price in enumerate(TrunkCost.of(trunk, "macs", 64).bottlenecks[:3]):
        found = gather_inputs(trunk, index, hidden, calibration, 0)
        menu = channel_menu(trunk, index, found, metrics, price, config)
        halves = [n // 2 for n in trunk.widths[index]]
        size = next(s for s in sizes_of(menu) if [s.units, s.second] == halves)
        kept[index] = menu.kept_pair(size)
        for channels, half in zip(kept[index], halves, strict=True):  # no dead one, one of each pair of copies
            assert sorted(c if is_dead else c % half for c in channels) == list(range(half))
        assert size.error < 0.02 * menu.sizes[-1].error
    small = Trunk(slice_channels(model, kept))
    rebuild_channels(trunk, small, tuple(kept), calibration, metrics, config)
    with torch.no_grad():
        pixels = torch.cat([*calibration.fit, *calibration.held_out])
        outputs = [m(pixels).pooler_output for m in (model, small.model)]
    assert float((outputs[1] - outputs[0]).abs().max()) < 1e-3 * float(outputs[0].abs().max())


# --- budget and quality ---


@pytest.mark.parametrize(
    "options", [{"keep": 0.5}, {"keep": 0.7, "unit": "params"}, {"keep": 0.5, "method": "random"}]
)
def test_budget_is_met_and_counted_right(model, pruned, options):
    result = pruned(**options)
    report, small = result.report, result.model
    assert options["keep"] - 0.02 <= report.realised_keep <= options["keep"]
    assert (report.dense_macs, report.macs) == (count_macs(model), count_macs(small))
    weights = [sum(m.weight.numel() for m in x.modules() if isinstance(m, torch.nn.Conv2d)) for x in (model, small)]
    assert [report.dense_params, report.params] == weights
    assert report.total_params == sum(p.numel() for p in small.parameters())
    used = (report.params, report.dense_params) if "unit" in options else (report.macs, report.dense_macs)
    assert report.realised_keep == used[0] / used[1]
    assert [[b.first, b.second] for b in report.bottlenecks] == small.config.inner_channels


def test_macs_are_counted_at_the_calibration_resolution(model):
    report = prune_channels(model, make_images(8), PruningConfig(keep=0.5, resolution=100)).report
    assert (report.resolution, report.dense_macs) == (96, count_macs(model, 96))


def test_ours_beats_the_controls_on_new_images(model, pruned):
    pixels = make_pixels()
    found = {
        method: cosine(pruned(method=method, keep=0.5).model, model, pixels) for method in ("random", "magnitude")
    }
    ours = cosine(pruned(keep=0.5).model, model, pixels)
    assert 1 - ours < 0.5 * (1 - max(found.values())), (ours, found)


def test_depth_order_refit_beats_the_local_one(model, pruned):
    errors = [pruned(keep=0.5, refit=refit).report.realised_error for refit in (True, False)]
    assert 0 < errors[0] < errors[1]


def test_predicted_error_is_near_the_realised_one(pruned):
    report = pruned(keep=0.5).report
    assert 0.1 < report.predicted_error / report.realised_error < 10
    assert report.predicted_error == pytest.approx(sum(b.predicted_error for b in report.bottlenecks))
    assert pruned(keep=0.5, method="random").report.predicted_error is None


def test_positions_are_drawn_by_the_seed(model, monkeypatch):
    monkeypatch.setattr(channel_statistics, "FEWEST_ROWS", 400)
    monkeypatch.setattr(channel_statistics, "ROWS", 2)
    seen = []
    monkeypatch.setattr(
        channel_statistics.CovarianceStatistics,
        "update",
        lambda self, rows, update=channel_statistics.CovarianceStatistics.update: (
            seen.append(len(rows)) or update(self, rows)
        ),
    )
    first = prune_channels(model, make_images(), PruningConfig(keep=0.5))
    assert seen[0] == 16 * 10  # of 256 positions
    assert cosine(first.model, model, make_pixels()) > 0.7
    other = prune_channels(model, make_images(), PruningConfig(keep=0.5, seed=1))
    assert not torch.equal(first.model.layer1[0].bn3.running_mean, other.model.layer1[0].bn3.running_mean)


# --- disk ---


def test_saved_model_is_the_same_and_so_is_one_from_its_weights(pruned, tmp_path, tiny_image_processor):
    result, pixels = pruned(keep=0.5), make_pixels(4)
    result.save_pretrained(tmp_path / "out", tiny_image_processor)
    result.save_pretrained(tmp_path / "out", tiny_image_processor)  # an earlier output may be replaced
    loaded = CLIPResNetVisionModel.from_pretrained(tmp_path / "out")
    state = {f"visual.{name}": value for name, value in result.model.state_dict().items()}
    rebuilt = CLIPResNetVisionModel.from_state_dict(state, num_attention_heads=4)
    with torch.no_grad():
        expected = result.model(pixels).pooler_output
        assert torch.equal(loaded(pixels).pooler_output, expected)
        assert torch.equal(rebuilt(pixels).pooler_output, expected)
    assert loaded.config.inner_channels == rebuilt.config.inner_channels == result.model.config.inner_channels
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    assert ChannelPruningReport.load(tmp_path / "out") == result.report
    json.dumps(result.report.to_dict())


def test_a_pruned_model_can_be_pruned_again(pruned):
    first = pruned(keep=0.5)
    again = prune_channels(first.model, make_images(), PruningConfig(keep=0.7))
    assert again.report.dense_macs == first.report.macs
    assert 0.68 <= again.report.realised_keep <= 0.7
    assert cosine(again.model, first.model, make_pixels()) > 0.8


def test_precision_and_mode_stay(model):
    half = make_model().to(torch.bfloat16).train()
    result = prune_channels(half, make_images(8), PruningConfig(keep=0.5, method="magnitude"))
    assert result.model.dtype == torch.bfloat16
    assert result.model.training


def test_command_line_prunes_it_too(model, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "images").mkdir()
    for index, image in enumerate(make_images(8)):
        image.save(tmp_path / "images" / f"{index}.png")

    def run(output, *more):
        command = ["prune", str(tmp_path / "dense"), "--images", str(tmp_path / "images"), "--output", str(output)]
        return CliRunner().invoke(app, [*command, "--keep", "0.6", *more])

    done = run(tmp_path / "out", "--method", "magnitude", "--json", str(tmp_path / "report.json"))
    assert done.exit_code == 0, done.stderr
    small: Any = CLIPResNetVisionModel.from_pretrained(tmp_path / "out")
    report = json.loads((tmp_path / "report.json").read_text())["report"]
    assert 0.58 <= report["realised_keep"] <= 0.6
    assert report["macs"] == count_macs(small)
    assert "layer4.0" in done.stdout
    assert "MACs of all convolutions" in done.stdout
    expected = prune_channels(model, tmp_path / "images", PruningConfig(keep=0.6, method="magnitude")).model
    with torch.no_grad():
        assert torch.equal(small(make_pixels(2)).pooler_output, expected(make_pixels(2)).pooler_output)
    again = run(tmp_path / "out", "--method", "random")
    assert again.exit_code == 0
    for options, message in (
        (["--min-heads", "2"], "min_heads is 2. It means nothing to the channels of a ResNet."),
        (["--plot", "x.png"], "--plot is given for a CLIP ResNet."),
    ):
        refused = run(tmp_path / "other", *options)
        assert refused.exit_code == 2
        assert message in " ".join(refused.stderr.split())


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "vbp"}, "method is 'vbp'. .* one of obs, magnitude, random"),
        ({"unit": "latency"}, "unit is 'latency'. .* one of macs, params"),
        ({"structures": ("mlp",)}, "structures is .* Leave it at"),
        ({"search": "evolution"}, "search is 'evolution'. It means nothing to the channels of a ResNet"),
        ({"min_heads": 2}, "min_heads is 2"),
        ({"round_head_dim": 4}, "round_head_dim is 4"),
        ({"protect_last_attention": False}, "protect_last_attention is False"),
        ({"keep": 0.05}, "is below what the floors allow: the floor min_neurons=0.1, the stem and the shortcuts"),
    ],
)
def test_options_that_cannot_be_met_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        prune_channels(model, make_images(4), PruningConfig(**options))


def test_other_models_are_refused_in_both_directions(model, tiny_clip):
    with pytest.raises(TypeError, match=r"The model is a CLIPModel. prune_channels needs a CLIPResNetVisionModel"):
        prune_channels(tiny_clip, make_images(4))
    with pytest.raises(TypeError, match=r"The model is a CLIPResNetVisionModel. .* Use prune_channels"):
        prune_model(model, make_images(4))


def test_what_is_not_finite_is_refused():
    model = make_model()
    with torch.no_grad():
        model.layer2[0].conv2.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer2.0.conv2.weight.* NaN or infinite"):
        prune_channels(model, make_images(4), PruningConfig(keep=0.5))


def test_few_images_are_noted(pruned):
    assert any("Fewer than 10 per input make the compensation noisy" in n for n in pruned(keep=0.5).report.notes)
    assert not pruned(keep=0.5, method="random").report.notes


def test_report_says_where_it_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no channel_pruning_report\.json"):
        ChannelPruningReport.load(tmp_path)


def test_more_is_lost_where_less_is_kept(pruned):
    errors = [pruned(keep=keep).report.realised_error for keep in (0.7, 0.5)]
    assert errors[0] < errors[1]
    assert replace(pruned(keep=0.5).report, notes=()).macs < pruned(keep=0.7).report.macs
