"""Lower precisions: int8 in ONNX Runtime and OpenVINO, bfloat16 in PyTorch.

| precision         | weights | activations                              | runtime      |
|-------------------|---------|------------------------------------------|--------------|
| int8-dynamic      | int8    | uint8, range of every tensor at run time | ONNX Runtime |
| int8-static       | int8    | uint8, ranges from calibration images    | ONNX Runtime |
| int8-weights      | int8    | float32 (the runtime may round to int8)  | OpenVINO     |
| int8-weights-bf16 | int8    | bfloat16 (the runtime may round to int8) | OpenVINO     |

Weights have one scale per output channel. Only products with weights are quantised: in the products of queries, keys
and values the ranges are too wide, and the patch embedding is a small share of the work.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_opentrans._optional import require
from hf_opentrans.deploy.openvino_runtime import import_openvino, quiet_openvino
from hf_opentrans.deploy.tracing import require_torch

# Products with weights; what the dynamo exporter writes linear layers as.
_PRODUCTS = ["MatMul", "Gemm"]
# Names of the processors' instructions for bfloat16 in `torch.cpu.get_capabilities`.
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


def quantize_onnx_dynamic(source: Path, target: Path) -> None:
    """Write an ONNX file with int8 weights whose activations are quantised at run time.

    Args:
        source: ONNX file in float32.
        target: File to write.

    Raises:
        ImportError: If onnx or onnxruntime is missing.
    """
    require("onnx", "onnx", "onnxruntime")
    onnx = import_module("onnxruntime.quantization")
    with _prepared(source) as prepared:
        onnx.quantize_dynamic(
            prepared,
            target,
            op_types_to_quantize=_PRODUCTS,
            per_channel=True,
            weight_type=onnx.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )


def quantize_onnx_static(source: Path, target: Path, inputs: Sequence[dict[str, torch.Tensor]]) -> None:
    """Write an ONNX file with int8 weights and activations, whose ranges are those on calibration inputs.

    Args:
        source: ONNX file in float32.
        target: File to write.
        inputs: Inputs of the graph by name, some dozens of images are enough.

    Raises:
        ImportError: If onnx or onnxruntime is missing.
        ValueError: If there are no inputs.
    """
    if not inputs:
        raise ValueError("There are 0 calibration inputs. Ranges are measured on some. Give images.")
    require("onnx", "onnx", "onnxruntime")
    onnx: Any = import_module("onnxruntime.quantization")

    class Reader(onnx.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> Any:
            feeds = next(self.left, None)
            return None if feeds is None else {name: tensor.numpy() for name, tensor in feeds.items()}

    with _prepared(source) as prepared:
        onnx.quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=onnx.QuantFormat.QDQ,
            op_types_to_quantize=_PRODUCTS,
            per_channel=True,
            activation_type=onnx.QuantType.QUInt8,
            weight_type=onnx.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )


def compress_openvino_weights(model: Any) -> Any:
    """Return an `openvino.Model` whose weights are int8, one scale per output channel; activations stay as they are.

    Raises:
        ImportError: If nncf is missing.
    """
    with quiet_openvino():
        import_openvino("nncf")
        nncf = import_module("nncf")
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def supports_bfloat16() -> bool:
    """Tell whether this processor has instructions for bfloat16; without them it is slower than float32."""
    require_torch()
    found = torch.cpu.get_capabilities()
    return any(found.get(flag, False) for flag in _BF16_FLAGS)


def to_bfloat16(model: nn.Module) -> nn.Module:
    """Return a copy of a model in bfloat16 for PyTorch on the processor; the model stays as it is.

    Casting the weights once is faster than `torch.autocast`, which casts them in every call.

    Raises:
        RuntimeError: If the processor has no instructions for bfloat16.
    """
    if not supports_bfloat16():
        raise RuntimeError(
            f"This processor has none of the instructions {', '.join(_BF16_FLAGS)}. Without them bfloat16 is slower "
            "than float32. Stay with float32, or use another machine."
        )
    return copy.deepcopy(model).to(torch.bfloat16)


@contextmanager
def _prepared(source: Path) -> Iterator[Path]:
    """Yield a copy of an ONNX file with inferred shapes and folded constants, as ONNX Runtime's quantisers want it."""
    prepare = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    prepared = source.with_name(f"{source.stem}.prepared.onnx")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantisers write their notes to the root logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(source, prepared, skip_symbolic_shape=True)
            yield prepared
    finally:
        root.setLevel(level)
        prepared.unlink(missing_ok=True)
