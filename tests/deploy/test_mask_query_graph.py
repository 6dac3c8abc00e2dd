"""Segmenters with mask queries as graphs: any names with aliases, FC-CLIP's two weights, and the same masks."""

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from hf_opentrans import FCCLIPForSegmentation, Vocabulary
from hf_opentrans.deploy import ExportConfig, OnnxSegmenter, export_model, load_exported
from hf_opentrans.deploy.mask_query_graph import (
    QUERIES,
    WEIGHTS,
    MaskQueriesGraph,
    class_inputs,
    ensemble_of,
    parity_inputs,
)
from hf_opentrans.models.modeling_gkc import GKCForSegmentation
from hf_opentrans.models.modeling_mask_queries import LOWEST_LOGIT, TextClasses
from hf_opentrans.models.processing_masks import post_process_instance_segmentation

SIZES: dict[str, Any] = {
    "hidden_dim": 32,
    "num_queries": 4,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "feedforward_dim": 16,
    "num_attention_heads": 4,
}
# Of two names one is seen; the background of 17 words is one class; the last is unseen.
NAMES = Vocabulary(["sofa; couch", "cat", "stone wall"], templates="plain", background="words17")
SEEN = ["Couch", "dog"]
SLOW = pytest.mark.slow  # its graph has two thousand nodes, traced twice


def make(kind: Any, clip: Any, **options: Any) -> Any:
    """Build a model whose two classifications have weights that differ by class."""
    if kind is FCCLIPForSegmentation:
        options = {"seen_classes": SEEN, "ensemble_alpha": 0.25, "ensemble_beta": 0.75, **options}
    return kind.from_clip(clip, **SIZES, **options).eval()


def unit(*shape: int) -> torch.Tensor:
    return normalize(torch.randn(*shape), dim=-1)


def check_same_masks(model: Any, again: Any, vocabulary: Vocabulary, batches: tuple[int, ...] = (1, 3)) -> None:
    """Compare all outputs for several batches, and instances made of them."""
    for batch in batches:
        pixels = torch.randn(batch, 3, *again.record.image_size)
        with torch.no_grad():
            expected = model(pixels, vocabulary=vocabulary)
        found = again(pixels, vocabulary=vocabulary)
        for name in ("logits", "class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=1e-3)
        ours, theirs = (post_process_instance_segmentation(outputs, threshold=0.0) for outputs in (found, expected))
        for mine, wanted in zip(ours, theirs, strict=True):
            assert [item["label"] for item in mine["segments_info"]] == [i["label"] for i in wanted["segments_info"]]


def test_aliases_without_a_look_at_their_number():
    owners = torch.tensor([0, 0, 1, 2, 2, 2])
    plain = TextClasses(unit(6, 8), owners, 3)
    general = TextClasses(plain.embeddings, owners, 3, class_queries=torch.tensor([[0, 1, 0], [2, 2, 2], [3, 4, 5]]))
    logits = torch.randn(2, 4, 6)
    expected = torch.stack([logits[..., :2].amax(-1), logits[..., 2], logits[..., 3:].amax(-1)], -1)
    assert torch.equal(plain.best_alias(logits), expected)
    assert torch.equal(general.best_alias(logits), expected)
    spread = general.to_queries(torch.randn(2, 3, 5, 7))
    assert torch.equal((spread == LOWEST_LOGIT).all(-1).all(-1), torch.tensor([0, 1, 0, 0, 1, 1]).bool().expand(2, 6))
    each = TextClasses(
        plain.embeddings, torch.arange(6), 6, class_queries=torch.arange(6)[:, None]
    )  # as many classes as names
    assert torch.equal(each.best_alias(logits), logits)
    maps = torch.randn(2, 6, 5, 7)
    assert torch.equal(each.to_queries(maps), maps)


@pytest.mark.parametrize("kind", [FCCLIPForSegmentation, GKCForSegmentation])
def test_the_graph_is_the_model_exactly(parts, kind):
    model = make(kind, parts[0])
    vocabulary = model.encode_vocabulary(NAMES, parts[1].tokenizer)
    pixels = torch.randn(2, 3, 32, 16)
    graph = MaskQueriesGraph(model, pixels).eval()
    for names in (vocabulary, None):
        text = class_inputs(names, vocabulary.text_embeddings, ensemble_of(model))
        assert (WEIGHTS in text) == (kind is FCCLIPForSegmentation)
        asked = {"vocabulary": names} if names is not None else {"text_embeddings": vocabulary.text_embeddings}
        with torch.no_grad():
            expected = model(pixels, **asked)
            found = graph.named(pixels, *text.values())
        assert next(iter(found)) == "logits"
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name


def test_weights_and_starts_of_names(parts):
    model = make(FCCLIPForSegmentation, parts[0])
    vocabulary = model.encode_vocabulary(NAMES, parts[1].tokenizer)
    text = class_inputs(vocabulary, vocabulary.text_embeddings, ensemble_of(model))
    assert text[QUERIES].shape == (4, 17)
    assert text[QUERIES][:3, :3].tolist() == [[0, 1, 0], [2, 2, 2], [3, 3, 3]]
    assert sorted(text[QUERIES][3].tolist()) == list(range(4, 21))
    assert text[WEIGHTS].tolist() == [0.25, 0.75, 0.75, 0.75]
    assert class_inputs(None, unit(3, 4), ensemble_of(model))[WEIGHTS].tolist() == [0.25] * 3
    few, full = parity_inputs(model, unit(10, 4))
    assert len(few[QUERIES]) < len(few["text_embeddings"]) < len(full["text_embeddings"]) == len(full[QUERIES])
    assert set(few[WEIGHTS].tolist()) == {0.25, 0.75}


@SLOW
@pytest.mark.parametrize("kind", [FCCLIPForSegmentation, GKCForSegmentation])
def test_any_names_through_torch_export(pruned, parts, tmp_path, tiny_images, kind):
    model = make(kind, pruned)  # a tower without heads, neurons, an MLP
    export_model(model, parts[1], tmp_path / "out", ExportConfig(format="torch-export", resolution=(16, 24)))
    again = load_exported(tmp_path / "out")
    check_same_masks(model, again, model.encode_vocabulary(NAMES, parts[1].tokenizer))
    check_same_masks(model, again, model.encode_vocabulary(Vocabulary(["cat"]), parts[1].tokenizer), batches=(2,))
    (result,) = again.segment(tiny_images[0], NAMES)
    assert result.segmentation.shape == (40, 48)
    assert result.labels == ("sofa", "cat", "stone wall", "background")


@SLOW
def test_a_built_in_vocabulary(parts, tmp_path):
    model = make(FCCLIPForSegmentation, parts[0])
    config = ExportConfig(format="torch-export", resolution=(16, 24))
    record = export_model(model, parts[1], tmp_path / "out", config, vocabulary=NAMES)
    assert record.inputs == ("pixel_values",)
    again = load_exported(tmp_path / "out")
    pixels = torch.randn(3, 3, 16, 24)
    with torch.no_grad():
        expected = model(pixels, vocabulary=model.encode_vocabulary(NAMES, parts[1].tokenizer))
    torch.testing.assert_close(again(pixels).logits, expected.logits, atol=1e-4, rtol=1e-4)


@SLOW
@pytest.mark.onnx
@pytest.mark.parametrize("kind", [FCCLIPForSegmentation, GKCForSegmentation])
def test_any_names_through_onnx(parts, tmp_path, kind):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it comes with hf_opentrans[onnx]")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it comes with hf_opentrans[onnx]")
    model = make(kind, parts[0])
    export_model(model, parts[1], tmp_path / "out", ExportConfig(resolution=(16, 24)))
    again = OnnxSegmenter.from_pretrained(tmp_path / "out", threads=1)
    check_same_masks(model, again, model.encode_vocabulary(NAMES, parts[1].tokenizer))


@SLOW
@pytest.mark.parametrize(("kind", "vocabulary"), [(FCCLIPForSegmentation, NAMES), (GKCForSegmentation, None)])
def test_any_names_through_openvino(parts, tmp_path, kind, vocabulary):
    pytest.importorskip("openvino", reason="openvino is not installed; it comes with hf_opentrans[openvino]")
    model = make(kind, parts[0])
    export_model(model, parts[1], tmp_path / "out", ExportConfig(format="openvino"), vocabulary=vocabulary)
    again = load_exported(tmp_path / "out", threads=1)
    encoded = model.encode_vocabulary(NAMES, parts[1].tokenizer)
    check_same_masks(model, again, encoded)
