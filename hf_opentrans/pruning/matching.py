"""Whether another model's weights are those that a subnetwork was made from: hashes, and a few values of each."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .tower import SparseModel, Tower

SAMPLES = 32
# Relative difference of the sampled values: half precision rounds by less than a thousandth, training moves more.
CLOSE = 0.01


@dataclass(frozen=True)
class WeightMatch:
    """How one tensor compares with the one of the same name in the source.

    Args:
        status: "equal" (bit for bit), "close" (rounded otherwise), or "different".
        difference: Relative difference of the sampled values; None where there is nothing to compare.
    """

    status: str
    difference: float | None = None


@dataclass(frozen=True)
class SourceWeights:
    """What is known of the dense tower's weights without keeping them.

    Args:
        hashes: SHA-256 of the bytes of every tensor, by canonical name.
        samples: Evenly spaced values of every tensor, at most 32; may be empty: "close" cannot be told then.
    """

    hashes: Mapping[str, str] = field(repr=False)
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)

    def compare(self, name: str, tensor: torch.Tensor) -> WeightMatch:
        """Compare a tensor with the source's tensor of this name."""
        if hash_tensor(tensor) == self.hashes.get(name):
            return WeightMatch("equal", 0.0)
        expected, found = self.samples.get(name), sample_tensor(tensor)
        if expected is None or len(expected) != len(found):
            return WeightMatch("different")
        reference = torch.tensor(list(expected), dtype=torch.float64)
        distance = (torch.tensor(found, dtype=torch.float64) - reference).norm()
        difference = float(distance / reference.norm().clamp(min=torch.finfo(torch.float64).tiny))
        return WeightMatch("close" if difference <= CLOSE else "different", difference)


def hash_tensor(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def hash_tensors(model: SparseModel) -> dict[str, str]:
    """Return the SHA-256 of the bytes of every tensor of the vision tower, by canonical name."""
    return {name: hash_tensor(tensor) for name, tensor in Tower.of(model).named_tensors().items()}


def sample_tensor(tensor: torch.Tensor) -> list[float]:
    """Return at most 32 evenly spaced values of a tensor."""
    flat = tensor.detach().flatten()
    index = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLES, flat.numel()), dtype=torch.float64)
    return flat[index.round().long().to(flat.device)].double().tolist()


def sample_tensors(model: SparseModel) -> dict[str, list[float]]:
    """Return some values of every tensor of the vision tower, by canonical name."""
    return {name: sample_tensor(tensor) for name, tensor in Tower.of(model).named_tensors().items()}
