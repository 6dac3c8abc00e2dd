"""The cost of a training step against sums worked out from the widths of tiny models."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from hf_opentrans.pruning.macs import count_macs
from hf_opentrans.spectra.cost import TrainingCost, full_training_cost, training_cost
from hf_opentrans.spectra.layers import find_layers

WIDTH, NEURONS, HEADS, DEPTH, PATCHES = 32, 48, 4, 3, 16
TOKENS = 1 + PATCHES
PROJECTION, FC = TOKENS * WIDTH * WIDTH, TOKENS * WIDTH * NEURONS
PRODUCT = TOKENS * TOKENS * WIDTH  # scores of all heads; mixing the values costs as much
PATCH_EMBEDDING = PATCHES * 3 * 8 * 8 * WIDTH

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT, FC1, FC2 = "self_attn.out_proj", "mlp.fc1", "mlp.fc2"
PATCH = "embeddings.patch_embedding"


def layer_macs(name):
    return PATCH_EMBEDDING if name == PATCH else FC if ".mlp." in name else PROJECTION


def in_layer(index, *names):
    return [f"encoder.layers.{index}.{name}" for name in names or (*QKV, OUT, FC1, FC2)]


EVERYTHING = [PATCH, *(name for index in range(DEPTH) for name in in_layer(index))]
SELECTIONS = {
    "full": EVERYTHING,
    "no embedding": EVERYTHING[1:],
    "two last layers": in_layer(1) + in_layer(2),
    "last layer": in_layer(2),
    "first layer": in_layer(0),
    "embedding": [PATCH],
    "from an out_proj": in_layer(1, OUT, FC1, FC2) + in_layer(2),
    "from a fc1": in_layer(1, FC1, FC2) + in_layer(2),
    "last fc2": in_layer(2, FC2),
    "embedding and last": [PATCH, *in_layer(2, FC1)],
    "scattered": in_layer(0, FC2) + in_layer(1, *QKV[1:]) + in_layer(2, QKV[0], FC2),
    "one query": in_layer(1, QKV[0]),
    "one key": in_layer(0, QKV[1]),
    "one value": in_layer(1, QKV[2]),
    "query and value": in_layer(1, QKV[0], QKV[2]) + in_layer(2, FC1),
}
# The lowest trained layers and their parents in the formula of the design, where these are all that reads an input.
LOWEST = {
    "full": [PATCH],
    "no embedding": in_layer(0, *QKV),
    "two last layers": in_layer(1, *QKV),
    "last layer": in_layer(2, *QKV),
    "first layer": in_layer(0, *QKV),
    "embedding": [PATCH],
    "from an out_proj": in_layer(1, OUT),
    "from a fc1": in_layer(1, FC1),
    "last fc2": in_layer(2, FC2),
    "embedding and last": [PATCH],
    "scattered": in_layer(0, FC2),
}


def walk(trained):
    """Return the multiply-accumulates of all input gradients: a layer or product has them where an input needs one."""
    total, below = 0, PATCH in trained

    def through(name, needs):
        nonlocal total
        total += layer_macs(name) * needs
        return needs or name in trained

    for index in range(DEPTH):
        query, key, value = (through(name, below) for name in in_layer(index, *QKV))
        total += PRODUCT * (query + key)
        weights = query or key
        total += PRODUCT * (weights + value)
        out, fc1, fc2 = in_layer(index, OUT, FC1, FC2)
        below = through(out, weights or value) or below
        below = through(fc2, through(fc1, below)) or below
    return total


def above(lowest):
    """Return sum_{l > t} c_l + 2 sum_{l >= t} a_l for the lowest trained layer t; q, k and v count as one layer."""
    later = EVERYTHING[EVERYTHING.index(lowest[-1]) + 1 :]
    first = 0 if lowest == [PATCH] else int(lowest[0].split(".")[2])
    blocks = DEPTH - first - (lowest[-1].endswith((OUT, FC1, FC2)))
    return sum(map(layer_macs, later)) + 2 * blocks * 2 * PRODUCT


@pytest.fixture
def vision():
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModel(config).eval()


def train_weights(model, names):
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return model


def images(count=2):
    return {"pixel_values": torch.randn(count, 3, 32, 32)}


def pooled(model, batch):
    return model(**batch).pooler_output.square().sum()


def measure(model, names, batch=None):
    return training_cost(train_weights(model, names), batch or images(), loss=pooled)


def test_the_widths_here_are_those_of_the_model(vision):
    assert sorted(find_layers(vision)) == sorted(EVERYTHING)
    forward = sum(map(layer_macs, EVERYTHING)) + DEPTH * 2 * PRODUCT
    assert count_macs(vision.config, projection=False) == forward


@pytest.mark.parametrize("names", SELECTIONS.values(), ids=SELECTIONS)
def test_costs_follow_from_the_widths(vision, names):
    cost = measure(vision, names)
    assert cost.forward == count_macs(vision.config, projection=False)
    assert cost.weight_gradients == sum(map(layer_macs, names))
    assert cost.input_gradients == walk(names)
    assert cost.trainable_params == sum(p.numel() for n in names for p in vision.get_submodule(n).parameters())
    assert cost.params == sum(p.numel() for p in vision.parameters())


@pytest.mark.parametrize("kind", LOWEST)
def test_input_gradients_are_those_above_the_lowest_trained_layer(vision, kind):
    assert measure(vision, SELECTIONS[kind]).input_gradients == above(LOWEST[kind])


def test_norms_alone_cost_the_gradients_that_reach_them(vision):
    cost = measure(vision, ["encoder.layers.2.layer_norm1"])
    assert cost.weight_gradients == 0
    assert cost.input_gradients == sum(map(layer_macs, in_layer(2))) + 4 * PRODUCT
    assert measure(vision, ["post_layernorm"]).input_gradients == 0


def test_the_whole_is_what_all_parameters_cost(vision):
    train_weights(vision, in_layer(2, FC2))
    before = {name: parameter.requires_grad for name, parameter in vision.named_parameters()}
    whole = full_training_cost(vision, images(), loss=pooled)
    assert {name: parameter.requires_grad for name, parameter in vision.named_parameters()} == before
    assert whole == training_cost(vision.requires_grad_(True), images(), loss=pooled)
    assert whole.trainable_params == whole.params
    assert whole.weight_gradients == sum(map(layer_macs, EVERYTHING))
    assert 2.8 < whole.per_sample / whole.forward < 3


@pytest.mark.parametrize("count", [1, 3, 8])
def test_figures_are_per_sample(vision, count):
    names = SELECTIONS["scattered"]
    assert measure(vision, names, images(count)) == measure(vision, names, images(2))


def test_the_attention_kernel_changes_nothing(vision):
    names, expected = SELECTIONS["scattered"], measure(vision, SELECTIONS["scattered"])
    vision.set_attn_implementation("eager")
    assert measure(vision, names) == expected


def test_sums_and_totals():
    cost = TrainingCost(100, 50, 7, 20, 80)
    assert cost.per_sample == 157
    assert cost.total(1000) == 157_000
    figures = {"forward": 100, "input_gradients": 50, "weight_gradients": 7, "trainable_params": 20, "params": 80}
    assert cost.to_dict() == {**figures, "per_sample": 157}


def test_nothing_to_train_is_refused(vision):
    with pytest.raises(ValueError, match="No parameter trains"):
        measure(vision, [])


@pytest.mark.parametrize("measured", [training_cost, full_training_cost])
def test_a_model_without_a_loss_is_refused_and_left_alone(vision, measured):
    train_weights(vision, in_layer(1))
    before = {name: parameter.requires_grad for name, parameter in vision.named_parameters()}
    with pytest.raises(ValueError, match="CLIPVisionModel returned no loss"):
        measured(vision, images())
    assert {name: parameter.requires_grad for name, parameter in vision.named_parameters()} == before


@pytest.mark.parametrize("measured", [training_cost, full_training_cost])
def test_the_model_is_left_as_it_was(vision, measured):
    train_weights(vision, in_layer(1))
    trains = {name: parameter.requires_grad for name, parameter in vision.named_parameters()}
    values = {name: value.clone() for name, value in vision.state_dict().items()}
    measured(vision, images(), loss=pooled)
    assert all(parameter.grad is None for parameter in vision.parameters())
    assert {name: parameter.requires_grad for name, parameter in vision.named_parameters()} == trains
    assert all(torch.equal(value, values[name]) for name, value in vision.state_dict().items())
    assert not vision.training


@pytest.mark.parametrize("measured", [training_cost, full_training_cost])
def test_gradients_that_were_there_are_kept(vision, measured):
    weight = vision.get_submodule(*in_layer(1, FC1)).weight
    weight.grad = kept = torch.full_like(weight, 7)
    measured(vision, images(), loss=pooled)
    assert weight.grad is kept
    assert (kept == 7).all()


class Convolutions(nn.Module):
    """Two convolutions and a linear head; its output has a loss, as in transformers."""

    def __init__(self, groups=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups)
        self.head = nn.Linear(12, 5)

    def forward(self, x, labels):
        rows = self.head(self.down(self.norm(self.stem(x)).relu()).mean((2, 3)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(rows, labels))


STEM, DOWN, HEAD = 10 * 10 * 3 * 9 * 8, 5 * 5 * 8 * 9 * 12, 12 * 5


def pictures(count=4):
    return {"x": torch.randn(count, 3, 10, 10), "labels": torch.arange(count)}


@pytest.mark.parametrize(
    ("names", "inputs", "weights"),
    [
        (["stem", "norm", "down", "head"], DOWN + HEAD, STEM + DOWN + HEAD),
        (["norm"], DOWN + HEAD, 0),
        (["down"], HEAD, DOWN),
        (["head"], 0, HEAD),
        (["stem", "head"], DOWN + HEAD, STEM + HEAD),
    ],
)
def test_costs_of_convolutions(names, inputs, weights):
    model = train_weights(Convolutions().eval(), names)
    cost = training_cost(model, pictures())
    assert (cost.forward, cost.input_gradients, cost.weight_gradients) == (STEM + DOWN + HEAD, inputs, weights)
    assert cost == training_cost(model, pictures(2))


def test_costs_of_a_convolution_in_groups():
    cost = training_cost(train_weights(Convolutions(groups=4).eval(), ["down"]), pictures())
    assert (cost.forward, cost.weight_gradients) == (STEM + DOWN // 4 + HEAD, DOWN // 4)
    assert cost.input_gradients == HEAD


def test_running_statistics_are_left_alone():
    model = Convolutions().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training_cost(model, pictures())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_can_be_a_tensor(vision):
    x = images()["pixel_values"]
    expected = training_cost(vision, {"pixel_values": x}, loss=pooled)
    assert training_cost(vision, x, loss=lambda model, x: model(x).pooler_output.square().sum()) == expected


def test_a_batch_can_be_a_pair():
    model, batch = Convolutions(), pictures()
    pair = (batch["x"], batch["labels"])
    assert training_cost(model, pair, loss=lambda model, pair: model(*pair).loss) == training_cost(model, batch)


class TwoHeads(nn.Module):
    """A model whose loss reads one of its two heads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return SimpleNamespace(loss=self.first(x).sum(), other=self.second(x))


def test_layers_that_the_loss_does_not_reach_have_no_gradients():
    cost = training_cost(TwoHeads(), {"x": torch.randn(3, 8)})
    assert (cost.forward, cost.input_gradients, cost.weight_gradients) == (64, 0, 32)
