"""What a visitor sends: a picture and class names, refused in one sentence where they cannot be used."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from hf_opentrans.models.image_loading import load_rgb
from hf_opentrans.models.vocabulary import Vocabulary

# Formats that are decoded without another program's help (EPS, for one, would start Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MOST_BYTES = 20 * 2**20
MOST_PIXELS = 40_000_000
MOST_RATIO = 8  # long side to short side: the short side decides how much the model computes
SHOWN_SIDE = 1024
MOST_NAMES, MOST_CHARACTERS = 200, 20_000


def read_upload(path: str | Path | None) -> Image.Image:
    """Read an uploaded picture as upright 8-bit RGB, scaled down to 1024 pixels on the long side.

    Size in bytes, format, number of pixels and proportions are checked before any pixel is decoded.

    Args:
        path: Of the uploaded file; None where nothing was uploaded.

    Raises:
        ValueError: If there is none, it is no picture, is damaged, or is larger than a demo should decode.
    """
    if path is None:
        raise ValueError("There is no picture. One is needed. Upload one, or choose an example.")
    size = Path(path).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(
            f"The file has {size / 2**20:.0f} MiB. At most {MOST_BYTES // 2**20} MiB are read. Scale the picture down."
        )
    try:
        with Image.open(path, formats=FORMATS) as opened:
            _check_shape(*opened.size)
            opened.draft("RGB", (SHOWN_SIDE, SHOWN_SIDE))  # a JPEG is decoded no larger than needed
            picture = load_rgb(opened)
    except UnidentifiedImageError as err:
        raise ValueError(
            f"The file is not a picture that can be read. It must be one of {', '.join(FORMATS)}. Choose another file."
        ) from err
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise ValueError(_too_many_pixels("far more")) from err
    except (OSError, SyntaxError, EOFError) as err:
        raise ValueError(
            "The picture is damaged or cut short. Every pixel must be readable. Save it again, or choose another file."
        ) from err
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return picture


def read_classes(text: str, templates: str) -> Vocabulary:
    """Read class names: ";" or a new line between classes, "," between names of one class.

    Args:
        text: What was typed.
        templates: Prompt templates.

    Raises:
        ValueError: If there is no name, one is empty or occurs twice, or there are too many.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"The classes have {len(text)} characters. At most {MOST_CHARACTERS} are read. Give fewer names."
        )
    if not text.replace(";", " ").replace(",", " ").strip():
        raise ValueError("There are no classes. At least one name is needed. Type some, such as: cat; sofa, couch.")
    lines = ";".join(line.strip().rstrip(";") for line in text.splitlines() if line.strip())
    names = sum(len(part.split(",")) for part in lines.split(";"))
    if names > MOST_NAMES:
        raise ValueError(
            f"There are {names} names. At most {MOST_NAMES} are taken here; the library has no limit. Give fewer."
        )
    return Vocabulary.parse(lines, templates=templates)


def _check_shape(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(_too_many_pixels(f"{width} x {height}"))
    if max(width, height) > MOST_RATIO * min(width, height):
        raise ValueError(
            f"The picture has {width} x {height} pixels. The long side may be at most {MOST_RATIO} times the short "
            "one. Crop it."
        )


def _too_many_pixels(count: str) -> str:
    return (
        f"The picture has too many pixels ({count}). At most {MOST_PIXELS // 10**6} million are decoded. Scale the "
        "picture down."
    )
