"""Crops with their masks, and SegmentationTrainer: metric, resume, accumulation."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")

from torch.nn.functional import interpolate, normalize
from transformers import TrainingArguments

from hf_opentrans import DeepLabV3PlusForSegmentation, SparseCLIPModel
from hf_opentrans.data.folder import SegmentationFolder
from hf_opentrans.data.metrics import MeanIoU
from hf_opentrans.spectra.selection import parameter_groups, select_layers
from hf_opentrans.training import SegmentationDataset, SegmentationTrainer

SIDE, IGNORED, UNLABELLED = 32, 255, 9
# The colour of a class is its one-hot vector: the class of a pixel is its strongest channel.
COLOURS = 255 * np.eye(3, dtype=np.uint8)


def write_folder(root: Path, masks: list[np.ndarray]) -> SegmentationFolder:
    """Write every mask with an image of its colours; unlabelled pixels are black."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    names = {"0": "cat", "1": "dog", "2": "sky"}
    (root / "classes.json").write_text(json.dumps({"id_to_name": names, "ignore_id": UNLABELLED}))
    for index, mask in enumerate(masks):
        image = np.zeros((*mask.shape, 3), np.uint8)
        for label, colour in enumerate(COLOURS):
            image[mask == label] = colour
        Image.fromarray(image).save(root / f"images/{index}.png")
        Image.fromarray(mask.astype(np.uint8)).save(root / f"masks/{index}.png")
    return SegmentationFolder(root)


def blocks(seed: int, rows: int = 5, columns: int = 6, side: int = 8) -> np.ndarray:
    """Return a mask of random square blocks."""
    coarse = np.random.default_rng(seed).integers(0, 3, (rows, columns))
    return coarse.repeat(side, 0).repeat(side, 1)


def normalisation(image_processor):
    """Return mean and deviation of the channels, of shape (3, 1, 1)."""
    return (torch.tensor(part)[:, None, None] for part in (image_processor.image_mean, image_processor.image_std))


def colour_classes(pixels: torch.Tensor, image_processor) -> torch.Tensor:
    """Return the strongest channel of every pixel, normalisation undone."""
    mean, std = normalisation(image_processor)
    return (pixels * std + mean).argmax(0)


@pytest.fixture
def folder(tmp_path):
    """Return six images of coloured blocks, 40 pixels high and 48 wide."""
    return write_folder(tmp_path / "data", [blocks(seed) for seed in range(6)])


@pytest.fixture
def make_dataset(folder, tiny_image_processor):
    def make(is_training=True, **options):
        return SegmentationDataset(folder, tiny_image_processor, resolution=SIDE, is_training=is_training, **options)

    return make


# SegmentationDataset


@pytest.mark.parametrize("size", [(40, 48), (64, 24), (9, 100)])
@pytest.mark.parametrize("is_training", [True, False])
def test_items_are_squares(tmp_path, tiny_image_processor, size, is_training):
    folder = write_folder(tmp_path, [np.zeros(size, int)])
    for side in (16, 32):
        item = SegmentationDataset(folder, tiny_image_processor, resolution=side, is_training=is_training)[0]
        assert item["pixel_values"].shape == (3, side, side)
        assert item["labels"].shape == (side, side)
        assert item["pixel_values"].dtype == torch.float32
        assert item["labels"].dtype == torch.long


@pytest.mark.parametrize("is_training", [True, False])
def test_labels_stay_with_their_pixels(make_dataset, tiny_image_processor, is_training):
    dataset, seen = make_dataset(is_training), []
    for seed in range(30):
        dataset.set_epoch(seed)
        item = dataset[seed % len(dataset)]
        labels = item["labels"]
        shares = {shift: agreement(item, labels, shift, tiny_image_processor) for shift in (-1, 0, 1)}
        assert shares[0] > 0.97  # the rest lies where three blocks meet
        assert shares[0] > max(shares[-1], shares[1])
        seen.append(labels)
    assert {int(label) for labels in seen for label in labels.unique()} == {0, 1, 2}


def agreement(item, labels, shift, image_processor):
    """Return the share of pixels whose colour is that of the label, the labels moved along the diagonal."""
    found = colour_classes(item["pixel_values"], image_processor)
    inner = slice(2, -2)
    return float((found == labels.roll((shift, shift), (0, 1)))[inner, inner].double().mean())


def labels_in_epoch(dataset, epoch):
    dataset.set_epoch(epoch)
    return dataset[0]["labels"]


def test_crops_vary_in_place_scale_and_direction(tmp_path, tiny_image_processor):
    """One vertical edge: where it lies and which class is left of it tell crop and flip apart; stripes tell scale."""
    mask = np.zeros((40, 80), int)
    mask[:, 40:] = 1
    mask[20:, :] += 1
    dataset = SegmentationDataset(write_folder(tmp_path, [mask]), tiny_image_processor, resolution=SIDE)
    corners = [labels_in_epoch(dataset, epoch) for epoch in range(60)]
    upper = [labels[0] for labels in corners]
    rising = [bool((row.diff() > 0).any()) for row in upper]
    falling = [bool((row.diff() < 0).any()) for row in upper]
    assert any(rising)
    assert any(falling)  # flipped
    assert not any(a and b for a, b in zip(rising, falling, strict=True))
    edges = {int(row.diff().abs().argmax()) for row, r, f in zip(upper, rising, falling, strict=True) if r or f}
    heights = {int((labels[:, 0].diff() != 0).nonzero()[0]) for labels in corners if (labels[:, 0].diff() != 0).any()}
    assert len(edges) > 5
    assert len(heights) > 5


def test_the_short_side_is_scaled_between_the_crop_and_half_as_much_again(tmp_path, tiny_image_processor):
    """Stripes 8 pixels wide in an image of 64 become 4 to 6 pixels wide in crops of 32."""
    mask = np.broadcast_to(np.arange(64) // 8 % 2, (64, 64)).astype(int)
    dataset = SegmentationDataset(write_folder(tmp_path, [mask]), tiny_image_processor, resolution=SIDE)
    widths = []
    for epoch in range(60):
        edges = (labels_in_epoch(dataset, epoch)[0].diff() != 0).nonzero()[:, 0]
        widths.append(float(edges.diff().double().mean()))
    assert min(widths) >= 4
    assert max(widths) <= 6.2  # whole pixels
    assert max(widths) - min(widths) > 1.5


@pytest.mark.parametrize("classes", [[2, 0], [1]])
@pytest.mark.parametrize("ignore_index", [255, -100])
def test_classes_that_are_left_out_are_ignored(make_dataset, classes, ignore_index):
    every = make_dataset(is_training=False)
    some = make_dataset(is_training=False, classes=classes, ignore_index=ignore_index)
    assert some.class_names == tuple(["cat", "dog", "sky"][index] for index in classes)
    for index in range(len(every)):
        expected = torch.full((SIDE, SIDE), ignore_index)
        for label, position in enumerate(classes):
            expected[every[index]["labels"] == position] = label
        assert torch.equal(some[index]["labels"], expected)
        assert torch.equal(some[index]["pixel_values"], every[index]["pixel_values"])


@pytest.mark.parametrize("is_training", [True, False])
def test_unlabelled_pixels_are_ignored(tmp_path, tiny_image_processor, is_training):
    mask = np.full((40, 40), 2)
    mask[:, :20] = UNLABELLED
    dataset = SegmentationDataset(
        write_folder(tmp_path, [mask]), tiny_image_processor, resolution=SIDE, is_training=is_training
    )
    labels = torch.stack([dataset[0]["labels"] for _ in range(10)])
    assert set(labels.unique().tolist()) == {2, IGNORED}


def test_random_crops_are_repeatable(make_dataset):
    dataset = make_dataset()

    def draw(epoch):
        dataset.set_epoch(epoch)
        return torch.cat([dataset[index]["pixel_values"] for index in range(6)])

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_evaluation_squeezes_the_whole_image(tmp_path, tiny_image_processor):
    mask = np.zeros((40, 80), int)
    mask[:, 60:] = 1
    mask[30:] = 2
    folder = write_folder(tmp_path, [mask])
    dataset = SegmentationDataset(folder, tiny_image_processor, resolution=SIDE, is_training=False)
    expected = torch.zeros(32, 32, dtype=torch.long)
    expected[:, 24:] = 1
    expected[24:] = 2
    for seed in range(3):  # nothing is drawn
        torch.manual_seed(seed)
        item = dataset[0]
        assert torch.equal(item["labels"], expected)
        assert torch.equal(colour_classes(item["pixel_values"], tiny_image_processor), expected)
    squeezed = Image.open(folder[0].image_path).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(squeezed)).permute(2, 0, 1) / 255
    mean, std = normalisation(tiny_image_processor)
    torch.testing.assert_close(dataset[0]["pixel_values"], (pixels - mean) / std)


def test_impossible_datasets_are_refused(make_dataset):
    for classes in ([], [3], [-1, 0]):
        with pytest.raises(ValueError, match=r"Positions must lie in \[0, 2\], at least one"):
            make_dataset(classes=classes)
    with pytest.raises(ValueError, match="ignore_index is 1, which is also a label of the 3 classes"):
        make_dataset(ignore_index=1)
    assert make_dataset(classes=[2], ignore_index=1).class_names == ("sky",)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="load_rgb obeys the EXIF tag, the mask does not")
def test_labels_follow_an_image_that_lies_on_its_side(tmp_path, tiny_image_processor, is_training):
    folder = write_folder(tmp_path, [blocks(0)])
    path = folder[0].image_path
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees; the mask has the size of the file's rows and columns
    Image.open(path).save(path, exif=exif)
    dataset = SegmentationDataset(folder, tiny_image_processor, resolution=SIDE, is_training=is_training)
    item = dataset[0]
    assert agreement(item, item["labels"], 0, tiny_image_processor) > 0.95


# SegmentationTrainer


@pytest.fixture
def text():
    return normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(4)), dim=-1)


@pytest.fixture
def make_model(tiny_clip_folder):
    def make():
        clip = SparseCLIPModel.from_pretrained(tiny_clip_folder)
        torch.manual_seed(0)
        return DeepLabV3PlusForSegmentation.from_clip(clip, decoder_channels=24, skip_channels=8, atrous_rates=[1, 2])

    return make


@pytest.fixture
def make_args(tmp_path):
    def make(**options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return TrainingArguments(**{**defaults, **options})

    return make


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def largest_change(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_only_what_requires_a_gradient_trains(make_model, make_args, make_dataset, text):
    model = make_model()
    model.vision_model.requires_grad_(False)
    model.vision_model.encoder.layers[2].requires_grad_(True)
    before, own_text = weights_of(model), text.clone()
    trainer = SegmentationTrainer(model, make_args(), text_embeddings=text, train_dataset=make_dataset())
    trainer.train()
    changed = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    expected = {name for name in before if name.startswith(("head.", "vision_model.encoder.layers.2."))}
    assert changed == expected
    assert torch.equal(text, own_text)


def test_a_model_that_was_evaluated_is_prepared_for_training(make_model, make_args, make_dataset, text, monkeypatch):
    """Marked as prepared it was never wrapped for several processes, and each of them trained its own model."""
    dataset = make_dataset()
    trainer = SegmentationTrainer(
        make_model(), make_args(), text_embeddings=text, train_dataset=dataset, eval_dataset=dataset
    )
    trainer.evaluate()
    prepared, usual = [], trainer.accelerator.prepare_model

    def prepare_model(model, *args, evaluation_mode=False, **kwargs):
        prepared.append((evaluation_mode, getattr(model, "_is_accelerate_prepared", False)))
        return usual(model, *args, evaluation_mode=evaluation_mode, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "prepare_model", prepare_model)
    trainer.train()
    assert prepared[0] == (False, False)


def test_evaluating_first_changes_no_weight(make_model, make_args, make_dataset, text):
    found = []
    for evaluates in (False, True):
        dataset = make_dataset()
        args = make_args(bf16=True)  # the forward pass is wrapped for mixed precision, once and not twice
        trainer = SegmentationTrainer(
            make_model(), args, text_embeddings=text, train_dataset=dataset, eval_dataset=dataset
        )
        if evaluates:
            trainer.evaluate()
        trainer.train()
        found.append(weights_of(trainer.model))
    assert_same_weights(*found)


def test_layers_can_learn_at_rates_of_their_own(make_model, make_args, make_dataset, text):
    model = make_model()
    selection = select_layers(model, "alpha", target_modules=r"vision_model\.encoder\..*")
    trainer = SegmentationTrainer(
        model,
        make_args(),
        text_embeddings=text,
        train_dataset=make_dataset(),
        parameter_groups=lambda found: parameter_groups(found, selection, 1e-3),
    )
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    lightest, heaviest = (pick(selection.scores, key=selection.scores.__getitem__) for pick in (max, min))
    assert rates[id(model.get_submodule(lightest).weight)] == pytest.approx(1.5e-3)
    assert rates[id(model.get_submodule(heaviest).weight)] == pytest.approx(0.5e-3)
    assert rates[id(model.head.project.weight)] == 1e-3
    before = weights_of(model)
    trainer.train()
    assert largest_change(weights_of(model), before) > 0


def test_training_lowers_the_loss(make_model, make_args, make_dataset, text):
    dataset = make_dataset(is_training=False)
    args = make_args(max_steps=15, learning_rate=5e-3, per_device_train_batch_size=6)
    trainer = SegmentationTrainer(
        make_model(), args, text_embeddings=text, train_dataset=dataset, eval_dataset=dataset
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    assert after["eval_mean_iou"] > before["eval_mean_iou"] + 0.1


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("classes", [None, [2, 0]])
def test_the_metric_is_that_of_all_images_at_once(make_model, make_args, make_dataset, text, batch_size, classes):
    dataset = make_dataset(is_training=False, classes=classes)
    text = text[: len(dataset.class_names)]
    model = make_model()
    args = make_args(per_device_eval_batch_size=batch_size)
    trainer = SegmentationTrainer(model, args, text_embeddings=text, eval_dataset=dataset)
    metric, losses = MeanIoU(len(text), IGNORED), []
    with torch.no_grad():
        for item in (dataset[index] for index in range(len(dataset))):
            outputs = model.eval()(item["pixel_values"][None], text_embeddings=text, labels=item["labels"][None])
            full = interpolate(outputs.logits, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
            metric.update(full.argmax(1)[0], item["labels"])
            losses.append(float(outputs.loss))
    expected = metric.compute()
    for other in ([0], [1, 2]):
        trainer.evaluate(torch.utils.data.Subset(dataset, other))  # of which nothing is left over
        scores = trainer.evaluate()
        # One pixel in 6144 may fall the other way: images in batches round otherwise.
        assert scores["eval_mean_iou"] == pytest.approx(expected.mean_iou, abs=3e-4)
        assert scores["eval_pixel_accuracy"] == pytest.approx(expected.pixel_accuracy, abs=3e-4)
        if classes is None:  # every image has as many counted pixels
            assert scores["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert 0 < expected.mean_iou < 1


def test_another_ignore_index(make_model, make_args, make_dataset, text):
    model = make_model()
    model.config.semantic_loss_ignore_index = -100
    scores = []
    for ignore_index in (IGNORED, -100):
        model.config.semantic_loss_ignore_index = ignore_index
        dataset = make_dataset(is_training=False, classes=[2, 0], ignore_index=ignore_index)
        trainer = SegmentationTrainer(model, make_args(), text_embeddings=text[:2], eval_dataset=dataset)
        assert trainer.ignore_index == ignore_index
        scores.append(trainer.evaluate())
    assert scores[0]["eval_mean_iou"] == scores[1]["eval_mean_iou"]
    assert scores[0]["eval_loss"] == scores[1]["eval_loss"]
    assert SegmentationTrainer(model, make_args(), text_embeddings=text, ignore_index=77).ignore_index == 77


@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("stop", [2, 3])  # within an epoch of three batches, and at its end
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path, make_model, make_args, make_dataset, text, stop, is_random
):
    def trainer(name):
        args = make_args(
            output_dir=str(tmp_path / name), max_steps=4, save_strategy="steps", save_steps=stop, weight_decay=0.01
        )
        return SegmentationTrainer(make_model(), args, text_embeddings=text, train_dataset=make_dataset(is_random))

    whole = trainer("whole")
    whole.train()
    torch.manual_seed(77)  # what was drawn between the runs does not matter
    rest = trainer("rest")
    rest.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{stop}"))
    assert rest.state.global_step == 4
    assert_same_weights(weights_of(whole.model), weights_of(rest.model))
    assert largest_change(weights_of(whole.model), weights_of(make_model())) > 1e-3


def test_accumulated_batches_are_averaged(make_model, make_args, make_dataset, text):
    trained = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        args = make_args(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )
        dataset = torch.utils.data.Subset(make_dataset(is_training=False), range(4))
        trainer = SegmentationTrainer(make_model(), args, text_embeddings=text, train_dataset=dataset)
        trainer.train()
        trained.append(weights_of(trainer.model))
    assert largest_change(trained[0], weights_of(make_model())) > 1e-3
    assert largest_change(*trained) < 1e-5


def test_arguments_are_set_on_a_copy(make_model, make_args, make_dataset, text):
    args = make_args(remove_unused_columns=True, label_names=["masks"], batch_eval_metrics=False, seed=5)
    before = copy.deepcopy(args.to_dict())
    trainer = SegmentationTrainer(make_model(), args, text_embeddings=text, train_dataset=make_dataset())
    assert trainer.args.remove_unused_columns is False
    assert trainer.args.label_names == ["labels"]
    assert trainer.args.batch_eval_metrics is True
    assert trainer.args.seed == 5
    trainer.train()
    assert args.to_dict() == before


def test_activation_checkpointing_changes_no_weight(make_model, make_args, make_dataset, text):
    trained, passes = [], []
    for is_on in (False, True):
        trainer: Any = SegmentationTrainer(
            make_model(),
            make_args(activation_checkpointing=is_on, max_steps=2),
            text_embeddings=text,
            train_dataset=make_dataset(),
        )
        passes.append(0)
        trainer.model.vision_model.encoder.layers[0].mlp.register_forward_pre_hook(
            lambda *_: passes.append(passes.pop() + 1)
        )
        trainer.train()
        trained.append(weights_of(trainer.model))
    assert passes == [2, 4]
    assert largest_change(*trained) < 1e-4
