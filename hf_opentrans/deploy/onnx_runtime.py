"""ONNX files: written from a traced graph, and run by ONNX Runtime."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import cast

import torch

from hf_opentrans._optional import require
from hf_opentrans.deploy.tracing import Traced

# Files of protobuf end at 2 GiB; larger weights go into a file beside.
MOST_BYTES_IN_ONE_FILE = 1_800_000_000
# Messages of ONNX Runtime: errors alone, which are raised anyway.
_ERRORS_ONLY = 3


def write_onnx(traced: Traced, path: Path) -> None:
    """Write a traced graph as an ONNX file.

    Raises:
        ImportError: If onnx or onnxscript is missing.
        RuntimeError: If an operator has no form in ONNX.
    """
    require("onnx", "onnx", "onnxscript")
    weights = [*traced.program.state_dict.values(), *traced.program.constants.values()]
    size = sum(value.numel() * value.element_size() for value in weights if isinstance(value, torch.Tensor))
    try:
        with _quiet():
            program = torch.onnx.export(
                traced.program,
                input_names=list(traced.inputs),
                output_names=list(traced.outputs),
                dynamo=True,
                verbose=False,
            )
            cast("torch.onnx.ONNXProgram", program).save(path, external_data=size > MOST_BYTES_IN_ONE_FILE)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as err:
        raise RuntimeError(
            f"The graph cannot be written as ONNX: {last_line(err)} Every operator needs a form in ONNX. Use "
            "--format openvino or torch-export, or a newer torch and onnxscript."
        ) from err


class OnnxSession:
    """A graph that ONNX Runtime runs on the CPU.

    Args:
        path: The .onnx file.
        threads: Of one operator; ONNX Runtime's own choice by default.

    Raises:
        ImportError: If onnxruntime is missing.
        ValueError: If the file is no ONNX graph.
        RuntimeError: If ONNX Runtime lacks an operator of it.
    """

    computes_in = "f32"

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        require("onnx", "onnxruntime")
        onnxruntime = import_module("onnxruntime")
        errors = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # Its threads would spin for a while after a run, and slow down whatever runs next: another session, PyTorch.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"{str(path)!r} is empty. It must be an ONNX graph. Copy or export the model again.")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except (errors.InvalidProtobuf, errors.InvalidGraph, errors.NoSuchFile) as err:
            raise ValueError(
                f"{str(path)!r} is no ONNX graph, damaged or cut short: {last_line(err)} Copy the file again, or "
                "export the model again."
            ) from err
        except (errors.NotImplemented, errors.Fail, errors.RuntimeException, errors.InvalidArgument) as err:
            raise RuntimeError(
                f"ONNX Runtime {onnxruntime.__version__} cannot run {str(path)!r}: {last_line(err)} It must have "
                'every operator of it. Run: pip install --upgrade "hf_opentrans[onnx]", or export the model again.'
            ) from err
        self._outputs = [item.name for item in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs by name."""
        feeds = {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}
        found = self._session.run(self._outputs, feeds)
        return {name: torch.from_numpy(value) for name, value in zip(self._outputs, found, strict=True)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch and onnxscript say about themselves: whether the file is right is checked anyway."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def last_line(err: BaseException) -> str:
    """Return the last line of an error that says anything, as a sentence."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{(lines or [type(err).__name__])[-1].rstrip('.')}."
