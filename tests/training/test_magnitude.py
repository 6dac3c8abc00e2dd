"""Iterative magnitude pruning: density, nesting, what stays zero, resume; and the reference's losses."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_opentrans.models.modeling_gkc import vanilla_loss, vision_loss
from hf_opentrans.training import IterativeMagnitudePruning


class Net(nn.Module):
    """A convolution, and two linear layers; the loss is a squared error."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.hidden, self.out = nn.Conv2d(3, 4, 2, stride=2), nn.Linear(16, 24), nn.Linear(24, 2)

    def forward(self, pixel_values, labels=None):
        output = self.out(self.hidden(self.stem(pixel_values).flatten(1)).relu())
        return {"loss": (output - labels).square().mean(), "logits": output}


def data(count=24):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 4, 4, generator=generator)
    return [{"pixel_values": image, "labels": image.mean((1, 2))[:2]} for image in images]


def train(folder, callback, steps=6, resume=None, save_steps=3):
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_steps=save_steps,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=False,
    )
    model = Net()
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[callback])  # pyright: ignore[reportArgumentType]
    trainer.train(resume_from_checkpoint=resume)
    return model


def begin(model, callback, tmp_path):
    callback.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), model=model)
    return callback


def weight_of(model, name) -> Any:
    return model.get_submodule(name).weight


def alive(callback):
    return {name: mask.clone() for name, mask in callback.masks.items()}


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_every_round_removes_a_share_of_what_is_left(tmp_path, rate):
    model = Net()
    callback = begin(model, IterativeMagnitudePruning(rate=rate), tmp_path)
    assert set(callback.masks) == {"hidden", "out"}  # not the first layer
    count = 16 * 24 + 24 * 2
    left = count
    for _ in range(5):
        before = alive(callback)
        callback.prune(model)
        left -= round(rate * left)
        assert callback.density == pytest.approx(left / count)
        assert all((mask <= before[name]).all() for name, mask in callback.masks.items())  # nested
    assert callback.density == pytest.approx((1 - rate) ** 5, abs=0.01)


def test_one_threshold_for_all_layers(tmp_path):
    model = Net()
    callback = begin(model, IterativeMagnitudePruning(rate=0.3), tmp_path)
    weights = torch.cat([model.hidden.weight.flatten(), model.out.weight.flatten()]).abs()
    threshold = weights.sort().values[round(0.3 * len(weights)) - 1]
    callback.prune(model)
    for name, mask in callback.masks.items():
        assert torch.equal(mask, weight_of(model, name).abs() > threshold)


def test_structured_rounds_remove_whole_outputs(tmp_path):
    model = Net()
    callback = begin(model, IterativeMagnitudePruning(rate=0.25, structured=True), tmp_path)
    means = {name: weight_of(model, name).abs().mean(1) for name in callback.masks}
    smallest = torch.cat(list(means.values())).sort().values[round(0.25 * 26) - 1]
    callback.prune(model)
    for name, mask in callback.masks.items():
        assert torch.equal(mask.all(1), mask.any(1))
        assert torch.equal(mask.any(1), means[name] > smallest)


@pytest.mark.parametrize(
    ("options", "rounds"),
    [({"every": 2}, 3), ({"every": 2, "first": 2}, 3), ({"every": 2, "rounds": 1}, 1), ({"every": 100}, 1)],
)
def test_rounds_follow_the_schedule_and_zeros_stay(tmp_path, options, rounds):
    callback = IterativeMagnitudePruning(rate=0.2, **options)
    model = train(tmp_path, callback)
    assert callback.rounds_done == rounds
    assert callback.density == pytest.approx(0.8**rounds, abs=0.01)
    for name, mask in callback.masks.items():
        weight = weight_of(model, name)
        assert not weight[~mask].any()
        assert weight[mask].abs().min() > 0
    assert model.stem.weight.abs().min() > 0


def test_a_resumed_run_ends_like_one_that_was_not_stopped(tmp_path):
    whole = train(tmp_path / "whole", IterativeMagnitudePruning(rate=0.2, every=2))
    callback = IterativeMagnitudePruning(rate=0.2, every=2)
    again = train(tmp_path / "whole", callback, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert callback.rounds_done == 3
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )
    (tmp_path / "whole" / "checkpoint-3" / "magnitude_masks.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no magnitude_masks\.safetensors"):
        train(tmp_path / "whole", callback, resume=str(tmp_path / "whole" / "checkpoint-3"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": 1.0}, "rate is 1.0"),
        ({"every": 0}, "every is 0"),
        ({"rounds": 0}, "0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IterativeMagnitudePruning(**options)


def test_a_model_of_one_layer_needs_names(tmp_path):
    with pytest.raises(ValueError, match="Only one layer could be pruned"):
        begin(nn.Sequential(nn.Linear(4, 4)), IterativeMagnitudePruning(), tmp_path)
    begin(nn.Sequential(nn.Linear(4, 4)), IterativeMagnitudePruning(target_modules=["0"]), tmp_path)


def draw(count, seed):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=4), scale=st.floats(0.5, 2.0), seed=st.integers(0, 99))
def test_losses_equal_their_double_sums(counts, scale, seed):
    total = sum(counts)
    regions, targets, texts = draw(total, seed), draw(total, seed + 1), draw(total, seed + 2)
    v, c, t = (normalize(each, dim=-1) for each in (regions, targets, texts))
    distances = sum(float((v[i] - c[i]) @ (v[i] - c[i])) for i in range(total))
    relations, start = 0.0, 0
    for count in counts:
        for i in range(start, start + count):
            for j in range(start, start + count):
                relations += float(scale**2 * (t[i] @ t[j]) - v[i] @ c[j]) ** 2
        start += count
    assert float(vanilla_loss(regions, targets)) == pytest.approx(distances / total)
    expected = (relations + distances) / (sum(count**2 for count in counts) + total)
    assert float(vision_loss(regions, targets, texts, counts, scale)) == pytest.approx(expected)


def test_gradients_of_the_losses_are_right():
    regions, targets, texts = (draw(4, seed).requires_grad_(seed == 0) for seed in range(3))
    scale = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: vanilla_loss(r, targets), (regions,))
    assert torch.autograd.gradcheck(lambda r, s: vision_loss(r, targets, texts, [3, 1], s), (regions, scale))


def test_counts_must_add_up():
    with pytest.raises(ValueError, match="counts add up to 3 and there are 4 regions"):
        vision_loss(draw(4, 0), draw(4, 1), draw(4, 2), [2, 1], 1.0)
