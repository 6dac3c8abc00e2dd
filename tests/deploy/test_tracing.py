"""One graph for all formats: equal to the model for any batch, and without what does not depend on the input."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

from hf_opentrans.deploy.tracing import fold_constants, require_torch, trace
from hf_opentrans.deploy.wrappers import Exportable, SegmenterGraph, TextGraph, TowerGraph
from hf_opentrans.models.configuration_sparse_clip import SEGMENTATION_MODES

BATCH, QUERIES = torch.export.Dim("batch", min=1), torch.export.Dim("queries", min=1)


def trace_segmenter(model, size, **options) -> Any:
    example = {"pixel_values": torch.randn(2, 3, *size), "text_embeddings": torch.eye(3, 16)}
    graph = SegmenterGraph(model, None, example["pixel_values"], options).eval()
    return graph, trace(graph, example, {"pixel_values": {0: BATCH}, "text_embeddings": {0: QUERIES}})


def operators(program) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def check_equal(graph, module, size, batches=(1, 3)):
    for batch in batches:
        inputs = torch.randn(batch, 3, *size), normalize(torch.randn(batch + 1, 16), dim=-1)
        with torch.no_grad():
            expected, found = graph(*inputs), module(*inputs)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", SEGMENTATION_MODES)
def test_every_mode_at_another_size(parts, mode):
    pixels, text = torch.randn(2, 3, 24, 48), torch.eye(3, 16)
    graph = SegmenterGraph(parts[0], None, pixels, {"mode": mode}).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(graph, (pixels, text), dynamic_shapes=({0: BATCH}, {0: QUERIES}))
        assert any("upsample" in name for name in operators(program))
        folded = fold_constants(program)
        check_equal(graph, folded.module, (24, 48))
    left = operators(folded.module)
    assert not any("upsample" in name or "arange" in name or ".exp." in name for name in left), left
    biases = [part for _, part in folded.module.named_buffers() if part.shape == (19, 19)]
    assert len(biases) == (mode == "naclip")
    for bias in biases:
        assert float(bias[0].abs().max()) == 0  # the class token has no neighbours


def test_empty_and_left_out_sublayers(pruned):
    graph, traced = trace_segmenter(pruned, (32, 32))
    assert traced.outputs == ("logits", "dense_embeds")
    assert traced.input_shapes == {"pixel_values": (-1, 3, 32, 32), "text_embeddings": (-1, 16)}
    check_equal(graph, traced.program.module(), (32, 32))
    assert traced.emptied == 1
    shapes = [node.meta["val"].shape for node in traced.program.graph.nodes if hasattr(node.meta.get("val"), "shape")]
    assert all(0 not in [size for size in shape if isinstance(size, int)] for shape in shapes)


def test_the_graph_holds_no_weight_that_nothing_reads(parts):
    model = parts[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, traced = trace_segmenter(model, (48, 32))
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    names = " ".join(traced.program.state_dict)
    assert "text_model" not in names
    assert "vision_model" in names
    example = {"input_ids": torch.tensor([[536, 3, 537], [536, 4, 537]]), "attention_mask": torch.ones(2, 3).long()}
    texts, length = torch.export.Dim("texts", min=1), torch.export.Dim("length", min=2, max=77)
    text = trace(TextGraph(model).eval(), example, {name: {0: texts, 1: length} for name in example})
    assert "vision_model" not in " ".join(text.program.state_dict)
    ids = torch.tensor([[536, 9, 8, 7, 537]])
    with torch.no_grad():
        expected = model.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output
        torch.testing.assert_close(text.program.module()(ids, torch.ones_like(ids))[0], expected)


def test_a_tower(parts):
    tower = parts[0].vision_model
    graph = TowerGraph(tower, torch.zeros(2, 3, 40, 32)).eval()
    traced = trace(graph, {"pixel_values": torch.randn(2, 3, 40, 32)}, {"pixel_values": {0: BATCH}})
    assert traced.outputs == ("last_hidden_state", "pooler_output")
    pixels = torch.randn(5, 3, 40, 32)
    with torch.no_grad():
        expected = tower(pixels, interpolate_pos_encoding=True)
        found = traced.program.module()(pixels)
    torch.testing.assert_close(found[0], expected.last_hidden_state)


def test_what_cannot_be_traced_says_so():
    class Counting(Exportable):
        output_names = ("y",)

        def forward(self, x):
            return (x[: int(x.sum())],)

    with pytest.raises(RuntimeError, match=r"Counting cannot be traced at x \(2, 3\): .*Use this model in PyTorch"):
        trace(Counting(), {"x": torch.ones(2, 3)}, {})


def test_an_old_torch_is_told(monkeypatch):
    require_torch()
    monkeypatch.setattr(torch, "__version__", "2.10.3+cpu")
    with pytest.raises(ImportError, match=r"torch 2\.10\.3\+cpu is installed\. Export needs 2\.11 or newer"):
        require_torch()


@settings(max_examples=4, deadline=None, phases=[Phase.generate])  # to shrink an example takes minutes
@given(width=st.integers(1, 5), bias=st.booleans(), scale=st.floats(0.5, 2))
def test_folding_changes_no_result(width, bias, scale):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, width, bias=bias)
            self.grid = nn.Parameter(torch.arange(3.0))
            self.unused = nn.Linear(7, 7)

        def forward(self, x):
            constant = (self.grid * scale).exp().sum() + torch.arange(3).sum()
            first, second = torch.split(self.grid.outer(self.grid), [1, 2])
            return self.layer(x) * constant + first.sum() * second.mean() * x.shape[0]

    module = Mixed().eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(module, (torch.randn(2, 3),), dynamic_shapes=({0: BATCH},))
        folded = fold_constants(program)
        assert folded.count >= 2
        assert not any(name.startswith("unused") for name, _ in folded.module.named_parameters())
        for batch in (1, 4):
            x = torch.randn(batch, 3)
            torch.testing.assert_close(folded.module(x), module(x))
