"""Single images of every kind: right, or refused in one line that names the file."""

import io

import numpy as np
import pytest

from local_elasticity.base.errors import InputError
from local_elasticity.data.decoding import decode

Image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow: install local-elasticity[data]")
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 4, 3), np.uint8)
GREY = RNG.integers(0, 256, (6, 4), np.uint8)


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(blob, size=None):
    return decode(blob, "cat/a.png", size)


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_kinds_give_their_pixels(kind):
    options = {"lossless": True} if kind == "webp" else {}
    assert np.array_equal(read(encoded(Image.fromarray(COLOUR), kind, **options)), COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # What the camera stores for an upright picture, by the definition of the tag (EXIF 2.3, 4.6.4 A).
    stored = {
        1: COLOUR,
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.transpose(1, 0, 2),
        6: np.rot90(COLOUR),
        7: COLOUR[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(COLOUR, -1),
    }[orientation]
    blob = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(read(blob), COLOUR.transpose(2, 0, 1))


def test_grey_one_bit_alpha_palette():
    image = Image.fromarray(COLOUR)
    assert np.array_equal(read(encoded(Image.fromarray(GREY)))[0], GREY)
    bits = GREY > 128
    assert np.array_equal(read(encoded(Image.fromarray(bits)))[0], np.where(bits, 255, 0))
    with_alpha = Image.fromarray(np.dstack([GREY, GREY // 2]))
    assert with_alpha.mode == "LA"
    assert np.array_equal(read(encoded(with_alpha)), GREY[None])
    transparent = Image.fromarray(np.dstack([COLOUR, GREY]))
    assert np.array_equal(read(encoded(transparent)), COLOUR.transpose(2, 0, 1))
    palette = image.quantize(256)
    assert np.array_equal(read(encoded(palette)), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    assert np.array_equal(read(encoded(palette, transparency=0)), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    black = read(encoded(Image.new("CMYK", (4, 6), (0, 0, 0, 255)), "jpeg"))
    assert black.shape == (3, 6, 4)
    assert black.max() < 8


def deep_png(colour_type, channels):
    """A PNG of 16 bits a channel, which Pillow reads and cannot write."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 4, 6, 16, colour_type, 0, 0, 0)
    rows = (b"\0" + bytes(range(4 * channels * 2))) * 6
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff():
    """A TIFF of 16 bits a channel in colour, little-endian and unpacked."""
    import struct

    data = bytes(range(4 * 6 * 6))
    bits_at = 8 + 2 + 10 * 12 + 4
    tags = [
        *((256, 3, 1, 4), (257, 3, 1, 6), (258, 3, 3, bits_at), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, bits_at + 6), (277, 3, 1, 3), (278, 3, 1, 6), (279, 4, 1, len(data)), (284, 3, 1, 1)),
    ]
    body = struct.pack("<H", 10) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<HHH", 16, 16, 16) + data


def frames(kind):
    images = [Image.fromarray(np.full((4, 4, 3), level, np.uint8)) for level in (0, 100, 200)]
    return encoded(images[0], kind, save_all=True, append_images=images[1:])


REFUSED = {
    "grey of 16 bits": (lambda: encoded(Image.fromarray(GREY.astype(np.uint16) * 200)), "8 bits a channel"),
    "colour of 16 bits": (lambda: deep_png(2, 3), "8 bits a channel; got cat/a.png with mode RGB, 16 bits"),
    "alpha of 16 bits": (lambda: deep_png(6, 4), "8 bits a channel; got cat/a.png with mode RGBA, 16 bits"),
    "grey and alpha of 16 bits": (lambda: deep_png(4, 2), "8 bits a channel"),
    "colour of 16 bits, TIFF": (deep_tiff, "8 bits a channel"),
    "colour of 16 bits, PPM": (lambda: b"P6\n4 6\n65535\n" + bytes(4 * 6 * 6), "8 bits a channel"),
    "floating": (lambda: encoded(Image.fromarray(GREY.astype(np.float32)), "tiff"), "8 bits a channel"),
    "Lab": (lambda: encoded(Image.new("LAB", (4, 6)), "tiff"), "in grey or in colour; got cat/a.png with mode LAB"),
    "animated GIF": (lambda: frames("gif"), "one picture in a file; got 3 frames; save each"),
    "animated PNG": (lambda: frames("png"), "one picture in a file; got 3 frames"),
    "animated WebP": (lambda: frames("webp"), "one picture in a file; got 3 frames"),
    "pages": (lambda: frames("tiff"), "one picture in a file; got 3 frames"),
    "nothing": (lambda: b"", "a whole image; got an empty file; replace the file"),
    "text": (lambda: b"no image at all", "a whole image .*; got something else, whatever its name"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "got something else"),
    "half a PNG": (lambda: encoded(Image.fromarray(COLOUR))[:-40], "a whole image"),
    "half a JPEG": (lambda: encoded(Image.fromarray(np.tile(COLOUR, (9, 9, 1))), "jpeg")[:-300], "a whole image"),
    "half a BMP": (lambda: encoded(Image.fromarray(COLOUR), "bmp")[:-20], "a whole image"),
    "a large one": (lambda: encoded(Image.new("1", (9500, 9500))), "at most 89,478,485 pixels; got 9500 x 9500"),
    "a huge one": (lambda: encoded(Image.new("1", (20_000, 10_000))), "at most 89,478,485 pixels; got many more"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("error")
def test_what_is_refused(kind):
    make, says = REFUSED[kind]
    blob = make()
    with pytest.raises(InputError, match=says) as error:
        read(blob)
    assert "cat/a.png" in str(error.value)
    assert "\n" not in str(error.value)
    assert "0x" not in str(error.value)


def test_a_photograph_with_a_preview_is_one_picture():
    blob = encoded(Image.fromarray(COLOUR), "mpo", save_all=True, append_images=[Image.fromarray(COLOUR[:2, :2])])
    assert read(blob).shape == (3, 6, 4)


def test_resizing_comes_after_turning():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(np.ascontiguousarray(np.rot90(COLOUR))), exif=exif)
    assert np.array_equal(read(turned, (6, 4)), COLOUR.transpose(2, 0, 1))
    assert read(turned, (3, 9)).shape == (3, 3, 9)
