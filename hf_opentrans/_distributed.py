"""Several processes, one answer: batches are dealt out, sums are added up. Without a process group nothing happens."""

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ._optional import require

_T = TypeVar("_T")


def start_processes() -> None:
    """Join the process group that `torchrun` or `accelerate launch` started this process for, if one did."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_distributed():
        require("train", "accelerate")
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def is_distributed() -> bool:
    """Tell whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process_count() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Tell whether this process writes files and prints."""
    return not is_distributed() or dist.get_rank() == 0


def own_share(batches: Sequence[_T]) -> list[_T]:
    """Return the batches of this process: every n-th one.

    Raises:
        ValueError: If a process would get none.
    """
    if not is_distributed():
        return list(batches)
    count = dist.get_world_size()
    if len(batches) < count:
        raise ValueError(
            f"There are {len(batches)} batches of calibration images for {count} processes. Every process needs one. "
            "Use more images, a smaller batch_size, or fewer processes."
        )
    return list(batches[dist.get_rank() :: count])


def add_up(*tensors: torch.Tensor) -> None:
    """Add every tensor over all processes, in place."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Return the first process's tensor, everywhere."""
    if is_distributed():
        tensor = tensor.clone()
        dist.broadcast(tensor, src=0)
    return tensor


def wait_for_all() -> None:
    """Wait until every process is here."""
    if is_distributed():
        dist.barrier()
