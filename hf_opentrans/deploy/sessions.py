"""What all runtimes have in common: a graph in a file, tensors in by name, tensors out by name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import torch

from hf_opentrans.deploy.onnx_runtime import OnnxSession, last_line
from hf_opentrans.deploy.openvino_runtime import OpenVINOSession

# For every format the precisions, the usual one first. What they mean: `quantization`.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "int8-dynamic", "int8-static"),
    "openvino": ("fp32", "bf16", "int8-weights", "int8-weights-bf16"),
    "torch-export": ("fp32",),
}


class Session(Protocol):
    """A loaded graph; `computes_in` is "f32" or "bf16", what the runtime really does."""

    computes_in: str

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs by name."""
        ...


class TorchSession:
    """A graph of `torch.export`, run by PyTorch without the classes that it was made from.

    Args:
        path: The .pt2 file.
        outputs: Names of its outputs.

    Raises:
        ValueError: If the file is no such graph.
    """

    computes_in = "f32"

    def __init__(self, path: Path, outputs: Sequence[str]) -> None:
        try:
            # Shapes are checked by what calls this; the tracer's guards also refuse sizes that the graph can take.
            self._module = torch.export.load(path).module(check_guards=False)
        except (RuntimeError, ValueError, KeyError, OSError, BadZipFile) as err:
            raise ValueError(
                f"{str(path)!r} is no graph that torch {torch.__version__} can read: {last_line(err)} The file must "
                "be complete and not of a newer torch. Copy the file again, or export the model again."
            ) from err
        self._outputs = tuple(outputs)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs by name; the inputs are in the order of the graph's."""
        with torch.inference_mode():
            return dict(zip(self._outputs, self._module(*inputs.values()), strict=True))


def open_session(
    path: Path, *, file_format: str, precision: str, outputs: Sequence[str], threads: int | None = None
) -> Session:
    """Load a graph in the runtime of its format.

    Args:
        path: The file.
        file_format: One of the keys of `PRECISIONS`.
        precision: One of its values.
        outputs: Names of the graph's outputs.
        threads: Of one run; the runtime's own choice by default. PyTorch has one number for all
            (`torch.set_num_threads`).

    Raises:
        ImportError: If the runtime is not installed.
        ValueError: If the file is no graph.
        RuntimeError: If the runtime lacks an operator.
    """
    if file_format == "onnx":
        return OnnxSession(path, threads=threads)
    if file_format == "openvino":
        return OpenVINOSession(path, outputs, computes_in=computes_in(precision), threads=threads)
    return TorchSession(path, outputs)


def computes_in(precision: str) -> str:
    """Return OpenVINO's name of the floating-point type that a precision computes in."""
    return "bf16" if precision.endswith("bf16") else "f32"
