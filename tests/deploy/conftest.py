"""Segmenters small enough to be traced in a second, and exports that the tests share."""

import shutil
from typing import Any

import pytest
import torch

from hf_opentrans import DenseCLIPForSegmentation, OpenVocabularyProcessor, SparseCLIPConfig, Vocabulary
from hf_opentrans.deploy import ExportConfig, export_model

# Without heads and neurons, but with their biases; odd widths; without an MLP. The last is whole.
LAYERS = {
    0: {"num_attention_heads": 0, "intermediate_size": 0},
    1: {"num_attention_heads": 2, "qk_head_dim": 5, "v_head_dim": 3, "intermediate_size": 17},
    2: {"skip": ["mlp"], "num_attention_heads": 3},
}


def make_segmenter(config: Any, seed: int, **vision: Any) -> DenseCLIPForSegmentation:
    """Build a segmenter whose biases and norms are random too."""
    values = config().to_dict()
    values.pop("model_type")
    values["vision_config"] |= vision
    values["text_config"]["num_hidden_layers"] = 1
    torch.manual_seed(seed)
    model = DenseCLIPForSegmentation(SparseCLIPConfig(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def parts(
    tiny_clip_config, tiny_tokenizer, tiny_image_processor
) -> tuple[DenseCLIPForSegmentation, OpenVocabularyProcessor]:
    """Return a dense segmenter of two layers, 32 pixels in patches of 8, and its processor; not to be changed."""
    model = make_segmenter(tiny_clip_config, 0, num_hidden_layers=2)
    return model, OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)


@pytest.fixture(scope="session")
def pruned(tiny_clip_config) -> DenseCLIPForSegmentation:
    """Return a segmenter of four layers with the widths in `LAYERS`; not to be changed."""
    return make_segmenter(tiny_clip_config, 3, num_hidden_layers=4, per_layer_config=LAYERS)


@pytest.fixture(scope="session")
def shared_exports(parts, tmp_path_factory) -> Any:
    """Return a folder with an export that takes any names, "free", and one with a built-in vocabulary, "fixed"."""
    root = tmp_path_factory.mktemp("exports")
    config = ExportConfig(format="torch-export")
    export_model(parts[0], parts[1], root / "free", config)
    export_model(
        parts[0], parts[1], root / "fixed", config, vocabulary=Vocabulary(["cat", "sofa; couch"], "plain", "words17")
    )
    return root


@pytest.fixture
def free_folder(shared_exports, tmp_path) -> Any:
    """Return a copy of the export that takes any names."""
    return shutil.copytree(shared_exports / "free", tmp_path / "free")


@pytest.fixture
def fixed_folder(shared_exports, tmp_path) -> Any:
    """Return a copy of the export with the classes cat, sofa and background."""
    return shutil.copytree(shared_exports / "fixed", tmp_path / "fixed")
