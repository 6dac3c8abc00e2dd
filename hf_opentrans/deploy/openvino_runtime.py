"""OpenVINO files: written from a traced graph, and run on the CPU in a precision that is always said."""

import functools
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from hf_opentrans._optional import require
from hf_opentrans.deploy.onnx_runtime import last_line
from hf_opentrans.deploy.tracing import Traced


def import_openvino(*more: str) -> Any:
    """Return the module openvino, imported without a report to its makers; `more` is imported likewise.

    Raises:
        ImportError: If one of them is missing.
    """
    with quiet_openvino():
        require("openvino", "openvino", *more)
        return import_module("openvino")


def convert_openvino(traced: Traced) -> Any:
    """Return a traced graph as an `openvino.Model` with its names.

    Raises:
        ImportError: If openvino is missing.
        RuntimeError: If an operator has no form in OpenVINO.
    """
    openvino = import_openvino()
    try:
        with quiet_openvino():
            model = openvino.convert_model(traced.program)
    except (RuntimeError, TypeError) as err:
        raise RuntimeError(
            f"The graph cannot be written for OpenVINO: {last_line(err)} Every operator needs a form in OpenVINO. Use "
            "--format onnx or torch-export, or a newer openvino."
        ) from err
    for ports, names in ((model.inputs, traced.inputs), (model.outputs, traced.outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    # The converter forgets which sizes are fixed.
    model.reshape({name: openvino.PartialShape(list(shape)) for name, shape in traced.input_shapes.items()})
    return model


def write_openvino(model: Any, path: Path) -> None:
    """Write an `openvino.Model`: a .xml file, and the weights in their own precision in a .bin file beside."""
    import_openvino().save_model(model, str(path), compress_to_fp16=False)


@functools.cache
def openvino_core() -> Any:
    """Return the one `openvino.Core` of this process, which lives as long as it.

    OpenVINO's CPU plugin gives the thread that first compiles a graph another stack for signals, and frees it with its
    core. Where two cores end in the order of their making, or one ends on another thread, the thread is left with a
    freed stack, and its next signal (Ctrl-C, the end of a child process) kills the process (OpenVINO 2026.4).
    """
    return import_openvino().Core()


class OpenVINOSession:
    """A graph that OpenVINO runs on the CPU.

    OpenVINO computes in bfloat16 by itself where the processor has it; here the precision is always said.

    Args:
        path: The .xml file.
        outputs: Names of its outputs.
        computes_in: "f32" or "bf16".
        threads: Of one run; OpenVINO's own choice by default.

    Raises:
        ImportError: If openvino is missing.
        ValueError: If the files are no OpenVINO graph.
    """

    def __init__(self, path: Path, outputs: Sequence[str], *, computes_in: str, threads: int | None = None) -> None:
        openvino = import_openvino()
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": computes_in, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        core = openvino_core()
        try:
            self._compiled = core.compile_model(core.read_model(str(path)), "CPU", options)
        except RuntimeError as err:
            raise ValueError(
                f"{str(path)!r} is no graph that OpenVINO {openvino.__version__} can run, damaged or cut short: "
                f"{last_line(err)} Copy both files again, or export the model again."
            ) from err
        self._outputs = tuple(outputs)
        # float32 where bfloat16 was asked for and the processor has none.
        hint = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        self.computes_in = "bf16" if hint == openvino.Type.bf16 else "f32"

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs by name."""
        feeds = {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}
        found = self._compiled(feeds)
        # A copy: the next run would write over it.
        return {name: torch.tensor(found[name]) for name in self._outputs}


@contextmanager
def quiet_openvino() -> Iterator[None]:
    """Silence the notes of openvino and nncf about themselves, and keep them from reporting usage over the network.

    Both report imports and conversions, unless they run in continuous integration, which they know by the variable
    `CI`. So whatever imports or calls them does it in here.
    """
    loggers = [logging.getLogger(name) for name in ("nncf", "openvino")]
    levels = [logger.level for logger in loggers]
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # nncf draws a bar whoever watches.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
