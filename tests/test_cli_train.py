"""The commands `finetune` and `distill`: what they train, write and say, how they go on, and what they refuse."""

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_opentrans import (
    AutoModelForOpenVocabularySegmentation,
    CATSegForSegmentation,
    DeepLabV3PlusForSegmentation,
    FCCLIPForSegmentation,
    LayerSelection,
    PruningReport,
    SparseCLIPModel,
)
from hf_opentrans.cli import app
from hf_opentrans.loading import load_clip
from hf_opentrans.training import SegmentationTrainer

USAGE, FAILURE = 2, 1
KINDS = ("heads", "neurons")


def run(*arguments, command="finetune"):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, [command, *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


@pytest.fixture
def dataset(write_segmentation_folder, tiny_images):
    """Return a folder with the splits train and val: the left half is sky, the right one cat."""

    def mask_of(image, _):
        mask = np.zeros((image.height, image.width), np.uint8)
        mask[:, image.width // 2 :] = 1
        mask[0] = 255
        return mask

    classes = {"id_to_name": {"0": "sky", "1": "cat; dog"}, "ignore_id": 255}
    return write_segmentation_folder({"train": tiny_images[:4], "val": tiny_images[:2]}, mask_of, classes)


@pytest.fixture
def base(tiny_clip_folder, dataset, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"steps": 4, "batch_size": 2, "decoder_channels": 8, "save_every": 2}')
    return [tiny_clip_folder, "--dataset", dataset, "--config", config]


def weights(folder):
    return DeepLabV3PlusForSegmentation.from_pretrained(folder).state_dict()


def test_selected_layers_and_head_train_and_everything_is_saved(tmp_path, base):
    output, figures = tmp_path / "out", tmp_path / "figures.json"
    code, out, error = run(*base, "--select", "alpha", "--fraction", 0.25, "--output", output, "--json", figures)
    assert code == 0, error
    values = json.loads(figures.read_text())
    assert (values["config"]["steps"], values["config"]["fraction"], values["samples"]) == (4, 0.25, 8)
    selection = LayerSelection.load(output / "selection.json")
    assert values["trained_layers"] == list(selection.names)
    assert all(name.startswith("vision_model.") for name in selection.names)
    assert values["training_cost"]["selected"]["per_sample"] < values["training_cost"]["full"]["per_sample"]
    assert json.loads((output / "training_report.json").read_text())["after"] == values["after"]
    assert 0 <= values["after"]["mean_iou"] <= 1
    assert "a sample costs" in out
    assert not output.with_name("out.checkpoints").exists()
    other = tmp_path / "other"
    assert run(*base, "--select", "alpha", "--fraction", 0.25, "--steps", 1, "--output", other)[0] == 0
    first, second = weights(output), weights(other)
    changed = {name for name, value in first.items() if not torch.equal(value, second[name])}
    allowed = (*(f"{name}." for name in selection.names), "head.")
    assert changed
    assert all(name.startswith(allowed) for name in changed)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, base, tiny_clip_folder, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*base, "--output", whole)[0] == 0
    train = SegmentationTrainer.train

    def stop(self, *args, **kwargs):
        # As a kill after the second step does: the checkpoint is there, the rest is not.
        step = type(self).training_step

        def training_step(trainer, *inputs, **options):
            if trainer.state.global_step == 3:
                raise KeyboardInterrupt
            return step(trainer, *inputs, **options)

        monkeypatch.setattr(SegmentationTrainer, "training_step", training_step)
        return train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTrainer, "train", stop)
        code, _, _ = run(*base, "--output", parts)
        assert code == 130
    monkeypatch.undo()
    assert not parts.exists()
    assert parts.with_name("parts.checkpoints").is_dir()
    code, _, error = run(*base, "--learning-rate", 0.5, "--output", parts, "--resume")
    assert (code, "had another learning_rate (0.001, now 0.5)" in error) == (FAILURE, True), error
    other = SparseCLIPModel.from_pretrained(tiny_clip_folder)
    with torch.no_grad():
        other.vision_model.encoder.layers[1].mlp.fc1.weight.add_(1)
    shutil.copytree(tiny_clip_folder, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    changed = [tmp_path / "other" if argument == tiny_clip_folder else argument for argument in base]
    code, _, error = run(*changed, "--output", parts, "--resume")
    assert (code, "began with another model" in error) == (FAILURE, True), error
    code, _, error = run(*base, "--output", parts, "--resume")
    assert code == 0, error
    first, second = weights(whole), weights(parts)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("select", ["own", "alpha", "full", "head"])
@pytest.mark.parametrize("mode", ["vanilla", "naclip"])
def test_cost_aggregation_trains_what_is_asked_for(tmp_path, base, tiny_clip_folder, select, mode):
    options = tmp_path / "options.json"
    head = {"cost_channels": 8, "decoder_channels": [8, 8], "guidance_channels": 8, "text_guidance_channels": 8}
    values = {"head_options": {**head, "aggregation_blocks": 1}, "mode": mode, "steps": 2, "batch_size": 2}
    options.write_text(json.dumps(values))
    output = tmp_path / "out"
    more = ["--framework", "catseg", "--config", options, "--select", select, "--output", output]
    code, _, error = run(*base, *more)
    assert code == 0, error
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(output)
    assert type(model) is CATSegForSegmentation
    assert model.config.segmentation_mode == mode
    tower = SparseCLIPModel.from_pretrained(tiny_clip_folder).state_dict()
    trained = model.state_dict()
    changed = {name for name, value in tower.items() if not torch.equal(value, trained[name])}
    assert all(name.startswith("vision_model.") for name in changed)
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in changed}
    if select == "own":
        assert names == {"q_proj", "v_proj"}
    elif select == "head":
        assert not names
    else:
        assert {"fc1"} <= names
    unread = "vision_model.encoder.layers.2.self_attn.q_proj.weight"
    if mode == "naclip":  # nothing reads it, so nothing may change it, weight decay neither
        assert unread not in changed


def test_mask_queries_train_on_a_frozen_clip(tmp_path, base, tiny_clip_folder):
    options = tmp_path / "options.json"
    head = {"hidden_dim": 64, "num_queries": 4, "encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 16}
    options.write_text(json.dumps({"head_options": head, "steps": 2, "batch_size": 2}))
    output = tmp_path / "out"
    code, _, error = run(*base, "--framework", "fcclip", "--config", options, "--output", output)
    assert (code, "framework 'fcclip', which never trains the tower" in error) == (USAGE, True)
    code, _, error = run(*base, "--framework", "fcclip", "--config", options, "--select", "own", "--output", output)
    assert code == 0, error
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(output)
    assert type(model) is FCCLIPForSegmentation
    assert model.config.seen_classes == ["sky", "cat; dog"]
    tower = SparseCLIPModel.from_pretrained(tiny_clip_folder).state_dict()
    trained = model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in tower.items())
    costs = json.loads((output / "training_report.json").read_text())["training_cost"]
    # No graph reaches the tower: there is nothing more to compute.
    assert costs["selected"]["per_sample"] == costs["full"]["per_sample"]


def test_low_rank_updates_are_merged(tmp_path, base, tiny_clip_folder):
    output, figures = tmp_path / "out", tmp_path / "figures.json"
    code, _, error = run(*base, "--select", "lora", "--output", output, "--json", figures)
    assert code == 0, error
    tower = SparseCLIPModel.from_pretrained(tiny_clip_folder).state_dict()
    trained = weights(output)  # loads as any other: nothing of PEFT is left
    changed = {name for name, value in tower.items() if not torch.equal(value, trained[name])}
    linear = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    expected = {name for name in tower if name.startswith("vision_model.") and name.split(".")[-2] in linear}
    assert changed == {name for name in expected if name.endswith("weight")}
    for name in changed:  # rank 8 of at most 32
        assert torch.linalg.matrix_rank(trained[name] - tower[name], rtol=1e-4) <= 8
    values = json.loads(figures.read_text())
    assert (
        values["training_cost"]["selected"]["trainable_params"] < values["training_cost"]["full"]["trainable_params"]
    )
    assert values["trained_layers"] == "lora"


def test_the_layers_that_pruning_hurt_train_first(tmp_path, base, tiny_clip_folder, images):
    options = ["--images", images, "--keep", 0.8, "--output", tmp_path / "pruned"]
    assert run(tiny_clip_folder, *options, command="prune")[0] == 0
    report = PruningReport.load(tmp_path / "pruned")
    output = tmp_path / "out"
    given = ["--select", "damage", "--fraction", 0.25, "--output", output]
    code, _, error = run(tmp_path / "pruned", *base[1:], *given)
    assert code == 0, error
    selection = LayerSelection.load(output / "selection.json")
    assert selection.rule == "damage"
    errors = {(i, k): getattr(layer, f"{k}_error") or 0 for i, layer in enumerate(report.layers) for k in KINDS}
    worst = max(errors, key=errors.__getitem__)
    part = {"heads": "self_attn", "neurons": "mlp"}[worst[1]]
    assert any(name.startswith(f"vision_model.encoder.layers.{worst[0]}.{part}") for name in selection.names)
    code, _, error = run(*base, *given[:-1], tmp_path / "other")
    assert (code, "There is no pruning_report.json" in error) == (USAGE, True), error


def test_accumulated_steps_see_all_their_images(tmp_path, base):
    config = base[-1]
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "gradient_accumulation": 2, "activation_checkpointing": True}))
    figures = tmp_path / "figures.json"
    code, _, error = run(*base, "--output", tmp_path / "out", "--json", figures)
    assert code == 0, error
    assert json.loads(figures.read_text())["samples"] == 4 * 2 * 2


def test_mixed_precision_trains(tmp_path, base):
    config = base[-1]
    config.write_text(json.dumps({**json.loads(config.read_text()), "precision": "bf16"}))
    assert run(*base, "--output", tmp_path / "out")[0] == 0
    assert all(
        value.dtype == torch.float32 for value in weights(tmp_path / "out").values() if value.is_floating_point()
    )
    config.write_text(json.dumps({**json.loads(config.read_text()), "precision": "half"}))
    code, _, error = run(*base, "--output", tmp_path / "other")
    assert (code, "precision is 'half'. It must be one of float32, bf16, fp16" in error) == (USAGE, True), error


@pytest.mark.parametrize(
    ("options", "message", "exit_code"),
    [
        (["--select", "best"], "select is 'best'. It must be one of full, head, own, lora, alpha", USAGE),
        (["--fraction", 0], "fraction is 0.0. It must lie in (0, 1]", USAGE),
        (["--steps", 0], "steps is 0. It must be positive", USAGE),
        (["--framework", "zs3"], "framework is 'zs3'. It must be one of deeplabv3plus, catseg, fcclip, gkc", USAGE),
        (["--split", "test"], "There is no split 'test'", FAILURE),
        (["--resume"], "There is no checkpoint", FAILURE),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, base, options, message, exit_code):
    code, _, error = run(*base, *options, "--output", tmp_path / "out")
    assert (code, message in error) == (exit_code, True), error
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path, base):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    code, _, error = run(*base, "--output", output)
    assert (code, "already holds mine.txt" in error) == (USAGE, True), error
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_unknown_fields_of_the_config_are_named(tmp_path, base):
    config = base[-1]
    config.write_text('{"stpes": 3}')
    code, _, error = run(*base, "--output", tmp_path / "out")
    assert (code, "holds stpes. Fields are activation_checkpointing, batch_size," in error) == (USAGE, True), error


@pytest.fixture
def pruned(tmp_path, tiny_clip_folder, images):
    """Return the options of `distill` for a tiny model that lost most of its neurons, and its dense one."""
    options = ["--images", images, "--keep", 0.6, "--method", "magnitude", "--output", tmp_path / "pruned"]
    assert run(tiny_clip_folder, *options, command="prune")[0] == 0
    config = tmp_path / "distill.json"
    config.write_text('{"steps": 12, "batch_size": 4, "save_every": 6, "learning_rate": 0.003}')
    return [tmp_path / "pruned", "--teacher", tiny_clip_folder, "--images", images, "--config", config]


def test_a_pruned_model_recovers_without_labels(tmp_path, pruned):
    output, figures = tmp_path / "out", tmp_path / "figures.json"
    code, out, error = run(*pruned, "--output", output, "--json", figures, command="distill")
    assert code == 0, error
    values = json.loads(figures.read_text())
    assert values["after"]["loss"] < values["before"]["loss"]
    assert values["images"]["train"] + values["images"]["held_out"] == len(list(pruned[4].glob("*.png")))
    assert f"{values['after']['patch_token_cosine']:.4f}" in out
    before, after = (SparseCLIPModel.from_pretrained(folder).state_dict() for folder in (pruned[0], output))
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"vision_model", "visual_projection"}
    assert load_clip(output).processor is not None
    again = tmp_path / "again"
    assert run(*pruned, "--output", again, command="distill")[0] == 0
    other = SparseCLIPModel.from_pretrained(again).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in after.items())


def test_a_teacher_of_another_shape_is_refused(tmp_path, pruned):
    code, _, error = run(*pruned[:2], "clip-scenes", *pruned[3:], "--output", tmp_path / "out", command="distill")
    assert (code, "and the teacher" in error) == (FAILURE, True), error
    assert not (tmp_path / "out").exists()
    code, _, error = run(*pruned, "--steps", 0, "--output", tmp_path / "out", command="distill")
    assert (code, "steps is 0. It must be positive" in error) == (USAGE, True), error
