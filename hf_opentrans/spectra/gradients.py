"""Scores of layers from a few batches of a loss: how much each would learn, and at what cost."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .analysis import weight_of
from .layers import find_layers

Loss = Callable[[nn.Module, Any], torch.Tensor]


def gradient_scores(
    model: nn.Module,
    batches: Iterable[Any],
    rule: str = "gradient",
    *,
    names: Iterable[str] | None = None,
    loss: Loss | None = None,
) -> dict[str, float]:
    """Return a score per layer from the gradients of a loss.

        gradient:       ||E g|| / ||w||, the relative gradient norm (Surgical Fine-Tuning, arXiv 2210.11466)
        gain_per_cost:  max(0, ||E g||^2 - tr Cov(g) / B) / multiply-accumulates of the layer's weight gradient

    E and Cov are over the B batches: what differs from batch to batch would not be learned. The model is left as it
    was: mode, gradients and `requires_grad`.

    Args:
        model: Any model.
        batches: Inputs; a mapping is passed as keyword arguments.
        rule: "gradient" or "gain_per_cost".
        names: Layers; defaults to all of `find_layers`.
        loss: Returns the loss of the model on a batch. Defaults to the output's `loss`, so that batches hold labels.

    Raises:
        ValueError: If there is no batch, or the model returns no loss.
    """
    chosen = list(find_layers(model) if names is None else names)
    modules = {name: model.get_submodule(name) for name in chosen}
    count = 0
    sums: dict[str, torch.Tensor] = {}
    squares, macs = dict.fromkeys(chosen, 0.0), dict.fromkeys(chosen, 0.0)
    with untouched(model), ExitStack() as hooks:
        model.requires_grad_(False)
        for module in modules.values():
            module.weight.requires_grad_(True)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(_counter(macs, name)))
        for batch in batches:
            count += 1
            model.zero_grad(set_to_none=True)
            (loss or own_loss)(model, batch).backward()
            for name, module in modules.items():
                gradient: Any = module.weight.grad
                if gradient is not None:  # a layer that the loss does not reach learns nothing
                    sums[name] = sums[name].add_(gradient) if name in sums else gradient.detach().clone()
                    squares[name] += float(gradient.double().square().sum())
    if not count:
        raise ValueError("There are 0 batches. Gradients need at least one. Give some.")
    means = {name: float(sums[name].double().square().sum()) / count**2 if name in sums else 0.0 for name in chosen}
    if rule == "gradient":
        return {name: math.sqrt(means[name]) / (float(weight_of(modules[name]).norm()) or 1.0) for name in chosen}
    noise = {name: max(0.0, squares[name] / count - means[name]) / count for name in chosen}
    return {name: max(0.0, means[name] - noise[name]) / max(macs[name] / count, 1.0) for name in chosen}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a block on a model in eval mode and without gradients, and put both back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval().zero_grad(set_to_none=True)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the `loss` of the model's output on a batch.

    Raises:
        ValueError: If there is none.
    """
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None:
        raise ValueError(
            f"The {type(model).__name__} returned no loss. Gradients need one. Put labels into the batches, or pass "
            "loss=lambda model, batch: ..."
        )
    return found


def _counter(macs: dict[str, float], name: str) -> Callable[..., None]:
    """Count the multiply-accumulates of a layer: those of its weight gradient are as many as those of its output."""

    def count(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        weight = weight_of(module)
        outputs = output.numel() / len(weight)  # positions
        macs[name] += outputs * weight.numel()

    return count
