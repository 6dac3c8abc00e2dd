"""What training costs: multiply-accumulates of the forward pass and of the gradients that are really needed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .gradients import Loss, own_loss, untouched
from .layers import find_layers


@dataclass(frozen=True)
class TrainingCost:
    """Multiply-accumulates of one training step per sample.

    Gradients of the inputs stop at the lowest layer that trains; gradients of weights are those of trained layers.
    Biases, norms, activations and the optimiser are not counted.

    Args:
        forward: Forward pass of the whole model.
        input_gradients: Gradients that are handed down through layers and attention products.
        weight_gradients: Gradients of the weights that train.
        trainable_params: Parameters that train.
        params: All parameters.
    """

    forward: int
    input_gradients: int
    weight_gradients: int
    trainable_params: int
    params: int

    @property
    def per_sample(self) -> int:
        """All of it."""
        return self.forward + self.input_gradients + self.weight_gradients

    def total(self, samples: int) -> int:
        """Return the cost of a whole run.

        Args:
            samples: Steps x samples per step.
        """
        return self.per_sample * samples

    def to_dict(self) -> dict[str, int]:
        """Return the figures and their sum as JSON-ready values."""
        return {**asdict(self), "per_sample": self.per_sample}


def training_cost(model: nn.Module, batch: Any, *, loss: Loss | None = None) -> TrainingCost:
    """Count one real forward and backward pass under the model's `requires_grad`.

    The weight gradients of a linear or convolution layer cost as much as its forward pass; all else of the backward
    pass are input gradients. The model is left as it was.

    Args:
        model: Any model whose weights are in linear and convolution layers.
        batch: Inputs with labels; a mapping is passed as keyword arguments. The first dimension counts samples.
        loss: Returns the loss of the model on a batch. Defaults to the output's `loss`.

    Raises:
        ValueError: If nothing trains, or the model returns no loss.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise ValueError("No parameter trains. A training step needs one. Set requires_grad, or select layers.")
    weights = counted = 0
    counter = FlopCounterMode(display=False, depth=1000)
    with untouched(model), sdpa_kernel(SDPBackend.MATH):  # fused CPU attention is not counted
        with counter:
            found = (loss or own_loss)(model, batch)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as backward_counter:
            found.backward()
        by_module = {name: sum(values.values()) for name, values in counter.get_flop_counts().items()}
        for name in find_layers(model):
            module: Any = model.get_submodule(name)
            if module.weight.grad is not None:  # trained, and reached by the loss
                own = by_module.get(f"{type(model).__name__}.{name}", 0)
                weights += own
                # torch's counter takes the weight gradient of a grouped convolution for a dense one.
                counted += own * getattr(module, "groups", 1)
    samples = _samples(batch)
    counts = (forward, backward_counter.get_total_flops() - counted, weights)
    per_sample = [round(flops / 2 / samples) for flops in counts]
    params = sum(parameter.numel() for parameter in model.parameters())
    return TrainingCost(per_sample[0], per_sample[1], per_sample[2], trainable, params)


def full_training_cost(model: nn.Module, batch: Any, *, loss: Loss | None = None) -> TrainingCost:
    """Return what `training_cost` would be if every parameter trained; the arguments are the same."""
    with untouched(model):
        model.requires_grad_(True)
        return training_cost(model, batch, loss=loss)


def _samples(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim), 1)
