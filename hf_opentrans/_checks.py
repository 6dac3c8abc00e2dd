"""Checks that more than one part of the package makes."""

from collections.abc import Mapping

import torch


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError where a weight is NaN or infinite."""
    for name, tensor in tensors.items():
        # The sum is NaN or infinite exactly where a value is, up to overflow; only then look at every value.
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"The weight {name!r} has values that are NaN or infinite. All weights must be finite. "
                "The checkpoint is damaged: get it again."
            )
