"""A tiny elastic segmenter as a folder, its dense original, and a service that holds both."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_opentrans import DenseCLIPForSegmentation, OpenVocabularyProcessor, SparseCLIPConfig
from hf_opentrans.app.service import SegmentationService
from hf_opentrans.pruning.elastic import make_elastic
from hf_opentrans.pruning.elastic_order import cut_model

BUDGETS = (0.8, 0.6, 0.4)
WIDTHS = [[4, 8, 8, 48], [3, 8, 8, 24], [1, 8, 8, 8]]


@pytest.fixture(scope="session")
def parts(tiny_clip_config, tiny_tokenizer, tiny_image_processor):
    """Return a dense segmenter of two layers with random biases, and its processor; not to be changed."""
    values = tiny_clip_config(num_hidden_layers=2).to_dict()
    values.pop("model_type")
    torch.manual_seed(0)
    model = DenseCLIPForSegmentation(SparseCLIPConfig(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the start, where all patches have one class
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return model, OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)


@pytest.fixture(scope="session")
def folders(parts, tmp_path_factory):
    """Return the folders of an elastic model with the budgets 0.8, 0.6 and 0.4, and of its dense original."""
    model, processor = parts
    layers = [[widths] * 2 for widths in WIDTHS]
    elastic = make_elastic([cut_model(model, each) for each in layers], BUDGETS, layers)
    root = tmp_path_factory.mktemp("models")
    for name, each in (("elastic", elastic), ("dense", model)):
        each.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root / "elastic", root / "dense"


@pytest.fixture(scope="session")
def service(folders):
    """Return a service that all tests share, as visitors do."""
    return SegmentationService.load(*folders)


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """Return the path of a coloured picture, 64 pixels wide and 48 high."""
    coarse = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(path)
    return path
