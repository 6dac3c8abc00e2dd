"""The pipeline: every way in and out, against `segment`; caching, batching, addresses and wrong use."""

import copy
import json
import pickle
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModel,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

from hf_opentrans import (
    DeepLabV3PlusForSegmentation,
    DenseCLIPForSegmentation,
    OpenVocabularyProcessor,
    SparseCLIPConfig,
    SparseCLIPModel,
    Vocabulary,
    segment,
)
from hf_opentrans.models import image_loading
from hf_opentrans.models.pipeline_open_vocabulary import (
    TASK,
    OpenVocabularySegmentationPipeline,
    register_pipeline,
)
from hf_opentrans.models.segmentation_result import SegmentList
from hf_opentrans.pruning import to_sparse

pipeline: Any = transformers.pipeline  # its types know the tasks of transformers alone
LABELS = ["cat", "sofa; couch", "wall"]


@pytest.fixture(autouse=True)
def _registered():
    register_pipeline()


@pytest.fixture(scope="module")
def parts(tiny_clip_config, tiny_tokenizer, tiny_image_processor):
    """Return a training-free segmenter and its processor."""
    torch.manual_seed(0)
    clip = CLIPModel(tiny_clip_config()).eval()
    return DenseCLIPForSegmentation.from_clip(clip), OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, parts):
    """Return their folder, which nobody changes."""
    target = tmp_path_factory.mktemp("pipeline") / "segmenter"
    for part in parts:
        part.save_pretrained(target)
    return target


@pytest.fixture
def folder(tmp_path, saved):
    """Return a copy of the folder."""
    return Path(shutil.copytree(saved, tmp_path / "segmenter"))


@pytest.fixture
def pipe(parts):
    return OpenVocabularySegmentationPipeline(model=copy.deepcopy(parts[0]), processor=parts[1], task=TASK)


def count_passes(module):
    calls = []
    module.register_forward_hook(lambda _module, _given, _out: calls.append(1))
    return calls


def images_of(sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, SegmentList)
        assert torch.equal(ours.result.segmentation, theirs.segmentation)
        torch.testing.assert_close(ours.result.scores, theirs.scores)
        assert ours.result.labels == theirs.labels


def expected_of(pipe, images, labels=LABELS, **options):
    return segment(pipe.model, pipe.processor, images, labels, **options)


# In and out


def test_one_image_has_the_form_of_the_image_segmentation_pipeline(pipe, tiny_images):
    found = pipe(tiny_images[0], candidate_labels=LABELS)
    (expected,) = expected_of(pipe, tiny_images[0])
    assert_same([found], [expected])
    areas = []
    for entry in found:
        assert set(entry) == {"score", "label", "mask"}
        inside = np.asarray(entry["mask"])
        assert (entry["mask"].mode, entry["mask"].size) == ("L", (48, 40))
        assert set(np.unique(inside)) <= {0, 255}
        here = expected.segmentation == expected.labels.index(entry["label"])
        assert np.array_equal(inside == 255, here.numpy())
        assert entry["score"] == pytest.approx(float(expected.scores[here].mean()))
        areas.append(int(here.sum()))
    assert areas == sorted(areas, reverse=True)
    assert sum(areas) == 40 * 48


def test_images_of_all_kinds(pipe, tiny_images, tmp_path):
    tiny_images[0].save(tmp_path / "a.png")
    array = np.asarray(tiny_images[0])
    kinds = [tiny_images[0], tmp_path / "a.png", str(tmp_path / "a.png"), array, torch.from_numpy(array.copy())]
    expected = expected_of(pipe, tiny_images[0])
    for image in kinds:
        assert_same([pipe(image, candidate_labels=LABELS)], expected)
    assert_same(pipe(kinds, candidate_labels=LABELS), expected * len(kinds))
    assert_same(pipe(tuple(kinds[:2]), LABELS), expected * 2)
    assert pipe([], candidate_labels=LABELS) == []


def test_labels_in_every_form_mean_the_same(pipe, tiny_images):
    expected = expected_of(pipe, tiny_images[0])
    forms = ["cat; sofa, couch; wall", [["cat"], ["sofa", "couch"], "wall"], Vocabulary(LABELS)]
    for labels in forms:
        assert_same([pipe(tiny_images[0], candidate_labels=labels)], expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_many_sizes_keep_their_order(pipe, batch_size):
    images = images_of([(48, 40), (1, 1), (40, 48), (48, 40), (300, 10), (48, 40)])
    found = pipe(images, candidate_labels=LABELS, batch_size=batch_size)
    for ours, image in zip(found, images, strict=True):
        (theirs,) = expected_of(pipe, image)
        assert ours.result.segmentation.shape == (image.height, image.width)
        torch.testing.assert_close(ours.result.scores, theirs.scores, atol=1e-5, rtol=1e-4)


def test_a_list_shares_passes_among_equal_shapes_wherever_they_stand(pipe):
    calls = count_passes(pipe.model.vision_model.embeddings)
    images = images_of([(48, 40), (40, 48)] * 3)
    pipe(images, candidate_labels=LABELS, batch_size=3)
    assert len(calls) == 2
    pipe(images, candidate_labels=LABELS)
    assert len(calls) == 2 + 6  # one by one by default


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generators_stream(pipe, batch_size):
    images, read = images_of([(48, 40), (40, 48), (48, 40), (32, 32), (48, 40)]), []

    def source():
        for index, image in enumerate(images):
            read.append(index)
            yield image

    for given in (source(), iter(images), map(copy.copy, images)):
        read.clear()
        stream = iter(pipe(given, candidate_labels=LABELS, batch_size=batch_size))
        first = next(stream)
        assert len(read) <= batch_size  # no further than one batch ahead
        found = [first, *stream]
        for ours, image in zip(found, images, strict=True):
            (theirs,) = expected_of(pipe, image)
            torch.testing.assert_close(ours.result.scores, theirs.scores, atol=1e-5, rtol=1e-4)


class Records(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "id": index}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_sets_stream_and_have_a_length(pipe, tiny_images, num_workers):
    stream = pipe(
        KeyDataset(Records(tiny_images[:3]), "image"), candidate_labels=LABELS, batch_size=2, num_workers=num_workers
    )
    assert len(stream) == 3
    assert_same(list(stream), expected_of(pipe, tiny_images[:3]))


def test_background_threshold_slide_mode_and_resolution(pipe, tiny_images):
    image = tiny_images[0]
    with_background = pipe(image, candidate_labels=["cat", "wall"], background="words26", threshold=0.99)
    assert [entry["label"] for entry in with_background] == ["background"]
    assert_same(
        [pipe(image, candidate_labels=["cat", "wall"], background=["sky"])],
        expected_of(pipe, image, Vocabulary(["cat", "wall"], background=["sky"])),
    )
    assert_same(
        [pipe(image, candidate_labels=Vocabulary(["cat", "wall"]), background=["sky"])],
        expected_of(pipe, image, Vocabulary(["cat", "wall"], background=["sky"])),
    )
    assert pipe(image, candidate_labels=LABELS, threshold=1.0) == []
    for options in ({"inference": "slide"}, {"mode": "sclip"}, {"resolution": 64}):
        assert_same([pipe(image, candidate_labels=LABELS, **options)], expected_of(pipe, image, **options))
    slide, whole = (pipe(image, LABELS, inference=way).result.scores for way in ("slide", "whole"))
    assert not torch.allclose(slide, whole)


def test_options_given_at_creation_are_defaults(folder, tiny_images):
    pipe = pipeline(TASK, model=str(folder), candidate_labels=LABELS, inference="slide", batch_size=2)
    calls = count_passes(pipe.model.vision_model.embeddings)
    assert_same(pipe(tiny_images[:2]), expected_of(pipe, tiny_images[:2], inference="slide"))
    assert len(calls) == 2  # one of the pipeline, one of `segment`
    assert_same(pipe(tiny_images[:2], inference="whole"), expected_of(pipe, tiny_images[:2]))
    assert pipe(tiny_images[0], candidate_labels=["dog"]).result.labels == ("dog",)


def test_the_list_draws_saves_and_pickles(pipe, tiny_images, tmp_path):
    found = pipe(tiny_images[0], candidate_labels=LABELS)
    assert np.array_equal(np.asarray(found.draw()), np.asarray(found.result.plot()))
    path = found.save(tmp_path / "new" / "overlay.png", legend=False)
    with Image.open(path) as written:
        assert np.array_equal(np.asarray(written), np.asarray(found.draw(legend=False)))
    assert [entry.name for entry in path.parent.iterdir()] == ["overlay.png"]
    with pytest.raises(ValueError, match=r"ends in '\.txt'. The suffix chooses the format of the picture. Use"):
        found.save(tmp_path / "overlay.txt")
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert torch.equal(again.result.segmentation, found.result.segmentation)


# Text is encoded once


def test_text_is_encoded_once_per_vocabulary(pipe, tiny_images):
    calls = count_passes(pipe.model.text_model)
    for labels in (LABELS, tuple(LABELS), "cat; sofa, couch; wall", Vocabulary(LABELS)):
        pipe(tiny_images[:2], candidate_labels=labels)
    assert len(calls) == 1
    pipe(tiny_images[0], candidate_labels=LABELS, background="sky")
    assert len(calls) == 2
    pipe(tiny_images[0], candidate_labels=Vocabulary(LABELS, templates="plain"))
    assert len(calls) == 3
    pipe(tiny_images[0], candidate_labels=LABELS)
    assert len(calls) == 3
    pipe.model.to(torch.bfloat16)
    pipe(tiny_images[0], candidate_labels=LABELS)
    assert len(calls) == 4
    pipe.model.train().eval()
    pipe(tiny_images[0], candidate_labels=LABELS)
    assert len(calls) == 5


def test_the_vocabulary_that_was_used_last_stays(pipe, tiny_images):
    calls = count_passes(pipe.model.text_model)
    pipe(tiny_images[0], candidate_labels=LABELS)
    for index in range(12):
        pipe(tiny_images[0], candidate_labels=[f"cat {index}"])
        pipe(tiny_images[0], candidate_labels=LABELS)
    assert len(calls) == 13
    assert len(pipe.model._vocabularies) == 8


def test_remembered_text_may_meet_gradients(pipe, tiny_images):
    pipe(tiny_images[0], candidate_labels=LABELS)
    encoded = pipe.model.encode_vocabulary(Vocabulary(LABELS), pipe.processor.tokenizer)
    pixels = pipe.processor(tiny_images[0], size_divisor=8)["pixel_values"]
    pipe.model(pixels, vocabulary=encoded).logits.sum().backward()
    assert any(weight.grad is not None for weight in pipe.model.vision_model.parameters())


# Models, processors, folders


def test_a_saved_segmenter_needs_no_flag(folder, tiny_images):
    values = json.loads((folder / "config.json").read_text())
    entry = values["custom_pipelines"][TASK]
    assert entry["impl"] == "pipeline_open_vocabulary.OpenVocabularySegmentationPipeline"
    for module in ("pipeline_open_vocabulary", "processing_open_vocabulary", "segmenting", "image_loading"):
        assert (folder / f"{module}.py").is_file()
    pipe = pipeline(TASK, model=str(folder))
    assert type(pipe) is OpenVocabularySegmentationPipeline
    assert type(pipe.model) is DenseCLIPForSegmentation
    assert type(pipe.processor) is OpenVocabularyProcessor
    assert not pipe.model.training
    trusting = pipeline(TASK, model=str(folder), trust_remote_code=True)
    assert type(trusting) is OpenVocabularySegmentationPipeline  # what is installed comes first
    assert_same([trusting(tiny_images[0], LABELS)], expected_of(pipe, tiny_images[0]))
    assert type(AutoProcessor.from_pretrained(folder)) is OpenVocabularyProcessor
    assert type(AutoModelForSemanticSegmentation.from_pretrained(folder)) is DenseCLIPForSegmentation


def test_saving_again_keeps_the_pipeline_and_other_classes_do_not_claim_it(folder, tmp_path):
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert TASK in json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"]
    assert "custom_pipelines" not in model.config.to_dict()
    SparseCLIPModel.from_pretrained(folder).save_pretrained(tmp_path / "clip")
    assert "custom_pipelines" not in json.loads((tmp_path / "clip" / "config.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is SparseCLIPConfig
    assert config == model.config


def test_a_saved_pipeline_is_complete(folder, tmp_path, tiny_images):
    pipe = pipeline(TASK, model=str(folder))
    pipe.model.default_vocabulary = Vocabulary(["cat", "wall"], background="words17")
    pipe.save_pretrained(tmp_path / "saved")
    again = pipeline(TASK, model=str(tmp_path / "saved"))
    assert again.model.default_vocabulary == pipe.model.default_vocabulary
    assert_same([again(tiny_images[0])], expected_of(pipe, tiny_images[0], pipe.model.default_vocabulary))
    assert "AutoProcessor" in json.loads((tmp_path / "saved" / "processor_config.json").read_text())["auto_map"]


def test_plain_clip_folders(tiny_clip_folder, tiny_images, tmp_path):
    dense = DenseCLIPForSegmentation.from_pretrained(tiny_clip_folder)
    processor = OpenVocabularyProcessor.from_pretrained(tiny_clip_folder)
    expected = segment(dense, processor, tiny_images[0], LABELS)
    sparse_folder = tmp_path / "sparse"
    SparseCLIPModel.from_pretrained(tiny_clip_folder).save_pretrained(sparse_folder)
    CLIPProcessor(processor.image_processor, processor.tokenizer).save_pretrained(sparse_folder)
    for source in (tiny_clip_folder, str(sparse_folder)):
        pipe = pipeline(TASK, model=source)
        assert type(pipe.model) is DenseCLIPForSegmentation
        assert pipe.model.config.name_or_path == str(source)
        assert_same([pipe(tiny_images[0], LABELS)], expected)
    assert type(AutoProcessor.from_pretrained(sparse_folder)) is CLIPProcessor


def test_models_and_processors_in_place_of_folders(parts, tiny_clip, tiny_clip_folder, tiny_images):
    processor = parts[1]
    stock = CLIPProcessor(processor.image_processor, processor.tokenizer)
    halves = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    expected = segment(DenseCLIPForSegmentation.from_clip(tiny_clip), processor, tiny_images[0], LABELS)
    for model in (tiny_clip, to_sparse(tiny_clip), DenseCLIPForSegmentation.from_clip(tiny_clip)):
        for given in ({"processor": processor}, {"processor": stock}, halves):
            assert_same([pipeline(TASK, model=model, **given)(tiny_images[0], LABELS)], expected)
    tiny_clip.config.name_or_path = str(tiny_clip_folder)
    assert_same([pipeline(TASK, model=tiny_clip)(tiny_images[0], LABELS)], expected)  # its own folder's processor


def test_the_settings_of_a_stock_clip_are_kept(clip_scenes):
    model = AutoModelForSemanticSegmentation.from_pretrained(clip_scenes)
    assert type(model) is DenseCLIPForSegmentation
    assert type(model.config) is SparseCLIPConfig
    assert model.config.segmentation_mode == "vanilla"
    assert model.config.segmentation_reduced is False
    pipe = pipeline(TASK, model=str(clip_scenes))
    image = images_of([(128, 96)])[0]
    assert_same([pipe(image, ["cat", "grass"])], expected_of(pipe, image, ["cat", "grass"]))


def test_trained_segmenters(parts, tiny_images, tmp_path):
    for part in (DeepLabV3PlusForSegmentation.from_clip(parts[0], decoder_channels=8), parts[1]):
        part.save_pretrained(tmp_path / "trained")
    pipe = pipeline(TASK, model=str(tmp_path / "trained"))
    assert type(pipe.model) is DeepLabV3PlusForSegmentation
    assert_same(pipe(tiny_images[:2], LABELS), expected_of(pipe, tiny_images[:2]))
    with pytest.raises(ValueError, match="A trained segmenter reads whole images in the mode"):
        pipe(tiny_images[0], LABELS, inference="slide")


def test_registering_again_changes_nothing(caplog):
    register_pipeline()
    entry = PIPELINE_REGISTRY.supported_tasks[TASK]
    register_pipeline()
    assert PIPELINE_REGISTRY.supported_tasks[TASK] is entry
    assert "already registered" not in caplog.text


def test_the_vocabulary_of_the_folder_is_the_default(folder, tiny_images):
    Vocabulary(["dog", "sky"], templates="plain").save_pretrained(folder)
    pipe = pipeline(TASK, model=str(folder))
    assert_same(
        [pipe(tiny_images[0])], expected_of(pipe, tiny_images[0], Vocabulary(["dog", "sky"], templates="plain"))
    )
    assert pipe(tiny_images[0], candidate_labels=["cat"]).result.labels == ("cat",)


def test_saved_embeddings_are_used_by_their_own_text_tower_alone(folder, tiny_images, tmp_path):
    first = pipeline(TASK, model=str(folder))
    encoded = first.model.encode_vocabulary(Vocabulary(LABELS), first.processor.tokenizer)
    encoded.save_pretrained(folder)
    pipe = pipeline(TASK, model=str(folder))
    calls = count_passes(pipe.model.text_model)
    assert_same([pipe(tiny_images[0])], expected_of(first, tiny_images[0]))
    assert calls == []
    with torch.no_grad():
        first.model.text_model.final_layer_norm.weight.mul_(1.01)
    first.model.save_pretrained(tmp_path / "other")
    first.processor.save_pretrained(tmp_path / "other")
    encoded.save_pretrained(tmp_path / "other")
    other = pipeline(TASK, model=str(tmp_path / "other"))
    calls = count_passes(other.model.text_model)
    other(tiny_images[0])
    assert calls == [1]


# Precision


def test_half_precision_on_a_cpu(parts, folder, tiny_images):
    copy.deepcopy(parts[0]).half().save_pretrained(folder)
    pipe = pipeline(TASK, model=str(folder), device="cpu")
    assert pipe.model.dtype == torch.float32
    assert pipe(tiny_images[0], LABELS)
    bfloat = pipeline(TASK, model=str(folder), dtype=torch.bfloat16, device="cpu")
    assert bfloat.model.dtype == torch.bfloat16
    assert bfloat(tiny_images[0], LABELS)
    with pytest.raises(ValueError, match=r"dtype is float16 and the device is a CPU.*Leave dtype out"):
        pipeline(TASK, model=str(folder), dtype=torch.float16, device="cpu")


@pytest.mark.gpu
def test_on_a_gpu(folder, tiny_images):
    pipe = pipeline(TASK, model=str(folder), device=0)
    assert pipe.model.device.type == "cuda"
    half = pipeline(TASK, model=str(folder), dtype=torch.float16, device=0)
    assert half.model.dtype == torch.float16
    on_cpu = pipeline(TASK, model=str(folder), device="cpu")
    expected = on_cpu(tiny_images[:3], LABELS)
    for given in (pipe, half):
        for ours, theirs in zip(given(tiny_images[:3], LABELS, batch_size=3), expected, strict=True):
            assert ours.result.scores.device.type == "cpu"
            torch.testing.assert_close(ours.result.scores, theirs.result.scores, atol=0.02, rtol=0)


# Wrong use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidate_labels": []}, "The vocabulary has no class. It needs at least one"),
        ({"candidate_labels": ["cat", "Cat"]}, "The label 'Cat' occurs twice"),
        ({"candidate_labels": "cat;;dog"}, "Class 2 of the labels has an empty name"),
        ({}, r"There are no candidate_labels, and no vocabulary\.json was saved.*Give candidate_labels"),
        ({"inference": "tiles"}, "inference is 'tiles'. It must be 'whole' or 'slide'. Choose"),
        ({"mode": "magic"}, "mode is 'magic'. It must be one of vanilla, .*Leave it out"),
        ({"threshold": 2}, r"threshold is 2. It is a probability and must lie in 0\.\.1. Correct it"),
        ({"threshold": float("nan")}, r"threshold is nan. It is a probability"),
        ({"threshold": True}, r"threshold is True. It is a probability"),
        ({"batch_size": 0}, "batch_size is 0. It must be a whole number from 1 up"),
        ({"batch_size": 1.5}, "batch_size is 1.5. It must be a whole number from 1 up"),
        ({"resolution": 0}, "resolution is 0. It must be a whole number from 1 up"),
        ({"timeout": 0}, "timeout is 0. It must be a positive number of seconds. Leave it out"),
        ({"treshold": 0.5}, "The pipeline has no option 'treshold'. Its options are candidate_labels"),
        ({"background": ["cat", ""]}, "Class 2 of the labels has an empty name"),
    ],
)
def test_wrong_options_are_refused_before_any_image_is_read(pipe, options, message):
    calls = count_passes(pipe.model.text_model)
    given = {"candidate_labels": ["cat"], **options} if options else {}
    for images in ("missing.png", ["missing.png"], []):
        with pytest.raises(ValueError, match=message):
            pipe(images, **given)
    assert calls == []


def test_wrong_options_at_creation(folder):
    for options, message in (
        ({"threshold": 2}, "threshold is 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"labels": ["cat"]}, "has no option 'labels'"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(TASK, model=str(folder), **options)


def test_a_bad_image_stops_a_list_before_the_model_runs(pipe, tiny_images, tmp_path):
    calls = count_passes(pipe.model.vision_model.embeddings)
    path = tmp_path / "cut.png"
    tiny_images[0].resize((200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.png' is damaged or cut short"):
        pipe([tiny_images[0], path], LABELS)
    with pytest.raises(FileNotFoundError, match=r"There is no image 'none\.png'"):
        pipe([tiny_images[0], "none.png"], LABELS)
    with pytest.raises(TypeError, match="Got dict as an image"):
        pipe({"image": tiny_images[0]}, LABELS)
    assert calls == []


def test_other_models_and_processors(tiny_clip, tiny_clip_config, tiny_tokenizer, tiny_image_processor, folder):
    vision = CLIPVisionModel(tiny_clip_config().vision_config)
    processor = OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)
    with pytest.raises(TypeError, match=r"The model is a CLIPVisionModel. The pipeline needs .*Load one of them"):
        pipeline(TASK, model=vision, processor=processor)
    with pytest.raises(TypeError, match=r"The processor is a CLIPTokenizer. It must hold"):
        pipeline(TASK, model=tiny_clip, processor=tiny_tokenizer)
    with pytest.raises(ValueError, match="There is no processor, and the model says no folder"):
        pipeline(TASK, model=tiny_clip)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"There is no tokenizer in '.*segmenter'"):
        pipeline(TASK, model=str(folder))


# Addresses (the rest of them is in test_image_loading.py)


@pytest.fixture
def site(tmp_path, tiny_images, monkeypatch):
    """Serve a folder with a.png and page.html on this machine."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "site").mkdir()
    tiny_images[0].save(tmp_path / "site" / "a.png")
    (tmp_path / "site" / "page.html").write_text("<html>a page</html>")
    handler = partial(QuietHandler, directory=str(tmp_path / "site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any, **options: Any) -> None:
        pass


def test_addresses(pipe, tiny_images, site):
    expected = expected_of(pipe, tiny_images[0])
    assert_same([pipe(f"{site}/a.png", LABELS)], expected)
    assert_same(pipe([f"{site}/a.png", tiny_images[0]], LABELS, timeout=5), expected * 2)
    with pytest.raises(FileNotFoundError, match=r"none\.png' cannot be read: the server answers 404"):
        pipe(f"{site}/none.png", LABELS)
    with pytest.raises(ValueError, match=r"page\.html' \(text/html\) is not an image that Pillow can read"):
        pipe([f"{site}/page.html"], LABELS)
    with pytest.raises(ValueError, match=r"an address of the kind 'file'. Only http and https are read"):
        pipe("file:///etc/hostname", LABELS)


def test_the_time_limit_reaches_the_download(pipe, tiny_images, monkeypatch):
    limits = []

    def record(_address, _shown, seconds):
        limits.append(seconds)
        raise TimeoutError("too late")

    monkeypatch.setattr(image_loading, "_download", record)
    for options in ({}, {"timeout": 5}):
        with pytest.raises(TimeoutError, match="too late"):
            pipe("https://example.org/a.png", LABELS, **options)
    assert limits == [30.0, 5]
