"""ONNX files and ONNX Runtime: the same results, int8, and files that cannot be run."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from hf_opentrans import Vocabulary
from hf_opentrans.deploy import ExportConfig, OnnxSegmenter, export_model, load_exported
from hf_opentrans.deploy.onnx_runtime import OnnxSession

onnx, _, _ = (
    pytest.importorskip(name, reason=f"{name} is not installed; it comes with hf_opentrans[onnx]")
    for name in ("onnx", "onnxscript", "onnxruntime")
)

pytestmark = pytest.mark.onnx
NAMES = ["cat", "sofa; couch", "wall"]


def check_equal(model, again, batches=(1, 3)):
    for batch in batches:
        pixels, text = torch.randn(batch, 3, *again.record.image_size), torch.eye(batch + 1, 16)
        with torch.no_grad():
            expected = model(pixels, text_embeddings=text)
        found = again(pixels, text_embeddings=text)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_a_dense_segmenter(parts, tmp_path, tiny_images):
    model, processor = parts
    export_model(parts[0], parts[1], tmp_path / "out", ExportConfig(resolution=(24, 40)))
    again = OnnxSegmenter.from_pretrained(tmp_path / "out", threads=1)
    check_equal(model, again)
    assert {"model.onnx", "text.onnx"} <= set(again.record.files)
    vocabulary = again.encode_vocabulary(Vocabulary(NAMES, templates="vild14"))
    expected = model.encode_vocabulary(Vocabulary(NAMES, templates="vild14"), processor.tokenizer)
    torch.testing.assert_close(vocabulary.text_embeddings, expected.text_embeddings, atol=1e-5, rtol=1e-5)
    assert again.segment(tiny_images[0], NAMES)[0].segmentation.shape == (40, 48)


@pytest.mark.parametrize("mode", ["naclip", "sclip"])
def test_modes_of_a_pruned_segmenter(pruned, parts, tmp_path, mode):
    export_model(pruned, parts[1], tmp_path / "out", ExportConfig(mode=mode), vocabulary=Vocabulary(NAMES))
    again = load_exported(tmp_path / "out")
    vocabulary = pruned.encode_vocabulary(Vocabulary(NAMES), parts[1].tokenizer)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = pruned(pixels, vocabulary=vocabulary, mode=mode).logits
    torch.testing.assert_close(again(pixels).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static"])
def test_int8(parts, tmp_path, images, precision):
    calibration = images if precision == "int8-static" else None
    config = ExportConfig(precision=precision)
    export_model(parts[0], parts[1], tmp_path / "out", config, vocabulary=Vocabulary(NAMES), calibration=calibration)
    again = load_exported(tmp_path / "out")
    assert again.record.precision == precision
    assert not [name for name in again.record.files if name.startswith("plain")]
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = parts[0](pixels).dense_embeds
    cosine = cosine_similarity(again(pixels).dense_embeds, expected, dim=1)
    assert 0.95 < float(cosine.mean()) < 0.9999999
    graph = _graph(tmp_path / "out" / "model.onnx")
    kinds = {node.op_type for node in graph.node}
    assert ("DynamicQuantizeLinear" in kinds) == (precision == "int8-dynamic")
    assert ("QuantizeLinear" in kinds) == (precision == "int8-static")
    int8 = [item for item in graph.initializer if item.data_type == onnx.TensorProto.INT8 and len(item.dims) == 2]
    assert len(int8) == 6 + 3 + 1  # of the first layer; of the last keys, values and output; the projection
    scales = [item for item in graph.initializer if item.name.endswith("_scale") and item.dims == [32]]
    assert scales  # one per output channel


def test_threads_of_an_idle_session_do_not_spin(parts, tmp_path):
    export_model(parts[0], parts[1], tmp_path / "out", vocabulary=Vocabulary(NAMES))
    options = OnnxSession(tmp_path / "out" / "model.onnx")._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def _graph(path) -> Any:
    return onnx.load(path).graph


def test_files_that_cannot_be_run(tmp_path):
    helper = onnx.helper
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="is no ONNX graph, damaged or cut short"):
        OnnxSession(tmp_path / "broken.onnx")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Magic", ["x"], ["y"], domain="nowhere")], "g", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "magic.onnx")
    with pytest.raises(RuntimeError, match=r"ONNX Runtime .* cannot run .*Magic.*pip install --upgrade"):
        OnnxSession(tmp_path / "magic.onnx")
