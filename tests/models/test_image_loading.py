"""Images of every kind become 8-bit RGB, or one clear error."""

import io
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_opentrans.models import image_loading
from hf_opentrans.models.image_loading import as_list, check_timeout, load_rgb


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


@contextmanager
def serving(pages):
    """Serve {path: (status, type, bytes)} on this machine; a path that ends in "slow" sends its bytes one by one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, kind, body = pages.get(self.path.partition("?")[0], (404, "text/html", b"<h1>no</h1>"))
            self.send_response(status)
            self.send_header("Location" if status == 302 else "Content-Type", kind)
            if not self.path.endswith("chunked"):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            step = 1 if self.path.endswith("slow") else len(body) or 1
            try:
                for start in range(0, len(body), step):
                    self.wfile.write(body[start : start + step])
                    self.wfile.flush()
                    time.sleep(0.05 if step == 1 else 0)
            except OSError:
                return  # the client had enough

        def log_message(self, *args: Any, **options: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def site(tiny_images, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    buffer = io.BytesIO()
    tiny_images[0].save(buffer, format="png")
    picture = buffer.getvalue()
    pages = {
        "/a.png": (200, "image/png", picture),
        "/chunked": (200, "image/png", picture),
        "/page": (200, "text/html", b"<html>a page</html>"),
        "/cut.png": (200, "image/png", picture[: len(picture) // 2]),
        "/moved": (302, "/a.png", b""),
        "/local": (302, "file:///etc/hostname", b""),
        "/ftp": (302, "ftp://127.0.0.1/a.png", b""),
        "/broken": (500, "text/html", b"oh"),
        "/slow": (200, "image/png", picture),
    }
    with serving(pages) as address:
        yield address


def test_addresses(tiny_images, site):
    for name in ("a.png", "a.png?size=1", "chunked", "moved"):
        assert np.array_equal(pixels(load_rgb(f"{site}/{name}")), np.asarray(tiny_images[0]))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("none.png", FileNotFoundError, r"none\.png' cannot be read: the server answers 404 Not Found. .*Check it"),
        ("broken", ConnectionError, "cannot be read: the server answers 500"),
        ("page", ValueError, r"/page' \(text/html\) is not an image that Pillow can read. Give a JPEG"),
        ("cut.png", ValueError, r"cut\.png' \(image/png\) is damaged or cut short"),
        ("local", ConnectionError, "cannot be read: the server answers 302"),
        ("ftp", ConnectionError, r"cannot be read \(unknown url type: ftp\)"),
    ],
)
def test_addresses_without_an_image(site, name, error, message):
    with pytest.raises(error, match=message):
        load_rgb(f"{site}/{name}")


def test_local_files_and_other_schemes_are_no_addresses(tmp_path, tiny_images):
    tiny_images[0].save(tmp_path / "a.png")
    for address, kind in ((f"file://{tmp_path}/a.png", "file"), ("ftp://host/a.png", "ftp"), ("s3://b/a.png", "s3")):
        with pytest.raises(ValueError, match=rf"an address of the kind '{kind}'. Only http and https are read. Give"):
            load_rgb(address)
    with pytest.raises(ValueError, match=r"The address of an image is not valid \(.*Correct it"):
        load_rgb("http://[broken/a.png")


def test_downloads_are_bounded_in_time_and_size(site, monkeypatch):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"/slow' did not come within 0\.3 seconds. .*Raise timeout"):
        load_rgb(f"{site}/slow", timeout=0.3)
    assert time.monotonic() - start < 3
    monkeypatch.setattr(image_loading, "MAX_DOWNLOAD_BYTES", 100)
    for name in ("a.png", "chunked"):
        with pytest.raises(ValueError, match=r"' is larger than 0 MiB. Downloads are limited to that. Download it"):
            load_rgb(f"{site}/{name}")


def test_secrets_in_an_address_are_not_repeated(site):
    with pytest.raises(FileNotFoundError, match="cannot be read") as caught:
        load_rgb(f"{site}/none.png?token=hush")
    assert "hush" not in str(caught.value)
    with pytest.raises(ValueError, match=r"'127\.0\.0\.1' holds a user name or password. Neither is sent") as caught:
        load_rgb(site.replace("http://", "http://user:hush@"))
    assert "hush" not in str(caught.value)


def test_a_server_out_of_reach(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ConnectionError, match=r"cannot be read \(.*refused.*\). The server must be within reach"):
        load_rgb("http://127.0.0.1:9/a.png")


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), "1", True])
def test_time_limits(timeout):
    with pytest.raises(ValueError, match=r"timeout is .*\. It must be a positive number of seconds. Leave it out"):
        check_timeout(timeout)
    with pytest.raises(ValueError, match=r"timeout is "):
        load_rgb("http://127.0.0.1:9/a.png", timeout=timeout)
