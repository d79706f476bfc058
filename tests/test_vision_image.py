"""Decoding of hostile and unusual image files."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlmflow.errors import DataError
from vlmflow.vision.image import decode


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG")]
)
def test_modes_become_rgb(mode, kind):
    image = decode(encode(Image.new("RGB", (9, 7), (255, 255, 255)).convert(mode), kind))
    assert image.mode == "RGB" and image.size == (9, 7)
    assert np.asarray(image).min() > 250


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 32896, 65535]], dtype=np.uint16)
    assert np.asarray(decode(encode(Image.fromarray(values))))[0, :, 0].tolist() == [0, 128, 255]


def test_transparency_lies_on_white():
    picture = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    picture.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(decode(encode(picture)))[0].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_palette_transparency():
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([200, 0, 0] * 256)
    assert np.asarray(decode(encode(palette, "GIF", transparency=0))).min() == 255


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (255, 0, 0)


def test_orientation_tag_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode(encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


def test_bomb_is_refused_from_its_header():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError):
        decode(data)
    with pytest.raises(DataError, match=r"20x10 = 200 pixels, over the limit of 100"):
        decode(encode(Image.new("RGB", (20, 10))), max_pixels=100)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", encode(Image.new("RGB", (64, 64)), "JPEG")[:300]])
def test_broken_bytes_are_a_data_error(data):
    with pytest.raises(DataError, match="image"):
        decode(data)


def test_curation_evaluation_and_export_see_what_training_sees():
    """A rotated and a transparent picture: the decoders once gave several pictures of each."""
    from vlmflow.curation.inputs import pictures
    from vlmflow.dataset.sample import Sample
    from vlmflow.evaluation.pictures import decode_image
    from vlmflow.models.points.processing_points import _open

    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = Image.new("RGB", (8, 4), "white")
    rotated.putpixel((0, 0), (0, 0, 0))
    for data in (encode(rotated, "PNG", exif=exif), encode(Image.new("RGBA", (3, 2), (9, 9, 9, 0)))):
        expected = np.asarray(decode(data))
        (curated,) = pictures(Sample("k", {"images": [{}]}, (data,)))
        assert np.array_equal(np.asarray(curated), expected)
        assert np.array_equal(np.asarray(decode_image(base64.b64encode(data).decode(), "cell")), expected)
        with Image.open(io.BytesIO(data)) as opened:  # as a stranger gives it to the exported processor
            assert np.array_equal(np.asarray(_open(opened)), expected)


def test_a_picture_that_the_pull_accepted_can_always_be_trained_on():
    """Its default limit is not below what `pull.max_pixels` may allow."""
    from vlmflow.curation.accept import accept

    data = encode(Image.new("1", (10_000, 6_000)))
    assert accept(data, 100_000_000).width == 10_000
    assert decode(data).size == (10_000, 6_000)
