"""Preparing images, and turning logits into segmentations: against brute force with torch."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPProcessor, CLIPTokenizer

from hf_opentrans import OpenVocabularyProcessor, OpenVocabularySegmenterOutput, Vocabulary
from hf_opentrans.models.processing_open_vocabulary import upsampled_argmax, upsampled_strips

QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def processor(tiny_image_processor, tiny_tokenizer):
    return OpenVocabularyProcessor(tiny_image_processor, tiny_tokenizer)


def outputs_of(logits, vocabulary):
    return OpenVocabularySegmenterOutput(logits=logits, vocabulary=vocabulary)


def brute_force(logits, size, vocabulary, threshold):
    """Return class and score per pixel: upsample, softmax over all queries, best alias, best class."""
    wide = torch.nn.functional.interpolate(logits[None].double(), size=size, mode="bilinear", align_corners=False)[0]
    probabilities = wide.softmax(0)
    owner = [index for index, group in enumerate(vocabulary.classes) for _ in vocabulary._spoken(group)]
    per_class = torch.stack(
        [
            torch.stack([p for p, o in zip(probabilities, owner, strict=True) if o == index]).amax(0)
            for index in range(len(vocabulary.classes))
        ]
    )
    scores, ids = per_class.max(0)
    if threshold is not None:
        background = [i for i, name in enumerate(vocabulary.names) if name == "background"]
        ids = torch.where(scores < threshold, background[0] if background else -1, ids)
    return ids, scores


VOCABULARIES = {
    "plain": Vocabulary(["cat", "dog", "wall"]),
    "aliases": Vocabulary(["cat; kitten", "dog", ["sofa", "couch", "settee"]]),
    "background": Vocabulary(["cat", "dog; puppy"], background=["sky", "road"]),
    "background alone": Vocabulary(["cat", "background"]),
}


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_post_processing_equals_brute_force(processor, name, threshold):
    vocabulary = VOCABULARIES[name]
    logits = 3 * torch.randn(2, len(vocabulary.queries), 4, 5)
    sizes = [(13, 17), (3, 31)]
    results = processor.post_process_semantic_segmentation(outputs_of(logits, vocabulary), sizes, threshold)
    for result, image, size in zip(results, logits, sizes, strict=True):
        ids, scores = brute_force(image, size, vocabulary, threshold)
        torch.testing.assert_close(result.scores.double(), scores, atol=1e-5, rtol=1e-4)
        certain = (scores - (threshold or 0.0)).abs() > 1e-4
        # Where two classes tie within rounding, either may win.
        assert float((result.segmentation == ids)[certain].double().mean()) > 0.995
        assert result.labels == vocabulary.names


def test_default_sizes_are_those_of_the_logits(processor):
    logits = torch.randn(2, 3, 4, 5)
    results = processor.post_process_semantic_segmentation(outputs_of(logits, VOCABULARIES["plain"]))
    for result, image in zip(results, logits, strict=True):
        assert torch.equal(result.segmentation, image.argmax(0))
        torch.testing.assert_close(result.scores, image.softmax(0).amax(0))


def test_two_thousand_labels(processor):
    vocabulary = Vocabulary([f"label {index}" for index in range(2000)])
    logits = torch.zeros(1, 2000, 2, 2)
    logits[0, 1999, :, 0] = 50.0
    logits[0, 7, :, 1] = 50.0
    result = processor.post_process_semantic_segmentation(outputs_of(logits, vocabulary), [(60, 80)])[0]
    assert result.segmentation.shape == (60, 80)
    assert result.segmentation.unique().tolist() == [7, 1999]
    assert {entry["label"] for entry in result.to_list()} == {"label 7", "label 1999"}


@QUICK
@given(
    channels=st.integers(1, 4),
    source=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    max_bytes=st.integers(1, 20_000),
)
def test_strips_equal_interpolate(channels, source, size, max_bytes):
    logits = torch.randn(channels, *source)
    expected = torch.nn.functional.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    found = torch.full((channels, *size), torch.nan)
    for rows, strip in upsampled_strips(logits, size, max_bytes):
        assert strip.shape == (channels, rows.stop - rows.start, size[1])
        found[:, rows] = strip
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_strips_hold_few_bytes():
    strips = upsampled_strips(torch.randn(10, 4, 4), (100, 50), max_bytes=10 * 50 * 8 * 7)
    heights = [rows.stop - rows.start for rows, _ in strips]
    assert max(heights) == 7
    assert sum(heights) == 100


def test_impossible_outputs_are_refused(processor):
    vocabulary = VOCABULARIES["plain"]
    outputs = outputs_of(torch.randn(2, 3, 4, 5), vocabulary)
    with pytest.raises(ValueError, match=r"There are 1 target sizes for 2 images. Give one"):
        processor.post_process_semantic_segmentation(outputs, [(4, 4)])
    for threshold in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"threshold is {threshold}. It is a probability"):
            processor.post_process_semantic_segmentation(outputs, threshold=threshold)
    for broken in (outputs_of(None, vocabulary), outputs_of(outputs.logits, None)):
        with pytest.raises(ValueError, match="The outputs hold no logits with a vocabulary"):
            processor.post_process_semantic_segmentation(broken)


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((48, 40), None, (32, 40)),  # 32 x 38.4 rounded to multiples of 8
        ((40, 48), 64, (80, 64)),
        ((1, 1), None, (32, 32)),
        ((10_000, 20), None, (8, 192)),  # the long side is at most 6 times the resolution
        ((20, 10_000), None, (192, 8)),
    ],
)
def test_images_keep_their_shape(processor, size, resolution, expected):
    batch = processor(Image.new("RGB", size), resolution=resolution, size_divisor=8)
    assert batch["pixel_values"].shape == (1, 3, *expected)
    assert batch["target_sizes"] == [(size[1], size[0])]


def test_pixels_are_normalised_as_clip_does(processor):
    pixels = processor(Image.new("RGB", (32, 32), (255, 0, 51)), size_divisor=8)["pixel_values"][0]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
    for channel, value in enumerate((1.0, 0.0, 0.2)):
        expected = (value - mean[channel]) / std[channel]
        torch.testing.assert_close(pixels[channel], torch.full((32, 32), expected), atol=1e-5, rtol=1e-5)


def test_images_of_different_shapes_form_a_list(processor):
    batch = processor([Image.new("RGB", (32, 32)), np.zeros((32, 64, 3), np.uint8)], size_divisor=8)
    assert [tuple(tensor.shape) for tensor in batch["pixel_values"]] == [(3, 32, 32), (3, 32, 64)]
    same = processor([Image.new("RGB", (32, 32)), Image.new("L", (64, 64))], size_divisor=8)
    assert same["pixel_values"].shape == (2, 3, 32, 32)
    assert same["target_sizes"] == [(32, 32), (64, 64)]


def test_it_reads_and_writes_the_files_of_a_clip_folder(tmp_path, tiny_clip_folder):
    processor = OpenVocabularyProcessor.from_pretrained(tiny_clip_folder)
    assert processor.resolution == 32
    processor.save_pretrained(tmp_path / "again")
    again = OpenVocabularyProcessor.from_pretrained(tmp_path / "again")
    image = Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint8).reshape(40, 48, 3))
    assert torch.equal(processor(image)["pixel_values"], again(image)["pixel_values"])
    assert again.tokenizer(["a cat"])["input_ids"] == processor.tokenizer(["a cat"])["input_ids"]


# The class alone


def _naive_ids(logits, size, owners):
    wide = torch.nn.functional.interpolate(logits[None].double(), size=size, mode="bilinear", align_corners=False)[0]
    best = wide.topk(min(2, len(wide)), dim=0).values
    is_clear = (best[0] - best[-1] > 1e-4) | (len(wide) == 1)
    return owners[wide.argmax(0)], is_clear


@QUICK
@given(
    queries=st.integers(1, 30),
    source=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    smoothness=st.sampled_from([0.0, 1.0, 5.0]),
    max_bytes=st.integers(1, 20_000),
    seed=st.integers(0, 1000),
)
def test_upsampled_argmax_equals_interpolate_and_argmax(queries, source, size, smoothness, max_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    # With a strong constant per query few can win anywhere, without it most can.
    constant = smoothness * torch.randn(queries, 1, 1, generator=generator)
    logits = torch.randn(queries, *source, generator=generator) + constant
    expected, is_clear = _naive_ids(logits, size, torch.arange(queries))
    found = upsampled_argmax(logits, size, max_bytes)
    assert found.shape == size
    assert torch.equal(found[is_clear], expected[is_clear])


def test_upsampled_argmax_settles_ties_and_refuses_nan():
    logits = torch.zeros(3, 2, 2)
    logits[0] = -1.0
    assert set(upsampled_argmax(logits, (5, 5)).unique().tolist()) <= {1, 2}
    logits[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="The logits hold NaN or infinite values"):
        upsampled_argmax(logits, (5, 5))


@QUICK
@given(
    name=st.sampled_from(sorted(VOCABULARIES)),
    prefilter=st.one_of(st.none(), st.integers(1, 6)),
    alias_reduce=st.sampled_from(["max_prob", "max_logit"]),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    seed=st.integers(0, 1000),
)
def test_class_ids_equal_those_with_scores_under_either_rule(processor, name, prefilter, alias_reduce, size, seed):
    vocabulary = VOCABULARIES[name]
    logits = 3 * torch.randn(1, len(vocabulary.queries), 4, 5, generator=torch.Generator().manual_seed(seed))
    owners = vocabulary.query_to_class
    kept = sorted(logits[0].flatten(1).amax(1).argsort(descending=True)[:prefilter].tolist())
    expected, is_clear = _naive_ids(logits[0, kept], size, owners[kept])
    outputs = outputs_of(logits, vocabulary)
    (ids,) = processor.post_process_class_ids(outputs, [size], prefilter=prefilter)
    options = {"alias_reduce": alias_reduce, "prefilter": prefilter}
    (result,) = processor.post_process_semantic_segmentation(outputs, [size], **options)
    assert torch.equal(ids[is_clear], expected[is_clear])
    assert torch.equal(result.segmentation[is_clear], expected[is_clear])


def test_alias_rules_by_hand(processor):
    # One pixel, logits 1, 2 (one class) and 0: softmax over names e/Z, e2/Z, 1/Z with Z = e + e2 + 1.
    vocabulary = Vocabulary(["cat; kitten", "dog"])
    outputs = outputs_of(torch.tensor([1.0, 2.0, 0.0]).view(1, 3, 1, 1), vocabulary)
    e = np.e
    expected = {"max_prob": e**2 / (e + e**2 + 1), "max_logit": e**2 / (e**2 + 1)}
    for rule, score in expected.items():
        (result,) = processor.post_process_semantic_segmentation(outputs, alias_reduce=rule)
        assert result.segmentation.tolist() == [[0]]
        assert float(result.scores) == pytest.approx(score, rel=1e-5)
    # The two best names are those of the cat: the dog is out, and probabilities are over what is kept.
    for rule, score in {"max_prob": e / (1 + e), "max_logit": 1.0}.items():
        options = {"alias_reduce": rule, "prefilter": 2}
        (result,) = processor.post_process_semantic_segmentation(outputs, **options)
        assert float(result.scores) == pytest.approx(score, rel=1e-5)


def test_prefilter_is_chosen_for_every_image(processor):
    logits = torch.zeros(2, 3, 2, 2)
    logits[0, 0, 0, 0], logits[1, 2, 1, 1] = 5.0, 5.0
    outputs = outputs_of(logits, VOCABULARIES["plain"])
    found = processor.post_process_class_ids(outputs, prefilter=1)
    assert [ids.unique().tolist() for ids in found] == [[0], [2]]


def test_wrong_choices_are_refused(processor):
    outputs = outputs_of(torch.zeros(1, 3, 2, 2), VOCABULARIES["plain"])
    with pytest.raises(ValueError, match=r"alias_reduce is 'mean'\. It must be one of max_prob, max_logit"):
        processor.post_process_semantic_segmentation(outputs, alias_reduce="mean")
    with pytest.raises(ValueError, match=r"prefilter is 0\. At least 1 name must be kept"):
        processor.post_process_class_ids(outputs, prefilter=0)


@pytest.mark.parametrize(("spread", "side"), [(20, 640), (0, 320)])
def test_many_classes_need_little_memory(spread, side):
    """Of 847 classes at 640 x 640 the whole map takes 1.4 GB; here no tensor is larger than the bound."""
    bound = 4 * 2**20
    logits = torch.randn(847, 40, 40)[:, : side // 16, : side // 16] + spread * torch.randn(847, 1, 1)
    with LargestTensor() as largest:
        ids = upsampled_argmax(logits, (side, side), bound)
    assert ids.shape == (side, side)
    copies = [logits.untyped_storage().nbytes(), 3 * ids.untyped_storage().nbytes()]
    assert largest.bytes <= max(bound, *copies) < 847 * side**2 * 4 / 25


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage().nbytes()
                self.bytes = max(self.bytes, storage)
        return found


def test_the_longest_side_bounds_the_picture(processor):
    batch = processor(Image.new("RGB", (400, 40)), resolution=32, size_divisor=8, longest_side=160)
    assert batch["pixel_values"].shape == (1, 3, 16, 160)


def test_a_processor_is_made_of_the_parts_of_another(processor, tiny_image_processor, tiny_tokenizer):
    stock = CLIPProcessor(tiny_image_processor, tiny_tokenizer)
    made = OpenVocabularyProcessor.of(stock)
    assert type(made) is OpenVocabularyProcessor
    assert made.image_processor is tiny_image_processor
    assert made.tokenizer is tiny_tokenizer
    assert OpenVocabularyProcessor.of(processor) is processor
    with pytest.raises(TypeError, match=r"The processor is a CLIPTokenizer. It must hold CLIP's image processor"):
        OpenVocabularyProcessor.of(tiny_tokenizer)
    empty = SimpleNamespace(image_processor=tiny_image_processor, tokenizer=CLIPTokenizer())
    with pytest.raises(OSError, match="There is no tokenizer in the processor"):
        OpenVocabularyProcessor.of(empty)


def test_an_image_processor_of_another_backend_gives_the_same_pixels(processor, tiny_images, tiny_tokenizer):
    other = SimpleNamespace(to_dict=processor.image_processor.to_dict)  # as torchvision's, which need not be there
    made = OpenVocabularyProcessor.of(SimpleNamespace(image_processor=other, tokenizer=tiny_tokenizer))
    assert torch.equal(made(tiny_images)["pixel_values"], processor(tiny_images)["pixel_values"])


def test_a_saved_processor_travels_with_its_code(processor, tmp_path, tiny_images):
    processor.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "processor_config.json").read_text())
    assert values["processor_class"] == "OpenVocabularyProcessor"
    assert values["auto_map"] == {"AutoProcessor": "processing_open_vocabulary.OpenVocabularyProcessor"}
    assert (tmp_path / "processing_open_vocabulary.py").is_file()
    again = OpenVocabularyProcessor.from_pretrained(tmp_path, dtype="auto", trust_remote_code=True)  # not for it
    assert torch.equal(again(tiny_images)["pixel_values"], processor(tiny_images)["pixel_values"])
    assert "dtype" not in again.image_processor.to_dict()
    assert again.tokenizer("a cat")["input_ids"] == processor.tokenizer("a cat")["input_ids"]
