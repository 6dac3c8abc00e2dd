"""Label-free recovery: the loss by hand, the teacher's cache, what trains and what does not, resume."""

import copy
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from torch.nn.functional import cosine_similarity
from transformers import TrainingArguments

from hf_opentrans import PruningConfig, SparseCLIPModel, prune_model
from hf_opentrans.evaluation import FidelityReference, center_crops, projected_tokens
from hf_opentrans.training import DistillationTrainer, DistillationWeights, ImageDataset
from hf_opentrans.training.distillation import DistillationTower

SIDE = 32
TOKENS = 17
# What the teacher says of one image, in half precision: unit tokens of 16 numbers, two taps of 32.
BYTES_AN_IMAGE = 2 * TOKENS * (16 + 2 * 32)
DONE: list[Any] = []


@pytest.fixture
def teacher(tiny_clip_folder):
    return SparseCLIPModel.from_pretrained(tiny_clip_folder).eval()


@pytest.fixture
def pruned(teacher, tiny_images):
    """Return the teacher at 60 % of its computation, by weight magnitude; pruned once, the same in every test."""
    if not DONE:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Only 8 of the 40 calibration images differ")
            DONE.append(prune_model(teacher, tiny_images * 5, PruningConfig(keep=0.6, method="magnitude")).model)
    return DONE[0]


@pytest.fixture
def make_student(pruned):
    """Return a function that makes a trainable copy of the pruned model."""

    def make():
        return copy.deepcopy(pruned).requires_grad_(True)

    return make


@pytest.fixture
def dataset(tiny_images, tiny_image_processor):
    return ImageDataset(tiny_images, tiny_image_processor, SIDE)


@pytest.fixture
def make_args(tmp_path):
    def make(**options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 3,
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


def changed_names(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def pixels_of(dataset):
    return torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])


def plain_tower(clip, pixels):
    """Return projected tokens, not normalised, and all hidden states, from the stock forward pass."""
    outputs = clip.vision_model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    tokens = clip.visual_projection(clip.vision_model.post_layernorm(outputs.last_hidden_state))
    return tokens, outputs.hidden_states


# DistillationTower and ImageDataset


def test_the_tower_returns_projected_tokens_and_hidden_states(make_student):
    clip, pixels = make_student(), torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        output = DistillationTower.of(clip, (1, 3))(pixels)
        class_token, patch_tokens = projected_tokens(clip, pixels)
        _, hidden = plain_tower(clip, pixels)
    torch.testing.assert_close(output.tokens[:, 0], class_token)
    torch.testing.assert_close(output.tokens[:, 1:], patch_tokens)
    assert output.taps.shape == (2, 2, 16, 32)
    torch.testing.assert_close(output.taps[:, 0], hidden[1])
    torch.testing.assert_close(output.taps[:, 1], hidden[3])
    assert DistillationTower.of(clip)(pixels).taps is None


def test_the_tower_shares_its_parameters(make_student):
    clip = make_student()
    tower = DistillationTower.of(clip)
    ours = {id(p) for part in (clip.vision_model, clip.visual_projection) for p in part.parameters()}
    assert {id(p) for p in tower.parameters()} == ours
    optimizer = torch.optim.SGD(tower.parameters(), 0.1)
    before = weights_of(clip)
    output = tower(torch.randn(2, 3, SIDE, SIDE))
    (output.tokens * torch.randn_like(output.tokens)).sum().backward()
    optimizer.step()
    changed = changed_names(before, weights_of(clip))
    assert "vision_model.embeddings.patch_embedding.weight" in changed
    assert "visual_projection.weight" in changed
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in changed)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_other_layers_cannot_be_tapped(teacher, layer):
    with pytest.raises(ValueError, match=rf"Layer {layer} is tapped. It must lie in \[1, 3\]"):
        DistillationTower.of(teacher, (1, layer))


def test_images_are_central_crops_with_their_position(dataset, tiny_images, tiny_image_processor):
    assert len(dataset) == 8
    expected = center_crops(tiny_images, tiny_image_processor, SIDE)
    for index in (0, 7):
        assert torch.equal(dataset[index]["pixel_values"], expected[index])
        assert int(dataset[index]["index"]) == index
    assert ImageDataset(tiny_images, tiny_image_processor, 16)[0]["pixel_values"].shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"There are 0 images. Distillation needs some"):
        ImageDataset([], tiny_image_processor, SIDE)


# The loss


@pytest.mark.parametrize("weights", [(1, 1, 1), (2.0, 0.5, 3.0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
@pytest.mark.parametrize("tapped", [None, (2,), ()])
def test_the_loss_by_hand(make_student, teacher, make_args, dataset, weights, tapped):
    student = make_student()
    trainer = DistillationTrainer(
        student, teacher, make_args(), tapped=tapped, weights=DistillationWeights(*weights), train_dataset=dataset
    )
    batch = {"pixel_values": pixels_of(dataset)[2:5], "index": torch.arange(2, 5)}
    with torch.no_grad():
        loss: Any = trainer.compute_loss(trainer.model, batch)
        (tokens, hidden), (own_tokens, own_hidden) = (
            plain_tower(clip, batch["pixel_values"]) for clip in (teacher, student)
        )
    cosines = cosine_similarity(own_tokens, tokens, dim=-1)
    expected = weights[0] * (1 - cosines[:, 0]).mean() + weights[1] * (1 - cosines[:, 1:]).mean()
    layers = (1, 3) if tapped is None else tapped  # the middle of three layers, and the last
    for layer in layers:
        error = (own_hidden[layer] - hidden[layer]).square().mean() / hidden[layer].square().mean()
        expected = expected + weights[2] * error / len(layers)
    # The teacher is rounded to half precision: 11 bits.
    assert float(loss) == pytest.approx(float(expected), rel=2e-3, abs=5e-4)
    if sum(weights[:2]) or layers:
        assert float(expected) > 0.02


def test_the_taps_by_default(teacher, make_args, dataset):
    trainer: Any = DistillationTrainer(copy.deepcopy(teacher), teacher, make_args(), train_dataset=dataset)
    assert trainer.model.tapped == trainer.teacher.tapped == (1, 3)


def test_a_student_like_its_teacher_has_no_loss(teacher, make_args, dataset):
    trainer = DistillationTrainer(copy.deepcopy(teacher), teacher, make_args(), eval_dataset=dataset)
    for _ in range(2):  # from the teacher, and from memory
        scores = trainer.evaluate()
        assert scores["eval_loss"] == pytest.approx(0, abs=1e-3)
        assert scores["eval_class_token_cosine"] == pytest.approx(1, abs=1e-3)
        assert scores["eval_patch_token_cosine"] == pytest.approx(1, abs=1e-3)


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_measures_fidelity(make_student, teacher, make_args, dataset, batch_size):
    student = make_student()
    args = make_args(per_device_eval_batch_size=batch_size)
    trainer = DistillationTrainer(student, teacher, args, eval_dataset=dataset)
    expected = FidelityReference.of(teacher, pixels_of(dataset)).compare(student.eval())
    assert expected.class_token < 0.99
    for other in ([0], [1, 2]):
        trainer.evaluate(torch.utils.data.Subset(dataset, other))  # of which nothing is left over
        scores = trainer.evaluate()
        assert scores["eval_class_token_cosine"] == pytest.approx(expected.class_token, abs=1e-3)
        assert scores["eval_patch_token_cosine"] == pytest.approx(expected.patch_tokens, abs=1e-3)


def test_other_images_are_compared_with_their_own_teacher(
    make_student, teacher, make_args, dataset, tiny_images, tiny_image_processor
):
    student = make_student()
    trainer = DistillationTrainer(student, teacher, make_args(), eval_dataset=dataset)
    trainer.evaluate()
    others = ImageDataset(tiny_images[::-1], tiny_image_processor, SIDE)
    expected = FidelityReference.of(teacher, pixels_of(others)).compare(student.eval())
    scores = trainer.evaluate(others)
    assert scores["eval_patch_token_cosine"] == pytest.approx(expected.patch_tokens, abs=1e-3)


# The cache


def train_and_count(trainer):
    """Train; return the number of images that the teacher saw."""
    seen = []
    trainer.teacher.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    trainer.train()
    return sum(seen)


@pytest.mark.parametrize(
    ("cache_bytes", "expected"), [(8 * BYTES_AN_IMAGE, 8), (8 * BYTES_AN_IMAGE - 1, 24), (0, 24), (10**9, 8)]
)
def test_the_teacher_sees_an_image_once_where_the_cache_holds_all(
    make_student, teacher, make_args, dataset, cache_bytes, expected
):
    args = make_args(max_steps=6)  # three epochs of 8 images
    trainer = DistillationTrainer(make_student(), teacher, args, cache_bytes=cache_bytes, train_dataset=dataset)
    assert train_and_count(trainer) == expected


def test_the_cache_changes_no_weight(make_student, teacher, make_args, dataset):
    """One image a step: the rounding of the teacher depends on what else is in the batch."""
    trained, calls = [], []
    for cache_bytes in (0, 10**9):
        student = make_student()
        args = make_args(max_steps=18, per_device_train_batch_size=1)
        trainer = DistillationTrainer(student, teacher, args, cache_bytes=cache_bytes, train_dataset=dataset)
        calls.append(train_and_count(trainer))
        trained.append(weights_of(student))
    assert calls == [18, 8]
    assert changed_names(*trained) == set()
    assert changed_names(trained[0], weights_of(make_student()))


def test_training_and_evaluation_images_are_kept_apart(
    make_student, teacher, make_args, dataset, tiny_images, tiny_image_processor
):
    """Images of the same positions in both datasets: the scores are those of a trainer that never trained."""
    student = make_student()
    others = ImageDataset(tiny_images[::-1], tiny_image_processor, SIDE)
    args = make_args(learning_rate=0.0)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=dataset, eval_dataset=others)
    trainer.train()
    scores = trainer.evaluate()
    expected = FidelityReference.of(teacher, pixels_of(others)).compare(student.eval())
    assert scores["eval_patch_token_cosine"] == pytest.approx(expected.patch_tokens, abs=1e-3)


# Training


def test_training_recovers_a_pruned_model(make_student, teacher, make_args, dataset):
    student = make_student()
    reference = FidelityReference.of(teacher, pixels_of(dataset))
    before = reference.compare(student.eval())
    args = make_args(max_steps=30, learning_rate=2e-3, per_device_train_batch_size=8)
    DistillationTrainer(student, teacher, args, train_dataset=dataset).train()
    after = reference.compare(student.eval())
    assert 1 - after.class_token < 0.7 * (1 - before.class_token)
    assert 1 - after.patch_tokens < 0.7 * (1 - before.patch_tokens)


def test_text_and_teacher_stay_as_they_are(make_student, teacher, make_args, dataset):
    student = make_student()
    before, own_teacher = weights_of(student), weights_of(teacher)
    DistillationTrainer(student, teacher, make_args(weight_decay=0.1), train_dataset=dataset).train()
    changed = changed_names(before, weights_of(student))
    assert {name for name in changed if not name.startswith(("vision_model.", "visual_projection."))} == set()
    assert {name for name in before if name.startswith("vision_model.")} <= changed | without_gradient(before)
    assert changed_names(own_teacher, weights_of(teacher)) == set()
    assert all(p.grad is None for p in teacher.parameters())


def without_gradient(weights):
    """Return the names that no gradient reaches: position_ids, and empty tensors of layers without heads."""
    return {name for name, value in weights.items() if name.endswith("position_ids") or not value.numel()}


def test_frozen_parameters_stay(make_student, teacher, make_args, dataset):
    student = make_student()
    student.vision_model.requires_grad_(False)
    student.visual_projection.requires_grad_(False)
    student.vision_model.encoder.layers[1].mlp.requires_grad_(True)
    before = weights_of(student)
    DistillationTrainer(student, teacher, make_args(weight_decay=0.1), train_dataset=dataset).train()
    changed = changed_names(before, weights_of(student))
    assert changed == {
        f"vision_model.encoder.layers.1.mlp.{part}" for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    }


@pytest.mark.parametrize("stop", [1, 2])  # within an epoch of two batches, and at its end
@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path, make_student, teacher, make_args, dataset, stop, cache_bytes
):
    def trainer(name, student):
        args = make_args(output_dir=str(tmp_path / name), max_steps=4, save_strategy="steps", save_steps=stop)
        return DistillationTrainer(student, teacher, args, cache_bytes=cache_bytes, train_dataset=dataset)

    whole, rest = make_student(), make_student()
    trainer("whole", whole).train()
    resumed = trainer("rest", rest)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{stop}"))
    assert resumed.state.global_step == 4
    assert changed_names(weights_of(whole), weights_of(rest)) == set()
    assert changed_names(weights_of(whole), weights_of(make_student()))


def test_arguments_are_set_on_a_copy(make_student, teacher, make_args, dataset):
    args = make_args(remove_unused_columns=True, label_names=["masks"], batch_eval_metrics=False, seed=5)
    before = copy.deepcopy(args.to_dict())
    trainer = DistillationTrainer(make_student(), teacher, args, train_dataset=dataset)
    assert trainer.args.remove_unused_columns is False
    assert trainer.args.label_names == ["index"]
    assert trainer.args.batch_eval_metrics is True
    assert trainer.args.seed == 5
    assert args.to_dict() == before


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"hidden_size": 64}, "The student has hidden_size=32 and the teacher 64"),
        ({"num_hidden_layers": 2}, "The student has num_hidden_layers=3 and the teacher 2"),
        ({"patch_size": 16}, "The student has patch_size=8 and the teacher 16"),
        ({"image_size": 64}, "The student has image_size=32 and the teacher 64"),
    ],
)
def test_another_teacher_is_refused(tmp_path, make_tiny_clip, teacher, make_args, dataset, vision, message):
    make_tiny_clip(**vision).save_pretrained(tmp_path / "other")
    other = SparseCLIPModel.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(teacher, other, make_args(), train_dataset=dataset)


def test_a_run_that_trains_nothing_is_refused(make_student, teacher, make_args, dataset):
    student = make_student()
    student.vision_model.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the student's vision tower trains"):
        DistillationTrainer(student, teacher, make_args(), train_dataset=dataset)


def test_a_trainer_taps_only_layers_that_exist(make_student, teacher, make_args, dataset):
    with pytest.raises(ValueError, match="Layer 4 is tapped"):
        DistillationTrainer(make_student(), teacher, make_args(), tapped=[4], train_dataset=dataset)
