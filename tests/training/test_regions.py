"""What a frozen CLIP sees in regions: crops, their order and number; and a training that learns from it."""

import json
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from torch.nn.functional import normalize
from transformers import CLIPProcessor, TrainingArguments

from hf_opentrans import AutoModelForOpenVocabularySegmentation, GKCForSegmentation, SparseCLIPModel
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.training import FinetuneConfig, RegionTeacher, SegmentationTrainer, finetune

SMALL = {
    "hidden_dim": 32,
    "num_queries": 6,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "feedforward_dim": 48,
    "num_attention_heads": 4,
    "train_num_points": 64,
}
IGNORED = 255


@pytest.fixture
def clip(tiny_clip_folder) -> Any:
    return SparseCLIPModel.from_pretrained(tiny_clip_folder).eval()


@pytest.fixture
def make_teacher(clip, tiny_image_processor):
    def make(**options):
        return RegionTeacher(clip, tiny_image_processor, **options)

    return make


def global_embedding(clip, pixels):
    with torch.no_grad():
        return normalize(clip.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output, dim=-1)


# Crops


def test_a_whole_image_is_embedded_as_clip_does(clip, make_teacher):
    pixels = torch.randn(2, 3, 32, 32)
    found = make_teacher().embed(pixels, torch.tensor([4, 2])[:, None, None].expand(2, 32, 32), IGNORED)
    assert [part.shape for part in found] == [(1, 16)] * 2
    torch.testing.assert_close(torch.cat(found), global_embedding(clip, pixels))


def test_a_region_is_cropped_to_its_box_on_grey(make_teacher, tiny_image_processor):
    teacher = make_teacher(side=8)
    image, mask = torch.randn(3, 32, 32), torch.zeros(32, 32, dtype=torch.bool)
    mask[4:12, 16:20] = True
    mask[4:8, 20:24] = True  # an L: a quarter of the box of 8 x 8 is outside
    crop = teacher.crop(image, mask)
    assert crop.shape == (3, 8, 8)
    inside = mask[4:12, 16:24]
    torch.testing.assert_close(crop[:, inside], image[:, 4:12, 16:24][:, inside])  # of the square's size: as it was
    mean, std = (torch.tensor(part) for part in (tiny_image_processor.image_mean, tiny_image_processor.image_std))
    grey = (crop[:, ~inside].mean(1) * std + mean) * 255
    torch.testing.assert_close(grey, torch.full((3,), 128.0))
    assert float(crop[:, ~inside].std(1).max()) < 1e-6


def test_crops_are_squeezed_to_squares(make_teacher):
    teacher, image = make_teacher(), torch.zeros(3, 32, 32)
    image[:, :, :4] = 1.0
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[6, 2:6] = True  # one row: half of it one, half zero
    crop = teacher.crop(image, mask)
    assert crop.shape == (3, 32, 32)
    torch.testing.assert_close(crop[:, :, :12], torch.ones(3, 32, 12))
    torch.testing.assert_close(crop[:, :, 20:], torch.zeros(3, 32, 12))


def test_regions_are_in_the_order_of_their_classes(clip, make_teacher):
    teacher = make_teacher()
    pixels, labels = torch.randn(3, 3, 32, 32), torch.full((3, 32, 32), IGNORED)
    labels[0, :8], labels[0, 8:16], labels[0, 16:, :4] = 7, 2, 5
    labels[2, 3:9, 3:9] = 0
    found = teacher.embed(pixels, labels, IGNORED)
    assert [len(part) for part in found] == [3, 0, 1]
    expected = [teacher.crop(pixels[0], labels[0] == label) for label in (2, 5, 7)]
    expected.append(teacher.crop(pixels[2], labels[2] == 0))
    torch.testing.assert_close(torch.cat(found), global_embedding(clip, torch.stack(expected)))
    torch.testing.assert_close(torch.cat(found).norm(dim=-1), torch.ones(4))
    # The grey is of no class: what lies around a region does not matter.
    pixels[0, :, 30:, 10:] = 9.0
    torch.testing.assert_close(teacher.embed(pixels, labels, IGNORED)[0], found[0])


def test_labels_of_another_size(make_teacher):
    teacher, pixels = make_teacher(), torch.randn(1, 3, 32, 32)
    coarse = torch.tensor([[[0, 1], [1, 1]]])
    fine = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    torch.testing.assert_close(teacher.embed(pixels, coarse, IGNORED)[0], teacher.embed(pixels, fine, IGNORED)[0])
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[0, 0, 0] = 3  # lost in the image
    (rows,) = teacher.embed(pixels, labels, IGNORED)
    assert rows.any(-1).tolist() == [True, False]


def test_of_too_many_regions_some_are_embedded(make_teacher):
    teacher, every = make_teacher(max_regions=3), make_teacher()
    pixels = torch.randn(2, 3, 32, 32)
    labels = (torch.arange(32) // 8).view(1, 32, 1).expand(2, 32, 32)
    expected, seen = torch.cat(every.embed(pixels, labels, IGNORED)), set()
    assert expected.any(-1).all()
    for _ in range(20):
        found = teacher.embed(pixels, labels, IGNORED)
        assert [len(part) for part in found] == [4, 4]
        rows = torch.cat(found)
        kept = rows.any(-1)
        assert int(kept.sum()) == 3
        torch.testing.assert_close(rows[kept], expected[kept])
        seen |= set(kept.nonzero()[:, 0].tolist())
    assert seen == set(range(8))


def test_the_clip_is_copied_and_stays_as_it_is(clip, make_teacher):
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    clip.train()
    teacher = make_teacher()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(part.training for part in teacher.modules())
    assert all(p.requires_grad for p in clip.parameters())
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    (first,) = teacher.embed(torch.ones(1, 3, 32, 32), labels, IGNORED)
    assert not first.requires_grad
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(1)
    assert torch.equal(teacher.embed(torch.ones(1, 3, 32, 32), labels, IGNORED)[0], first)
    assert not torch.equal(before["visual_projection.weight"], clip.state_dict()["visual_projection.weight"])


def test_impossible_teachers_are_refused(clip, make_teacher):
    with pytest.raises(ValueError, match=r"side is 12. It must be a positive multiple of the patch size 8"):
        make_teacher(side=12)
    with pytest.raises(ValueError, match=r"max_regions is 0. It must be positive"):
        make_teacher(max_regions=0)
    clip.config.segmentation_cut = True
    with pytest.raises(ValueError, match=r"The CLIP lost the MLP of its last block.* Give the uncut CLIP"):
        make_teacher()


# Training


def test_the_trainer_gives_regions_in_training_alone(tmp_path, clip, make_teacher):
    torch.manual_seed(0)
    model = GKCForSegmentation.from_clip(clip, **SMALL)
    teacher, text = make_teacher(), normalize(torch.randn(3, 16), dim=-1)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(0, 3, (8, 8))} for _ in range(2)]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SegmentationTrainer(
        model,
        args,
        text_embeddings=text,
        teacher=teacher,
        train_dataset=data,  # pyright: ignore[reportArgumentType]
        eval_dataset=data,  # pyright: ignore[reportArgumentType]
    )
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    trainer.train()
    trainer.evaluate()
    trained, *scored = seen
    expected = teacher.embed(trained["pixel_values"], trained["labels"], IGNORED)
    assert all(torch.equal(*pair) for pair in zip(trained["region_embeddings"], expected, strict=True))
    assert scored
    assert not any("region_embeddings" in given for given in scored)


@pytest.fixture
def folders(write_segmentation_folder, tiny_images):
    """Return the splits train and val: the left half is sky, the right one cat."""

    def mask_of(image, _):
        mask = np.zeros((image.height, image.width), np.uint8)
        mask[:, image.width // 2 :] = 1
        mask[0] = 255
        return mask

    classes = {"id_to_name": {"0": "sky", "1": "cat; dog"}, "ignore_id": 255}
    root = write_segmentation_folder({"train": tiny_images[:4], "val": tiny_images[:4]}, mask_of, classes)
    return SegmentationFolder(root, "train"), SegmentationFolder(root, "val")


@pytest.fixture
def processor(tiny_image_processor, tiny_tokenizer):
    return CLIPProcessor(tiny_image_processor, tiny_tokenizer)


@pytest.mark.parametrize("select", ["gradient", "own"])
def test_finetuning_lowers_the_loss(tmp_path, clip, processor, folders, select):
    options: dict[str, Any] = {"batch_size": 4, "learning_rate": 3e-3, "gradient_batches": 1, "fraction": 0.3}
    options |= {"head_options": SMALL, "synonyms": "random", "steps": 8}
    config = FinetuneConfig(framework="gkc", select=select, **options)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    result = finetune(clip, processor, folders, config, tmp_path / "out")
    assert result.report["after"]["loss"] < 0.98 * result.report["before"]["loss"]
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    model: Any = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / "out")
    assert type(model) is GKCForSegmentation
    # The scale of the relations trains: batches that look for what is not read have regions too.
    state = model.state_dict()
    assert float(state["head.relation_scale"]) != 1
    changed = {name for name, value in before.items() if not torch.equal(value, state[name])}
    assert changed
    assert all(name.startswith("vision_model.") and "post_layernorm" not in name for name in changed)
    if select == "gradient":
        allowed = tuple(f"{name}." for name in result.report["trained_layers"])
        assert all(name.startswith(allowed) for name in changed)
    assert json.loads((tmp_path / "out/training_report.json").read_text())["config"]["synonyms"] == "random"


def test_queries_come_to_see_what_the_teacher_sees(clip, make_teacher):
    """With the distillation, embeddings of queries are closer to the teacher's than without."""
    pixels, labels, text = torch.randn(2, 3, 32, 32), torch.zeros(2, 8, 8, dtype=torch.long), torch.eye(2, 16)
    labels[:, :, 4:] = 1
    regions, found = make_teacher().embed(pixels, labels, IGNORED), {}
    for distillation in ("vanilla", "none"):
        torch.manual_seed(0)
        options: dict[str, Any] = {**SMALL, "distillation": distillation, "distillation_weight": 20.0}
        model: Any = GKCForSegmentation.from_clip(clip, **options)
        optimizer = torch.optim.AdamW(model.head.parameters(), lr=3e-3)
        given = {} if distillation == "none" else {"region_embeddings": regions}
        features = model.encode(pixels)
        for _ in range(12):
            optimizer.zero_grad()
            model(features=features, text_embeddings=text, labels=labels, **given).loss.backward()
            optimizer.step()
        with torch.no_grad():
            embeds = model.head.classifier(model.head.decoder(features).queries[-1], -1)
        found[distillation] = float(
            torch.stack([(own @ theirs.T).amax(0) for own, theirs in zip(embeds, regions, strict=True)]).mean()
        )
    assert found["vanilla"] > found["none"] + 0.2
