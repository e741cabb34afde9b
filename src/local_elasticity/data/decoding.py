"""One image file as an array of 8 bits a channel, or one line that says why it is none."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import numpy as np
from jaxtyping import UInt8

from local_elasticity.base.checks import check_whole, in_words
from local_elasticity.base.errors import InputError, missing_extra
from local_elasticity.data.checks import kind_and_message

Size = int | tuple[int, int] | None

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What may be decoded, whatever a file is called: Pillow knows formats that start other programs."""
GREY = ("1", "L", "LA", "La")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
MOST_PIXELS = 89_478_485
"""Of one image: beyond it (0.25 GB in colour) a small file may be made to fill the memory."""
_DEEP = re.compile(r";1[26][BLN]")  # of Pillow's raw modes: more than 8 bits a channel, in some order of bytes


def check_size(size: Any) -> tuple[int, int] | None:
    """Check a size to which images are brought, and give its height and width.

    Args:
        size: pixels of both sides, (height, width), or None.

    Raises:
        InputError: for anything else.
    """
    if size is None:
        return None
    pair = size if isinstance(size, tuple | list) else (size, size)
    try:
        if len(pair) != 2:
            raise ValueError
        height, width = (check_whole("size", side, 1, 16_384) for side in pair)
    except ValueError as error:
        raise InputError(
            expected="size: pixels, or (height, width), from 1 to 16384", got=in_words(size), do="correct size"
        ) from error
    return height, width


def decode(blob: bytes, file: str, size: tuple[int, int] | None) -> UInt8[np.ndarray, "channels height width"]:
    """Decode one image, upright as its EXIF orientation says; grey or red, green, blue, without transparency.

    Args:
        blob: the file's bytes.
        file: its name, for the error.
        size: height and width to bring it to (bilinear).

    Raises:
        InputError: without Pillow; for no image, a damaged one, one of more than 8 bits a channel, one of several
            frames, or a gigantic one.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise missing_extra("pillow", "data", "decoding images") from error
    if not blob:
        raise _refused(file, "a whole image", "an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the check below
            image = Image.open(io.BytesIO(blob), formats=FORMATS)
        _check(image, file)
        image = ImageOps.exif_transpose(image).convert("L" if image.mode in GREY else "RGB")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise _refused(file, f"a whole image ({', '.join(FORMATS)})", "something else, whatever its name") from error
    except Image.DecompressionBombError as error:
        raise _refused(file, f"a whole image of at most {MOST_PIXELS:,} pixels", "many more") from error
    except Exception as error:  # what decoders make of damaged files is open-ended
        raise _refused(file, "a whole image", kind_and_message(error)) from error
    if size is not None and (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check(image: Any, file: str) -> None:
    """Refuse, before its pixels are decoded, what would lose some of them.

    Raises:
        InputError: saying what it is.
    """
    raw = "/".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    levels = [
        tile[3][-1] for tile in getattr(image, "tile", ()) if image.format == "PPM" and isinstance(tile[3], tuple)
    ]
    deep = _DEEP.search(raw) or any(isinstance(level, int) and level > 255 for level in levels)
    if image.mode.startswith(("I", "F")) or deep:
        mode = f"{image.mode}, 16 bits a channel" if deep else image.mode
        raise InputError(
            expected="images of 8 bits a channel", got=f"{file} with mode {mode}", do="convert it to 8 bits first"
        )
    if image.mode not in (*GREY, *COLOUR):
        raise InputError(
            expected="images in grey or in colour", got=f"{file} with mode {image.mode}", do="convert it to RGB first"
        )
    if image.width * image.height > MOST_PIXELS:
        raise _refused(
            file, f"an image of at most {MOST_PIXELS:,} pixels", f"{image.height} x {image.width}", "make it smaller"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # cameras add a small preview to their photographs
        raise _refused(file, "one picture in a file", f"{frames} frames", "save each as a file of its own")


def _refused(file: str, expected: str, got: str, do: str = "replace the file") -> InputError:
    return InputError(expected=f"{file}: {expected}", got=got, do=f"{do}, or take it out of the folder")
