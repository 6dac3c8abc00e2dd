"""Choosing layers by every rule, freezing the others, and their learning rates; against values worked out here."""

import json
import random
import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_opentrans.spectra.analysis import LayerSpectrum, SpectralReport, analyze_spectra
from hf_opentrans.spectra.esd import SpectralMetrics
from hf_opentrans.spectra.gradients import gradient_scores
from hf_opentrans.spectra.layers import MatrixLayer
from hf_opentrans.spectra.selection import (
    GRANULARITIES,
    RULES,
    LayerSelection,
    freeze_unselected,
    parameter_groups,
    select_layers,
)
from hf_opentrans.spectra.tail_fits import TailFit

NAN = float("nan")


def make_entry(name, alpha, debiased=None, undecided=False, **metrics):
    """Return one layer of a report; blocks are `layers.N`, and all layers of one last name form a group."""
    parts = name.split(".")
    last = next(part for part in reversed(parts) if not part.isdigit())
    group = ".".join("*" if part.isdigit() else part for part in parts)
    layer = MatrixLayer(name, last, group, ".".join(parts[:2]))
    exponent = NAN if alpha is None else alpha
    fit = TailFit(exponent, 1.0, 8, 0.1, 0.1, "hill", alpha is not None)
    values = {"stable_rank": 1.0, "effective_rank": 1.0, "num_spikes": 0} | metrics
    other = {"entropy": 0.5, "mp_edge": 1.0, "mp_soft_rank": 1.0}
    found = SpectralMetrics(spectral_norm=1.0, log_norm=0.0, log_spectral_norm=0.0, **other, **values)
    return LayerSpectrum(layer, (8, 8), 8, fit, found, alpha_debiased=debiased, is_undecided=undecided)


def make_report(*entries):
    return SpectralReport("tiny", "hill", False, tuple(entries), {})


def report_of(alphas, name="layers.{}"):
    return make_report(*(make_entry(name.format(index), alpha) for index, alpha in enumerate(alphas)))


def indices(names):
    return [int(name.split(".")[1]) for name in names]


def distinct(count, seed=0):
    """Return shuffled values, all different."""
    return [1.5 + place / 8 for place in random.Random(seed).sample(range(count), count)]


class Stack(nn.Module):
    """Layers `layers.0` to `layers.10`, a norm, and another norm whose name ends alike."""

    def __init__(self, depth=11, width=8):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.norm, self.head_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head_norm(self.norm(x))


@pytest.fixture
def stack():
    return Stack()


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameters_of(*modules):
    return {f"{name}.{part}" for name in modules for part in ("weight", "bias")}


def chosen(*names, of=11):
    """Return a selection of these layers of `Stack`."""
    others = [f"layers.{index}" for index in range(of) if f"layers.{index}" not in names]
    scores = dict.fromkeys(others, 0.0) | dict.fromkeys(names, 1.0)
    return LayerSelection("alpha", 0.5, "module", tuple(names), tuple(others), scores)


# Rules on spectra.


def test_alpha_trains_the_lightest_tails_and_freezes_those_below_the_median():
    alphas = distinct(55)
    selection = select_layers(report_of(alphas))
    assert (selection.rule, selection.fraction, selection.granularity) == ("alpha", 0.5, "module")
    assert len(selection.frozen) == 27
    assert indices(selection.frozen) == [i for i, alpha in enumerate(alphas) if alpha < statistics.median(alphas)]
    assert indices(selection.names) == [i for i, alpha in enumerate(alphas) if alpha >= statistics.median(alphas)]
    assert selection.scores == {f"layers.{index}": alpha for index, alpha in enumerate(alphas)}
    assert selection.notes == ()


def test_alpha_star_is_the_complement_of_an_even_number_of_layers():
    report = report_of(distinct(24))
    light, heavy = select_layers(report, "alpha"), select_layers(report, "alpha_star")
    assert heavy.names == light.frozen
    assert heavy.frozen == light.names
    assert heavy.scores == {name: -alpha for name, alpha in light.scores.items()}


def test_the_debiased_alpha_is_another_score_than_alpha():
    report = make_report(*(make_entry(f"layers.{index}", 2 + index, 9 - index) for index in range(4)))
    assert indices(select_layers(report, "alpha").names) == [2, 3]
    selection = select_layers(report, "alpha_debiased")
    assert indices(selection.names) == [0, 1]
    assert list(selection.scores.values()) == [9, 8, 7, 6]


def test_the_ensemble_is_the_mean_rank_of_four_metrics():
    rows = [
        # alpha_debiased, stable_rank, effective_rank, num_spikes (few are light)
        (4.0, 1.0, 5.0, 0),
        (3.0, 4.0, 9.0, 1),
        (2.0, 3.0, 1.0, 2),
        (1.0, 2.0, 2.0, 3),
    ]
    entries = [
        make_entry(f"layers.{i}", 2.0, d, stable_rank=s, effective_rank=e, num_spikes=n)
        for i, (d, s, e, n) in enumerate(rows)
    ]
    places = [(4, 1, 3, 4), (3, 4, 4, 3), (2, 3, 1, 2), (1, 2, 2, 1)]  # 4 is the largest, or the fewest spikes
    expected = [statistics.fmean((place - 0.5) / 4 for place in row) for row in places]
    selection = select_layers(make_report(*entries), "ensemble")
    assert list(selection.scores.values()) == pytest.approx(expected)
    assert indices(selection.names) == [0, 1]
    undecided = [replace(entries[0], is_undecided=True), *entries[1:]]
    scores = select_layers(make_report(*undecided), "ensemble").scores
    assert scores["layers.0"] == pytest.approx(statistics.fmean([0.5, 0.5 / 4, 2.5 / 4, 3.5 / 4]))


@pytest.mark.parametrize("rule", ["alpha_debiased", "ensemble"])
def test_rules_on_debiased_tails_need_them_measured(rule):
    with pytest.raises(ValueError, match="debias=True"):
        select_layers(report_of([2.0, 3.0]), rule)


def test_a_report_without_any_alpha_is_refused():
    with pytest.raises(ValueError, match="No layer of the report has a value for rule 'alpha'"):
        select_layers(report_of([None, None]))


@pytest.mark.parametrize("rule", ["alpha", "alpha_star", "alpha_debiased", "ensemble"])
def test_a_model_is_analysed_first(rule):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    report = analyze_spectra(model, debias=True)
    assert select_layers(model, rule) == select_layers(report, rule)


def test_layers_without_a_tail_get_the_median_and_are_named():
    alphas = [2.0, None, 4.0, 7.0, None]
    selection = select_layers(report_of(alphas), fraction=0.2)
    assert list(selection.scores.values()) == [2, 4, 4, 7, 4]
    assert indices(selection.names) == [3]
    (note,) = selection.notes
    assert "layers.1, layers.4" in note
    assert "median" in note
    # The median of alpha_star is that of the reversed scores.
    assert select_layers(report_of(alphas), "alpha_star").scores["layers.1"] == -4


# Rules without spectra.


def test_random_layers_depend_on_the_seed_alone(stack):
    draws = {seed: select_layers(stack, "random", 0.4, seed=seed) for seed in range(6)}
    assert {len(selection.names) for selection in draws.values()} == {5}
    assert len({selection.names for selection in draws.values()}) > 3
    random.seed(99)
    again = select_layers(stack, "random", 0.4, seed=3)
    assert again == draws[3]
    assert again.seed == 3
    state = random.getstate()
    select_layers(stack, "random", seed=5)
    assert random.getstate() == state
    on_report = select_layers(report_of(distinct(11)), "random", 0.4, seed=3)
    assert on_report.names == again.names


def test_depth_trains_the_last_layers(stack):
    assert indices(select_layers(stack, "depth", 3 / 11).names) == [8, 9, 10]
    assert indices(select_layers(report_of(distinct(5)), "depth").names) == [2, 3, 4]


def test_ties_train_the_later_layers_and_names_keep_the_order_of_the_model():
    assert indices(select_layers(report_of([3.0, 2.0, 2.0, 2.0, 2.0]), fraction=0.6).names) == [0, 3, 4]


def test_names_are_exact(stack):
    alphas = [2.0] * 11
    alphas[1] = 5.0
    selection = select_layers(report_of(alphas), fraction=1 / 11)
    assert selection.names == ("layers.1",)
    assert "layers.10" in selection.frozen
    freeze_unselected(stack, selection)
    assert trained(stack) == {"layers.1.weight", "layers.1.bias"}


# Options of every rule.


def test_blocks_are_chosen_whole_by_the_mean_of_their_layers():
    alphas = {"layers.0.q": 9.0, "layers.0.v": 1.0, "layers.1.q": 6.0, "layers.1.v": 5.0, "layers.2.q": 2.0}
    report = make_report(*(make_entry(name, alpha) for name, alpha in alphas.items()))
    selection = select_layers(report, fraction=1 / 3, granularity="block")
    assert selection.names == ("layers.1.q", "layers.1.v")
    assert selection.frozen == ("layers.0.q", "layers.0.v", "layers.2.q")
    assert selection.scores == alphas
    assert selection.granularity == "block"
    more = select_layers(report, fraction=0.5, granularity="block")
    assert more.names == ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")


@pytest.mark.parametrize(
    ("fraction", "count", "expected"),
    [(0.5, 55, 28), (0.5, 56, 28), (1, 7, 7), (1e-6, 7, 1), (0.1, 30, 3), (0.4, 7, 3)],
)
def test_the_fraction_is_rounded_up(fraction, count, expected):
    assert len(select_layers(report_of(distinct(count)), fraction=fraction).names) == expected


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, NAN])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction is .*\(0, 1\]"):
        select_layers(report_of([2.0, 3.0]), fraction=fraction)


@pytest.mark.parametrize(("option", "known"), [("rule", RULES), ("granularity", GRANULARITIES)])
def test_unknown_names_are_refused_with_the_known_ones(option, known):
    wrong: dict[str, Any] = {option: "other"}
    with pytest.raises(ValueError, match="'other'") as caught:
        select_layers(report_of([2.0, 3.0]), **wrong)
    assert all(name in str(caught.value) for name in known)


@pytest.mark.parametrize(
    ("wanted", "expected"), [(r"layers\.1", [1]), (["layers.1"], [1]), (["1", "3"], [1, 3]), (r".*\.1.*", [1, 10])]
)
@pytest.mark.parametrize("kind", ["report", "model"])
def test_target_modules_limit_the_choice(stack, wanted, expected, kind):
    source = stack if kind == "model" else report_of(distinct(11))
    selection = select_layers(source, "depth", 1, target_modules=wanted)
    assert indices(selection.names) == expected
    assert selection.frozen == ()


@pytest.mark.parametrize("kind", ["report", "model"])
def test_target_modules_that_name_no_layer_are_refused(stack, kind):
    with pytest.raises(ValueError, match=r"target_modules=\['norm'\]"):
        select_layers(stack if kind == "model" else report_of([2.0]), "depth", target_modules=["norm"])


# Files.


def test_what_is_saved_is_what_is_loaded(tmp_path):
    selection = select_layers(report_of([2.0, None, 4.0]), "alpha_star", 0.3, "block", seed=4)
    selection.save(tmp_path / "selection.json")
    loaded = LayerSelection.load(tmp_path / "selection.json")
    assert loaded == selection
    assert loaded.seed == 4
    assert loaded.notes
    assert json.loads((tmp_path / "selection.json").read_text()) == json.loads(json.dumps(selection.to_dict()))


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"names": [], "frozen": [], "notes": [], "other": 1}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json' is no layer selection"):
        LayerSelection.load(tmp_path / "other.json")


# Freezing.


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (None, []),
        (["norm"], ["norm"]),
        (["norm", "head_norm"], ["norm", "head_norm"]),
        (r".*norm", ["norm", "head_norm"]),
        (["layers.3"], ["layers.3"]),
        (["3"], ["layers.3"]),
    ],
)
def test_only_the_selection_and_the_modules_to_save_train(stack, more, expected):
    stack.layers[5].requires_grad_(False)
    assert freeze_unselected(stack, chosen("layers.0", "layers.5"), more) is stack
    assert trained(stack) == parameters_of("layers.0", "layers.5", *expected)


def test_unknown_modules_to_save_are_refused(stack):
    before = trained(stack)
    with pytest.raises(ValueError, match=r"No module of the Stack is called \['head'\]"):
        freeze_unselected(stack, chosen("layers.0"), ["head"])
    assert trained(stack) == before


@pytest.mark.parametrize("use", [freeze_unselected, lambda model, selection: parameter_groups(model, selection, 0.1)])
def test_the_selection_of_another_model_is_refused_and_nothing_is_changed(use):
    model = Stack(depth=10)
    model.norm.requires_grad_(False)
    before = trained(model)
    with pytest.raises(ValueError, match=r"Stack has no layer 'layers\.10' \(1 of the selection are missing\)"):
        use(model, chosen("layers.0"))
    assert trained(model) == before


# Learning rates.


def test_learning_rates_follow_tempbalance():
    selection = select_layers(report_of([2.0, 3.0, 6.0]))
    assert selection.learning_rates(0.1) == pytest.approx({"layers.0": 0.05, "layers.1": 0.075, "layers.2": 0.15})
    bent = selection.learning_rates(2.0, low=0.1, high=4.1)
    assert bent == pytest.approx({"layers.0": 0.2, "layers.1": 2.2, "layers.2": 8.2})


def test_equal_scores_get_the_middle_learning_rate():
    rates = select_layers(report_of([2.0, 2.0])).learning_rates(0.1, low=0.5, high=2.5)
    assert rates == pytest.approx({"layers.0": 0.15, "layers.1": 0.15})


def test_parameter_groups_hold_every_trainable_parameter_once(stack):
    selection = select_layers(report_of([2.0, 6.0, *[4.0] * 9]))
    stack.layers[4].requires_grad_(False)
    stack.norm.bias.requires_grad_(False)
    stack.layers[3].weight = stack.layers[1].weight
    groups = parameter_groups(stack, selection, 0.1)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    named = {name: rates[id(p)] for name, p in stack.named_parameters() if id(p) in rates}
    assert set(named) == trained(stack)
    expected = dict.fromkeys(trained(stack), 0.1)
    expected |= dict.fromkeys(parameters_of("layers.0"), 0.05) | dict.fromkeys(parameters_of("layers.1"), 0.15)
    assert named == pytest.approx(expected)


def test_parameter_groups_train(stack):
    freeze_unselected(stack, chosen("layers.0", "layers.7"), ["norm"])
    optimizer = torch.optim.AdamW(parameter_groups(stack, chosen("layers.0", "layers.7"), 0.1), weight_decay=0)
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    (stack(torch.randn(4, 8)) - 1).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in stack.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == parameters_of("layers.0", "layers.7", "norm")


# Rules on gradients.


class Regression(nn.Module):
    """Two linear layers without a bias, one that is not used, and one whose output leaves no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.unused, self.cut = nn.Linear(5, 5), nn.Linear(3, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.second(self.first(x))) + 0 * self.cut(x).detach()


def squared_error(model, batch):
    x, y = batch
    return (model(x) - y).square().sum(-1).mean()


def draw_batches(sizes, noise=0.3, positions=()):
    source = torch.Generator().manual_seed(1)
    line = torch.randn(3, 2, generator=source, dtype=torch.float64)
    inputs = [torch.randn(size, *positions, 3, generator=source, dtype=torch.float64) for size in sizes]
    return [(x, x @ line + noise * torch.randn(*x.shape[:-1], 2, generator=source).double()) for x in inputs]


def analytic_gradients(model, batches):
    """Return the gradients of both layers for every batch, derived by hand: d/dW |W x - y|^2 = 2 (W x - y) x^T."""
    first, second = (layer.weight.detach().numpy() for layer in (model.first, model.second))
    found: dict[str, list[np.ndarray]] = {"first": [], "second": []}
    for x, y in batches:
        rows, target = x.numpy().reshape(-1, 3), y.numpy().reshape(-1, 2)
        hidden = rows @ first.T
        residual = 2 * (hidden @ second.T - target) / len(rows)
        found["second"].append(residual.T @ hidden)
        found["first"].append((residual @ second).T @ rows)
    return found


BATCHES = {"equal": ((6, 6, 6), ()), "unequal": ((2, 7, 9, 4), ()), "one": ((5,), ()), "sequences": ((2, 3), (4,))}


@pytest.fixture
def regression():
    return Regression().double()


@pytest.mark.parametrize(("sizes", "positions"), BATCHES.values(), ids=BATCHES)
def test_the_gradient_rule_is_the_relative_norm_of_the_mean_gradient(regression, sizes, positions):
    batches = draw_batches(sizes, positions=positions)
    expected = {
        name: np.linalg.norm(np.mean(gradients, 0)) / np.linalg.norm(getattr(regression, name).weight.detach().numpy())
        for name, gradients in analytic_gradients(regression, batches).items()
    }
    scores = gradient_scores(regression, batches, loss=squared_error)
    assert scores == pytest.approx({**expected, "unused": 0, "cut": 0})


@pytest.mark.parametrize(("sizes", "positions"), BATCHES.values(), ids=BATCHES)
def test_the_gain_is_what_batches_agree_upon_per_multiply_accumulate(regression, sizes, positions):
    batches = draw_batches(sizes, positions=positions)
    macs = {"first": 3 * 4, "second": 4 * 2}  # of one position
    rows = np.mean([y[..., 0].numel() for _, y in batches])
    expected = {}
    for name, gradients in analytic_gradients(regression, batches).items():
        mean = np.mean(gradients, 0)
        noise = np.mean([np.sum((gradient - mean) ** 2) for gradient in gradients]) / len(gradients)
        expected[name] = (np.sum(mean**2) - noise) / (macs[name] * rows)
    assert min(expected.values()) > 0
    scores = gradient_scores(regression, batches, "gain_per_cost", loss=squared_error)
    assert scores == pytest.approx({**expected, "unused": 0, "cut": 0})


def zero_layer():
    linear = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(linear)


def test_gradients_that_cancel_gain_nothing():
    layer = zero_layer()
    x = torch.ones(1, 3)
    scores = gradient_scores(
        layer, [(x, torch.tensor([2.0])), (x, torch.tensor([-1.9]))], "gain_per_cost", loss=squared_error
    )
    assert scores == {"0": 0.0}


def test_gradients_relative_to_a_zero_weight_are_finite():
    layer = zero_layer()
    scores = gradient_scores(layer, [(torch.ones(1, 3), torch.tensor([2.0]))], loss=squared_error)
    assert scores["0"] == pytest.approx(np.linalg.norm([-4, -4, -4]))


def wide_layers():
    """Return (layer, inputs, multiply-accumulates of its output for these inputs)."""
    return {
        "Conv1D": (Conv1D(5, 3), torch.randn(2, 7, 3), 2 * 7 * 3 * 5),
        "Conv2d": (nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 6, 5), 2 * 6 * 5 * 3 * 3 * 3 * 4),
        "grouped": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 6, 5), 2 * 4 * 3 * 3 * 3 * 2 * 6),
        "patches": (nn.Conv2d(3, 8, 4, stride=4), torch.randn(2, 3, 8, 8), 2 * 2 * 2 * 4 * 4 * 3 * 8),
    }


@pytest.mark.parametrize("kind", ["Conv1D", "Conv2d", "grouped", "patches"])
def test_the_cost_counts_every_position_of_other_layers(kind):
    layer, x, macs = wide_layers()[kind]
    model = nn.Sequential(layer)
    scores = gradient_scores(model, [x], "gain_per_cost", loss=lambda model, x: model(x).square().sum())
    model(x).square().sum().backward()
    assert scores["0"] == pytest.approx(float(layer.weight.grad.square().sum()) / macs, rel=1e-5)


def test_only_the_named_layers_are_scored(regression):
    batches = draw_batches((4, 4))
    everything = gradient_scores(regression, batches, loss=squared_error)
    assert gradient_scores(regression, iter(batches), names=["second"], loss=squared_error) == pytest.approx(
        {"second": everything["second"]}
    )


@pytest.mark.parametrize("rule", ["gradient", "gain_per_cost"])
def test_the_layers_with_the_largest_scores_train(regression, rule):
    batches = draw_batches((4, 4))
    wanted = ["first", "second", "unused"]
    selection = select_layers(regression, rule, 1 / 3, target_modules=wanted, batches=batches, loss=squared_error)
    assert selection.scores == gradient_scores(regression, batches, rule, names=wanted, loss=squared_error)
    assert selection.names == (max(selection.scores, key=lambda name: selection.scores[name]),)
    assert selection.scores["unused"] == 0


class Fails:
    """A loss that fails after so many batches."""

    def __init__(self, after):
        self.left = after

    def __call__(self, model, batch):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of memory")
        return squared_error(model, batch)


def snapshot(model):
    """Return what trains, which gradients there are, and how many hooks."""
    gradients = {name: id(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return trained(model), gradients, sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("after", [None, 0, 2])
@pytest.mark.parametrize("training", [False, True])
def test_scoring_leaves_the_model_as_it_was(regression, training, after):
    regression.train(training)
    regression.second.requires_grad_(False)
    regression.first.weight.grad = torch.full((4, 3), 7.0, dtype=torch.float64)
    before, values = snapshot(regression), {n: v.clone() for n, v in regression.state_dict().items()}
    batches = draw_batches((4, 4, 4))
    if after is None:
        gradient_scores(regression, batches, "gain_per_cost", loss=squared_error)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            gradient_scores(regression, batches, loss=Fails(after))
    assert snapshot(regression) == before
    assert all(module.training is training for module in regression.modules())
    assert (regression.first.weight.grad == 7).all()
    assert all(torch.equal(value, values[name]) for name, value in regression.state_dict().items())


def test_scoring_keeps_the_mode_of_every_module(regression):
    regression.train().drop.eval()
    gradient_scores(regression, draw_batches((4,)), loss=squared_error)
    assert regression.training
    assert not regression.drop.training


def test_scoring_happens_without_dropout(regression):
    batches = draw_batches((4, 4))
    expected = gradient_scores(regression.eval(), batches, loss=squared_error)
    assert gradient_scores(regression.train(), batches, loss=squared_error) == expected


class WithLoss(nn.Module):
    """A model in the manner of transformers: its output has a loss where there are labels."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind = nn.Linear(3, 2), kind

    def forward(self, x, labels=None):
        rows = self.linear(x)
        found = {"rows": rows} if labels is None else {"loss": (rows - labels).square().sum(-1).mean()}
        return found if self.kind == "dict" else SimpleNamespace(**found)


@pytest.mark.parametrize("kind", ["dict", "object"])
def test_the_default_is_the_loss_of_the_model(kind):
    model, x, y = WithLoss(kind), torch.randn(4, 3), torch.randn(4, 2)
    expected = gradient_scores(
        model,
        [(x, y)],
        loss=lambda model, pair: model(pair[0], pair[1])["loss"] if kind == "dict" else model(*pair).loss,
    )
    assert expected["linear"] > 0
    assert gradient_scores(model, [{"x": x, "labels": y}]) == pytest.approx(expected)
    assert select_layers(model, "gradient", batches=[{"x": x, "labels": y}]).scores == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["dict", "object"])
@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_model_without_a_loss_is_refused(kind, as_mapping):
    model, x = WithLoss(kind), torch.randn(4, 3)
    with pytest.raises(ValueError, match="WithLoss returned no loss"):
        gradient_scores(model, [{"x": x} if as_mapping else x])
    assert len(trained(model)) == 2


@pytest.mark.parametrize("rule", ["gradient", "gain_per_cost"])
def test_gradient_rules_need_batches_and_a_model(regression, rule):
    for source, batches in ((regression, None), (report_of([2.0, 3.0]), draw_batches((4,)))):
        with pytest.raises(ValueError, match=f"rule='{rule}' needs the model and `batches`"):
            select_layers(source, rule, batches=batches, loss=squared_error)
    with pytest.raises(ValueError, match="There are 0 batches"):
        select_layers(regression, rule, batches=[], loss=squared_error)
    assert len(trained(regression)) == 6


# Rule "damage".


def pruning_report(*errors):
    """Return a stand-in with what the rule reads: the errors of the attention and of the MLP of every layer."""
    return SimpleNamespace(layers=[SimpleNamespace(heads_error=heads, neurons_error=mlp) for heads, mlp in errors])


def test_the_most_damaged_sublayers_train(tiny_clip):
    errors = [(0.1, 0.6), (0.5, None), (0.3, 0.2)]
    selection = select_layers(
        tiny_clip, "damage", 0.3, target_modules=r"vision_model\..*layers.*", pruning_report=pruning_report(*errors)
    )
    for index, (heads, mlp) in enumerate(errors):
        at = f"vision_model.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            assert selection.scores[f"{at}.self_attn.{name}"] == heads
        for name in ("fc1", "fc2"):
            assert selection.scores[f"{at}.mlp.{name}"] == (mlp or 0)
    assert {name.split("layers.")[1][:6] for name in selection.names} == {"0.mlp.", "1.self"}
    assert (len(selection.names), len(selection.scores)) == (6, 18)
    assert selection.notes == ()


def test_damage_says_nothing_of_the_text_tower_and_of_layers_without_a_number(tiny_clip):
    report = pruning_report((0.1, 0.7), (0.2, 0.7), (0.3, 0.7))
    selection = select_layers(tiny_clip, "damage", pruning_report=report)
    outside = {name for name in selection.scores if not name.startswith("vision_model.encoder.layers.")}
    assert len(outside) == 2 * 6 + 3  # the text layers, the patch embedding, both projections
    median = statistics.median([0.1] * 4 + [0.2] * 4 + [0.3] * 4 + [0.7] * 6)
    assert {selection.scores[name] for name in outside} == {median}
    assert all(name in selection.notes[0] for name in outside)


def test_damage_counts_layers_by_number(stack):
    errors = [(0.0, 0.0)] * 11
    errors[1] = (0.9, 0.4)
    selection = select_layers(stack, "damage", 1 / 11, pruning_report=pruning_report(*errors))
    assert selection.names == ("layers.1",)
    assert selection.scores["layers.1"] == 0.4
    assert select_layers(
        report_of([2.0, 3.0]), "damage", 0.5, pruning_report=pruning_report((0, 0.2), (0, 0.1))
    ).names == ("layers.0",)


def test_layers_beyond_the_report_have_no_damage(stack):
    selection = select_layers(stack, "damage", pruning_report=pruning_report((0, 0.5), (0, 0.1), (0, 0.3)))
    assert "layers.3" in selection.notes[0]
    assert "layers.2" not in selection.notes[0]
    assert selection.scores["layers.10"] == 0.3


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (None, "rule='damage' needs `pruning_report`"),
        (pruning_report((None, None), (None, None)), "has no error of any of these layers"),
        (pruning_report(), "has no error of any of these layers"),
    ],
)
def test_damage_needs_a_report_with_errors(stack, report: Any, message):
    with pytest.raises(ValueError, match=message):
        select_layers(stack, "damage", pruning_report=report)
