"""Shared fixtures: seeds, no network, and tiny real models that are built instead of downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; subprocesses inherit it
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
import gc
import json
import random
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
# Each is one token; any other word is spelt.
WORDS = ["a", "an", "photo", "of", "the", "cat", "dog", "sofa", "couch", "wall", "sky"]

BLOCK = (REPOSITORY / "tests" / "block_package.py").read_text(encoding="utf-8")
BEFORE = """
import copy, json, sys
import torch, transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
folder, outputs = sys.argv[1], {}
"""
AFTER = """
assert not any(name.split(".")[0] == "hf_opentrans" for name in sys.modules)
save_file({name: value.contiguous() for name, value in outputs.items()}, f"{folder}/outputs.safetensors")
"""

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Let the garbage collector leave alone what imports made: the Trainer's collections took half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _loopback_only(getattr(socket.socket, name)))


def _loopback_only(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        if isinstance(address, tuple):  # a path or bytes is a Unix socket: local
            host = str(address[0])
            if host not in {"localhost", "::1"} and not host.startswith("127."):
                self.close()
                raise RuntimeError(f"A test tried to connect to {address}. Tests stay offline.")
        return connect(self, address)

    return guarded


@pytest.fixture(scope="session")
def tiny_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer of 538 entries: 256 bytes, the same ending a word, WORDS, 2 marks."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(f"{char}</w>" for char in alphabet)])
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left, *others = [*word[:-1], f"{word[-1]}</w>"]
        for right in others:
            merges[left, right] = None
            left += right
            tokens[left] = None
    tokens.update(dict.fromkeys(["<|startoftext|>", "<|endoftext|>"]))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Without model_max_length a CLIP tokenizer never truncates, and 77 positions overflow.
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=77)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="session")
def tiny_image_processor() -> CLIPImageProcessorPil:
    """Return a CLIP image processor for 32 x 32 pixels that needs no torchvision."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": 32},  # pyright: ignore[reportCallIssue]
        crop_size={"height": 32, "width": 32},  # pyright: ignore[reportCallIssue]
    )


@pytest.fixture(scope="session")
def tiny_clip_config(tiny_tokenizer: CLIPTokenizer) -> Callable[..., CLIPConfig]:
    """Return a function that makes a fresh config; keyword arguments change the vision tower."""

    def make(**vision: Any) -> CLIPConfig:
        text_config = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "projection_dim": 16,
        }
        vision_config = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 16,
        } | vision
        return CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=16)  # pyright: ignore[reportArgumentType]

    return make


@pytest.fixture(scope="session")
def make_tiny_clip(tiny_clip_config: Callable[..., CLIPConfig]) -> Callable[..., CLIPModel]:
    """Return a function (seed=0, **vision) that builds a stock CLIPModel in eval mode.

    Biases and layer norms get random values too: at zero and one they would hide slicing errors.
    """
    made: dict[str, tuple[CLIPModel, torch.Tensor]] = {}

    def make(seed: int = 0, **vision: Any) -> CLIPModel:
        key = f"{seed} {vision}"
        if key not in made:
            torch.manual_seed(seed)
            model = CLIPModel(tiny_clip_config(**vision)).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            made[key] = model, torch.get_rng_state()
        model, state = made[key]
        torch.set_rng_state(state)  # a copy and a new one leave the same
        return copy.deepcopy(model)  # takes half as long

    return make


@pytest.fixture
def tiny_clip(make_tiny_clip: Callable[..., CLIPModel]) -> CLIPModel:
    """Return a stock CLIPModel: 3 vision layers of 4 heads and 64 neurons, hidden 32, 32 pixels."""
    return make_tiny_clip()


@pytest.fixture(scope="session")
def make_tiny_images() -> Callable[[], list[Image.Image]]:
    """Return a function that draws the 8 smooth random RGB pictures of `tiny_images`."""

    def make() -> list[Image.Image]:
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, size=(8, 5, 6, 3), dtype=np.uint8)
        return [Image.fromarray(picture).resize((48, 40), Image.Resampling.BICUBIC) for picture in coarse]

    return make


@pytest.fixture
def tiny_images(make_tiny_images: Callable[[], list[Image.Image]]) -> list[Image.Image]:
    """Return 8 smooth random RGB pictures, 40 pixels high and 48 wide."""
    return make_tiny_images()


@pytest.fixture(scope="session")
def colours_of() -> Callable[[Path], set[tuple[int, int, int]]]:
    """Return a function that gives the RGB colours of a picture file; numpy's unique takes seconds for them."""

    def colours(path: Path) -> set[tuple[int, int, int]]:
        with Image.open(path) as picture:
            found = picture.convert("RGB").getcolors(picture.width * picture.height)
        return {colour for _, colour in found or []}  # pyright: ignore[reportReturnType]

    return colours


@pytest.fixture
def images(tmp_path, tiny_images):
    """Return a folder of `tiny_images`, 0.png to 7.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(tiny_images):
        image.save(folder / f"{index}.png")
    return folder


@pytest.fixture
def write_segmentation_folder(tmp_path):
    """Return a function (splits, mask_of, classes) that writes a segmentation folder.

    `splits` holds the images of every split, `mask_of(image, index)` returns the mask of one, `classes` is the content
    of classes.json.
    """

    def write(splits, mask_of, classes):
        folder = tmp_path / "data"
        for split, chosen in splits.items():
            for name in ("images", "masks"):
                (folder / name / split).mkdir(parents=True)
            for index, image in enumerate(chosen):
                image.save(folder / "images" / split / f"{index}.png")
                Image.fromarray(mask_of(image, index)).save(folder / "masks" / split / f"{index}.png")
        (folder / "classes.json").write_text(json.dumps(classes))
        return folder

    return write


@pytest.fixture
def tiny_clip_folder(
    tmp_path: Path,
    tiny_clip: CLIPModel,
    tiny_tokenizer: CLIPTokenizer,
    tiny_image_processor: CLIPImageProcessorPil,
) -> Path:
    """Return a folder with `tiny_clip`, its tokenizer and its image processor, as on the Hub."""
    folder = tmp_path / "tiny-clip"
    for part in (tiny_clip, tiny_tokenizer, tiny_image_processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_without_package() -> Callable[[str, Path], dict[str, torch.Tensor]]:
    """Return a function (code, folder) that runs code in a process where hf_opentrans cannot be imported.

    The code finds `folder`, `load_file`, `copy`, `json`, torch and transformers, and fills `outputs` with tensors,
    which come back.
    """

    def run(code: str, folder: Path) -> dict[str, torch.Tensor]:
        environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
        whole = BLOCK + BEFORE + textwrap.dedent(code) + AFTER
        command = [sys.executable, "-I", "-c", whole, str(folder)]  # -I: no PYTHONPATH, no current folder
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(folder / "outputs.safetensors")

    return run


@pytest.fixture(scope="session")
def clip_scenes() -> Path:
    """Return the folder of the embedded model."""
    folder = REPOSITORY / "hf_opentrans" / "assets" / "clip-scenes"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the embedded model is not in {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder of shared research data: $OPENTRANS_SHARED, or `../shared`."""
    folder = Path(os.environ.get("OPENTRANS_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"there is no shared data in {folder}; set OPENTRANS_SHARED")
    return folder
