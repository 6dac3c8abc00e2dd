"""Short hashes of models: two with the same one are the same model."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn


def model_fingerprint(model: nn.Module) -> str:
    """Return a short hash of a model's class, configuration and weights.

    Args:
        model: A transformers model.
    """
    values = cast("Any", model).config.to_dict()
    config = {name: value for name, value in values.items() if name not in ("_name_or_path", "transformers_version")}
    head = json.dumps([type(model).__name__, config], sort_keys=True, default=str)
    return tensor_fingerprint(head, model.state_dict().items())


def tensor_fingerprint(head: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a short hash of a text, and of names, types, shapes and values of tensors, in any order."""
    found = hashlib.sha256(head.encode())
    for name, tensor in sorted(tensors):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
