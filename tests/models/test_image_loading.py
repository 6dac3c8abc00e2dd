"""Images of every kind become 8-bit RGB, or one clear error."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_opentrans.models.image_loading import as_list, load_rgb


def gradient(height=6, width=5):
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_files_keep_their_pixels(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(gradient()).save(path, lossless=True)
    for given in (path, str(path)):
        assert np.array_equal(pixels(load_rgb(given)), gradient())


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = gradient()[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    expected = np.repeat(grey[..., None], 3, axis=2)
    for given in (tmp_path / "grey.png", grey, grey[..., None], torch.from_numpy(grey)):
        assert np.array_equal(pixels(load_rgb(given)), expected)


def test_transparent_parts_become_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = [255, 0, 51]  # 51 / 255 = 0.2
    Image.fromarray(rgba).save(tmp_path / "a.png")
    for given in (rgba, tmp_path / "a.png"):
        found = pixels(load_rgb(given))[0].tolist()
        # The last one: a fifth of (200, 0, 0) and four fifths of white.
        assert found == [[200, 0, 0], [255, 255, 255], [244, 204, 204]]


def test_grey_with_alpha(tmp_path):
    Image.merge("LA", [Image.new("L", (2, 1), 10), Image.fromarray(np.array([[0, 255]], np.uint8))]).save(
        tmp_path / "la.png"
    )
    assert pixels(load_rgb(tmp_path / "la.png"))[0].tolist() == [[255] * 3, [10] * 3]


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "p.png", transparency=0)
    assert pixels(load_rgb(tmp_path / "p.png"))[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    image.save(tmp_path / "opaque.png")
    assert pixels(load_rgb(tmp_path / "opaque.png"))[0].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 257 * 10, 257 * 100, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for given in (tmp_path / "deep.png", deep, Image.fromarray(deep.astype(np.int32))):
        assert pixels(load_rgb(given))[0, :, 0].tolist() == [0, 10, 100, 255]


def test_float_arrays_lie_between_zero_and_one():
    values = np.array([[0.0, 0.2, 1.0]])
    for given in (values, values.astype(np.float32), torch.tensor(values)):
        assert pixels(load_rgb(given))[0, :, 1].tolist() == [0, 51, 255]
    assert pixels(load_rgb(np.array([[0.0, 128.0, 255.0]])))[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(load_rgb(Image.fromarray(values.astype(np.float32))))[0, :, 2].tolist() == [0, 51, 255]


def test_integer_and_boolean_arrays():
    assert pixels(load_rgb(np.array([[0, 1, 255]])))[0, :, 0].tolist() == [0, 1, 255]
    assert pixels(load_rgb(np.array([[False, True]])))[0, :, 0].tolist() == [0, 255]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(gradient(4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise for display
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(load_rgb(tmp_path / "turned.png")), np.rot90(gradient(4, 8), k=-1))


@pytest.mark.parametrize("size", [(1, 1), (10_000, 20), (20, 10_000)])
def test_unusual_sizes(tmp_path, size):
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "a.png")
    assert load_rgb(tmp_path / "a.png").size == size


def test_cmyk_and_bilevel(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red = pixels(load_rgb(tmp_path / "a.jpg"))[0, 0]
    assert red[0] > 200 > 60 > red[1]
    assert pixels(load_rgb(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255] * 3


def test_a_truncated_file(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "cut.jpg"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"The image '.*cut\.jpg' is damaged or cut short .*Copy or download"):
        load_rgb(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cut\.jpg' is not an image that Pillow can read"):
        load_rgb(path)


def test_a_text_file_named_jpg(tmp_path):
    (tmp_path / "a.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"a\.jpg' is not an image that Pillow can read. Give a JPEG"):
        load_rgb(tmp_path / "a.jpg")


def test_missing_paths_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no image '.*none\.png'. The path must exist"):
        load_rgb(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"is a folder. A single image is needed here. Name the file"):
        load_rgb(tmp_path)


def test_a_decompression_bomb(tmp_path, monkeypatch):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"is too large: .*Scale it down before use"):
        load_rgb(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 5)), r"shape \(3, 4, 5\). It must be"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\). It must be"),
        (np.zeros(7), r"shape \(7,\). It must be"),
        (np.full((2, 2), np.nan), "has values outside 0..255 or NaN"),
        (np.full((2, 2), -0.1), "has values outside 0..255 or NaN"),
        (np.full((2, 2), 256), "has values outside 0..255 or NaN"),
    ],
)
def test_impossible_arrays(array, message):
    with pytest.raises(ValueError, match=message):
        load_rgb(array)


def test_other_objects():
    with pytest.raises(TypeError, match=r"Got dict as an image. It must be a path, a PIL image or an array"):
        load_rgb({})  # pyright: ignore[reportArgumentType]


def test_the_given_image_is_not_changed():
    image = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    load_rgb(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (9, 9, 9, 0)


def test_one_array_is_one_image():
    array = np.zeros((2, 2, 3), np.uint8)
    assert len(as_list(array)) == 1
    assert len(as_list([array, "a.png"])) == 2
    assert as_list("a.png") == ["a.png"]
