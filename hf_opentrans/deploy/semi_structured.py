"""Saved 2:4 models on GPUs that can skip the zeros: torch's semi-structured tensors.

Small products gain nothing, and no processor does. Reported for SAM ViT-H on an A100 (torchao, not measured here):
1.07x with all linear layers, 1.10x with those of the MLPs alone. Measure on your own GPU before you use it.
"""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from hf_opentrans.pruning.two_of_four import is_two_of_four

# Rows and columns must be multiples of these: the stricter of torch's two backends (CUTLASS and cuSPARSELt).
BLOCKS = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}
CAPABILITY = (8, 0)


@dataclass(frozen=True)
class SemiStructuredModel:
    """The outcome of `to_semi_structured`.

    Args:
        model: A copy that skips the zeros of `converted`; same outputs up to rounding. It cannot be saved: keep the
            folder that it was loaded from.
        converted: Paths of the linear layers that are semi-structured now.
        left: Paths of the linear layers that are 2:4 but stayed as they were, with the reason.
    """

    model: nn.Module
    converted: tuple[str, ...]
    left: dict[str, str]


def to_semi_structured(model: nn.Module) -> SemiStructuredModel:
    """Turn the linear layers whose weights are 2:4 into torch's semi-structured tensors, on the GPU.

    Args:
        model: A model that `prune_semi_structured` made, loaded in float16 or bfloat16, in evaluation mode, on a CUDA
            device of compute capability 8.0 or newer. Not changed.

    Raises:
        TypeError: If it is no module.
        ValueError: If it is in training mode or of another precision, no layer is 2:4, or none has a shape that fits.
        RuntimeError: If the device cannot skip zeros.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}. It must be a torch.nn.Module. Load the model first.")
    if model.training:
        raise ValueError("The model is in training mode. The zeros are for inference. Call model.eval() first.")
    sparse = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and is_two_of_four(module.weight)
    }
    if not sparse:
        raise ValueError(
            "None of the linear layers is 2:4 (two of every four consecutive input weights zero). Only such zeros can "
            "be skipped. Make them with `hf-opentrans sparsify MODEL --images FOLDER --output DIR`."
        )
    _check_device(next(iter(sparse.values())).weight)
    left = {name: reason for name, linear in sparse.items() if (reason := _misfit(linear.weight)) is not None}
    if len(left) == len(sparse):
        raise ValueError(
            f"None of the {len(sparse)} layers that are 2:4 can be converted; the first has "
            f"{next(iter(left.values()))}. Load the model in float16 or bfloat16, or prune to widths that are "
            "multiples of 64 (round_neurons=64)."
        )
    small = copy.deepcopy(model)
    converted = tuple(name for name in sparse if name not in left)
    for name in converted:
        linear = small.get_submodule(name)
        weight = linear.get_parameter("weight").detach().contiguous()
        linear.weight = nn.Parameter(_convert(weight), requires_grad=False)
    return SemiStructuredModel(small, converted, left)


def _check_device(weight: torch.Tensor) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "There is no CUDA device. Only GPUs of compute capability 8.0 or newer skip 2:4 zeros; a processor "
            "multiplies them. Use the model as it is here, or another machine."
        )
    if not weight.is_cuda:
        raise RuntimeError(f'The model is on {weight.device}. Its weights must be on the GPU. Call model.to("cuda").')
    found = torch.cuda.get_device_capability(weight.device)
    if found < CAPABILITY:
        raise RuntimeError(
            f"The GPU has compute capability {found[0]}.{found[1]}. Skipping 2:4 zeros needs 8.0 or newer (A100 and "
            "later). Use the model as it is."
        )


def _misfit(weight: torch.Tensor) -> str | None:
    """Say why a weight cannot be semi-structured; None where it can."""
    if weight.dtype not in BLOCKS:
        return f"{str(weight.dtype).removeprefix('torch.')} weights, not float16 or bfloat16"
    rows, columns = BLOCKS[weight.dtype]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{weight.shape[0]} outputs and {weight.shape[1]} inputs, not multiples of {rows} and {columns}"
    return None


def _convert(weight: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        return torch.sparse.to_sparse_semi_structured(weight)
