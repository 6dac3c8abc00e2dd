"""How the outcome of a pruning run is written: model, processor and what the run says of it, all or nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_opentrans._distributed import is_main_process, wait_for_all
from hf_opentrans._files import write_folder


def save_result(
    folder: str | Path,
    model: Any,
    processor: Any,
    *,
    marker: str,
    disk_dtype: torch.dtype | None,
    write_more: Callable[[Path], object],
) -> None:
    """Write a folder that is complete or not there; of several processes the main one writes, and all wait for it.

    Args:
        folder: New, empty, or an earlier output.
        model: Saved with `save_pretrained`.
        processor: Saved with the model; None leaves it out.
        marker: Name of the file that tells an earlier output from a foreign folder.
        disk_dtype: Precision of floating-point weights on disk. None keeps the model's.
        write_more: Called with the folder that is being written, for reports and what else belongs to it.
    """
    try:
        if is_main_process():
            with write_folder(folder, marker=marker) as target:
                state = model.state_dict()
                stored = {k: v.to(disk_dtype or v.dtype) if v.is_floating_point() else v for k, v in state.items()}
                model.save_pretrained(target, state_dict=stored)
                if processor is not None:
                    processor.save_pretrained(target)
                write_more(target)
    finally:
        wait_for_all()
