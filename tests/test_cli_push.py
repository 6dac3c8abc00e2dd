"""The commands `push` and `card`: what they write, and what they say about bad input."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor
from typer.testing import CliRunner

from hf_opentrans import PruningConfig, prune_model
from hf_opentrans.cli import app
from hf_opentrans.cli import push as command
from hf_opentrans.cli._common import repeat_options
from hf_opentrans.hub import PushResult, prepare_folder

USAGE, FAILURE = 2, 1


def run(*arguments):
    """Return exit code, standard output and the error on one line."""
    result = CliRunner().invoke(app, repeat_options([str(argument) for argument in arguments]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_clip_config, tiny_tokenizer, tiny_image_processor):
    folder = tmp_path_factory.mktemp("cli") / "tiny-pruned"
    torch.manual_seed(0)
    clip = CLIPModel(tiny_clip_config()).eval()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(40)]
    result = prune_model(clip, images, PruningConfig(keep=0.7))
    result.save_pretrained(folder, CLIPProcessor(tiny_image_processor, tiny_tokenizer))
    return folder


@pytest.fixture
def pruned(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "tiny-pruned"))


def test_a_dry_run_writes_what_would_be_published_and_sends_nothing(pruned, tmp_path):
    code, text, error = run("push", pruned, "someone/small", "--dry-run", tmp_path / "out", "--base-licence", "mit")
    assert code == 0, error
    assert "someone/small: would be published" in text
    assert "model.safetensors" in text
    assert "Nothing was sent." in text
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    assert "There are no scores" in error
    assert "There are no times" in error


def test_a_push_passes_its_options_on_and_says_where_the_model_is(pruned, tmp_path, monkeypatch):
    asked = {}

    def push(folder, repo_id, **options):
        asked.update(options, folder=folder, repo_id=repo_id)
        prepared = prepare_folder(pruned, tmp_path / "out", repo_id=repo_id)
        return PushResult(
            repo_id, f"https://hub.example/{repo_id}", "0123456789", "trial", "https://hub.example/1", prepared
        )

    monkeypatch.setattr(command, "push_folder", push)
    (pruned / "photo.jpg").write_bytes(b"x")
    files = ["--evaluation", "a.json", "b.json", "--data", "x/y", "--latency", "c.json", "--base-model", "x/z"]
    code, text, error = run("push", pruned, "someone/small", "--private", "--revision", "trial", *files)
    assert code == 0, error
    assert (asked["evaluations"], asked["latency"]) == ([Path("a.json"), Path("b.json")], Path("c.json"))
    assert (asked["private"], asked["revision"], asked["create_pr"]) == (True, "trial", False)
    assert (asked["datasets"], asked["base_model"], asked["base"]) == (["x/y"], "x/z", None)
    assert "Published: https://hub.example/someone/small (commit 01234567)" in text
    assert "Pull request: https://hub.example/1" in text
    assert "Not published: photo.jpg." in text


def test_the_card_is_written_with_its_picture(pruned, tmp_path):
    output = tmp_path / "cards" / "small.md"
    code, text, error = run("card", pruned, "--repo", "someone/small", "--output", output)
    assert code == 0, error
    assert "figures, each with a source" in text
    assert "# small" in output.read_text()
    assert (output.parent / "widths.png").stat().st_size > 1000
    assert "Left out of the card: The licence of the base weights" in error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["card", "{none}", "--output", "x.md"], USAGE, r"There is no config.json in"),
        (["card", "{pruned}", "--output", "{pruned}"], USAGE, r"a folder. The card is a file"),
        (["card", "{pruned}", "--output", "x.md", "--evaluation", "{none}"], USAGE, r"There is no file"),
        (["push", "{pruned}", "no such name", "--dry-run", "out"], FAILURE, r"It must be owner/name"),
        (["push", "{pruned}", "a/b", "--dry-run", "{pruned}"], FAILURE, r"is the model's own folder"),
        (["push", "{pruned}", "a/b/c"], FAILURE, r"It must be owner/name"),
        (["push", "{pruned}", "someone/small"], FAILURE, r"HF_HUB_OFFLINE is set"),
    ],
)
def test_bad_input_is_told_in_one_sentence(pruned, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(pruned=pruned, none=tmp_path / "none") for argument in arguments]
    found, _, error = run(*filled)
    assert (found, message in error) == (code, True), error
    assert not (tmp_path / "x.md").exists()


def test_a_pickle_ends_a_push_with_a_sentence(pruned, tmp_path):
    (pruned / "pytorch_model.bin").write_bytes(b"x")
    code, _, error = run("push", pruned, "someone/small", "--dry-run", tmp_path / "out")
    assert code == FAILURE
    assert "Only safetensors are published" in error
    assert json.loads((pruned / "config.json").read_text())["model_type"] == "sparse_clip"
