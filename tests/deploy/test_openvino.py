"""OpenVINO files: the same results in float32, and what bfloat16 and int8 weights change."""

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import cosine_similarity

from hf_opentrans import SparseCLIPVisionModel, Vocabulary
from hf_opentrans.deploy import ExportConfig, OpenVINOSegmenter, export_model, load_exported
from hf_opentrans.deploy.openvino_runtime import OpenVINOSession, import_openvino, quiet_openvino

# Not importorskip: a plain import of openvino sends a report over the network.
pytestmark = pytest.mark.skipif(
    find_spec("openvino") is None, reason="openvino is not installed; it comes with hf_opentrans[openvino]"
)
NAMES = ["cat", "sofa; couch", "wall"]


def config(precision="fp32", **options) -> ExportConfig:
    return ExportConfig(format="openvino", precision=precision, **options)


def test_a_dense_segmenter(parts, tmp_path):
    model, processor = parts
    export_model(parts[0], parts[1], tmp_path / "out", config(resolution=(24, 40)))
    again = OpenVINOSegmenter.from_pretrained(tmp_path / "out", threads=1)
    for batch in (1, 3):
        pixels, text = torch.randn(batch, 3, 24, 40), torch.eye(batch + 1, 16)
        with torch.no_grad():
            expected = model(pixels, text_embeddings=text)
        found = again(pixels, text_embeddings=text)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.dense_embeds, expected.dense_embeds, atol=1e-5, rtol=1e-4)
    vocabulary = again.encode_vocabulary(Vocabulary(NAMES))
    expected = model.encode_vocabulary(Vocabulary(NAMES), processor.tokenizer)
    torch.testing.assert_close(vocabulary.text_embeddings, expected.text_embeddings, atol=1e-5, rtol=1e-4)


def test_a_pruned_segmenter_with_a_fixed_vocabulary(pruned, parts, tmp_path):
    export_model(pruned, parts[1], tmp_path / "out", config(), vocabulary=Vocabulary(NAMES))
    again = load_exported(tmp_path / "out")
    vocabulary = pruned.encode_vocabulary(Vocabulary(NAMES), parts[1].tokenizer)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = pruned(pixels, vocabulary=vocabulary).logits
    torch.testing.assert_close(again(pixels).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "int8-weights", "int8-weights-bf16"])
def test_lower_precisions(parts, tmp_path, precision):
    if "int8" in precision and find_spec("nncf") is None:
        pytest.skip("nncf is not installed; it comes with hf_opentrans[openvino]")
    export_model(parts[0], parts[1], tmp_path / "out", config(precision), vocabulary=Vocabulary(NAMES))
    again = load_exported(tmp_path / "out")
    assert again.record.precision == precision
    # float32 where the processor has no bfloat16; never bfloat16 where it was not asked for
    assert again.record.computed_in in ({"bf16", "f32"} if precision.endswith("bf16") else {"f32"})
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = parts[0](pixels).dense_embeds
    assert float(cosine_similarity(again(pixels).dense_embeds, expected, dim=1).mean()) > 0.97
    if precision == "bf16":  # the precision can be chosen again
        found = load_exported(tmp_path / "out", precision="fp32")(pixels).dense_embeds
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# Signals do not reach a test's own process safely: where this fails, they kill it.
SIGNALS = """
import os, signal, sys
from pathlib import Path
from hf_opentrans.deploy.openvino_runtime import OpenVINOSession

first, second = (OpenVINOSession(Path(sys.argv[1]), [], computes_in="f32", threads=1) for _ in range(2))
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
print("alive")
"""


def test_signals_are_handled_after_models_are_gone(parts, tmp_path):
    model = parts[0].vision_model
    export_model(SparseCLIPVisionModel(model.config).eval(), parts[1], tmp_path / "out", config())
    command = [sys.executable, "-c", SIGNALS, str(tmp_path / "out" / "model.xml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["handled", "alive"]), done.stderr[-2000:]


def test_nothing_is_reported(monkeypatch):
    for before in (None, "false"):
        monkeypatch.delenv("CI", raising=False)
        if before is not None:
            monkeypatch.setenv("CI", before)
        with quiet_openvino():
            assert os.environ["CI"] == "true"
            import_openvino()
            telemetry = import_module("openvino.tools.ovc.telemetry_utils").init_ovc_telemetry("another name")
            assert telemetry.consent is False
        assert os.environ.get("CI") == before


def test_files_that_cannot_be_run(tmp_path):
    (tmp_path / "broken.xml").write_text("no graph")
    with pytest.raises(ValueError, match=r"is no graph that OpenVINO .* can run"):
        OpenVINOSession(tmp_path / "broken.xml", ["logits"], computes_in="f32")
