"""bfloat16 in PyTorch, and what is said where something is missing."""

import sys

import pytest
import torch

from hf_opentrans.deploy import ExportConfig, export_model, quantization, supports_bfloat16, to_bfloat16


def test_a_copy_in_bfloat16(parts, monkeypatch):
    model = parts[0]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert supports_bfloat16()
    half = to_bfloat16(model)
    assert (half.dtype, model.dtype) == (torch.bfloat16, torch.float32)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, found = model(pixels).dense_embeds, half(pixels.bfloat16()).dense_embeds
    assert float(torch.nn.functional.cosine_similarity(expected, found.float(), dim=1).min()) > 0.99
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert not supports_bfloat16()
    with pytest.raises(RuntimeError, match="none of the instructions amx_bf16"):
        to_bfloat16(model)


@pytest.mark.parametrize(
    ("config", "module", "extra"),
    [
        (ExportConfig(), "onnxruntime", "onnx"),
        (ExportConfig(format="openvino"), "openvino", "openvino"),
        (ExportConfig(format="openvino", precision="int8-weights"), "nncf", "openvino"),
    ],
)
def test_a_missing_runtime_names_the_extra(parts, tmp_path, monkeypatch, config, module, extra):
    for needed in {"onnx", "onnxscript", "openvino"} - {module}:  # as if they were there
        monkeypatch.setitem(sys.modules, needed, sys.modules[__name__])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'`{module}` is needed .*pip install "hf_opentrans\[{extra}\]"'):
        export_model(parts[0], parts[1], tmp_path / "out", config)
    assert list(tmp_path.glob("out")) == []


def test_static_ranges_need_inputs(tmp_path):
    with pytest.raises(ValueError, match="There are 0 calibration inputs"):
        quantization.quantize_onnx_static(tmp_path / "a.onnx", tmp_path / "b.onnx", [])
