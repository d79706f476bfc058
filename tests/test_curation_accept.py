"""What is accepted as an image, and that training sees the right pixels of it: orientation, modes, animation, damage."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from vlmflow.curation.accept import Accepted, Rejected, accept
from vlmflow.digest import sha256_bytes
from vlmflow.recipe.data import ResizeSpec
from vlmflow.vision.image import decode

LIMIT = 10**7


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def quarters(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red, green, blue and grey quarters: tells every orientation apart."""
    image = Image.new("RGB", size)
    w, h = size[0] // 2, size[1] // 2
    for box, colour in (((0, 0), "#f00000"), ((w, 0), "#00f000"), ((0, h), "#0000f0"), ((w, h), "#808080")):
        image.paste(colour, (*box, box[0] + w, box[1] + h))
    return image


def corners(image: Image.Image) -> list[tuple[int, int, int]]:
    w, h = image.size
    return [
        image.getpixel(at)
        for at in ((w // 8, h // 8), (7 * w // 8, h // 8), (w // 8, 7 * h // 8), (7 * w // 8, 7 * h // 8))
    ]


def close(a, b, by: int = 6) -> bool:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) <= by


def rejected(data: bytes, resize: ResizeSpec | None = None) -> str:
    with pytest.raises(Rejected) as refusal:
        accept(data, LIMIT, resize)
    return refusal.value.reason


SPECS = [None, ResizeSpec(side=32, format="png")]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_is_kept_in_the_bytes_and_everything_is_seen_upright(kind, tag, spec):
    upright = quarters()
    T = Image.Transpose
    undo = [
        None,
        T.FLIP_LEFT_RIGHT,
        T.ROTATE_180,
        T.FLIP_TOP_BOTTOM,
        T.TRANSPOSE,
        T.ROTATE_90,
        T.TRANSVERSE,
        T.ROTATE_270,
    ]
    stored = upright.transpose(undo[tag - 1]) if undo[tag - 1] is not None else upright
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encode(stored, kind, exif=exif, **options)
    found = accept(data, LIMIT, spec)
    seen = decode(found.data)
    assert seen.size == (found.width, found.height) == ((64, 48) if spec is None else (32, 24))
    assert close(corners(seen), corners(upright))
    if spec is None and kind != "TIFF":
        assert found.data == data


def test_cmyk_jpegs_of_photoshop_are_not_negatives():
    cmyk = quarters().convert("CMYK")
    data = encode(cmyk, "JPEG", quality=98)
    assert b"Adobe" in data[:64]  # Pillow writes Adobe's inverted form
    for spec in SPECS:
        seen = decode(accept(data, LIMIT, spec).data)
        assert close(corners(seen), corners(quarters()), by=10)


def ramp16() -> np.ndarray:
    return np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)


@pytest.mark.parametrize("kind,mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_sixteen_bits_are_scaled_not_clipped(kind, mode):
    values = ramp16()
    image = (
        Image.fromarray(values)
        if mode == "I;16"
        else Image.frombytes("I;16B", (64, 64), values.astype(">u2").tobytes())
    )
    for spec in SPECS:
        seen = np.asarray(decode(accept(encode(image, kind), LIMIT, spec).data))
        expected = np.rint(values / 257.0)
        if spec is None:
            assert np.abs(seen[..., 0] - expected).max() <= 1
        assert 120 < seen.mean() < 135 and seen.min() < 10 and seen.max() > 245
    if kind == "PNG":
        assert accept(encode(image, kind), LIMIT).data == encode(image, kind)


def test_float_and_32_bit_tiff_become_visible_pictures():
    for values in (np.linspace(0, 1, 4096, dtype=np.float32), np.linspace(0, 65535, 4096).astype(np.int32)):
        seen = np.asarray(decode(accept(encode(Image.fromarray(values.reshape(64, 64)), "TIFF"), LIMIT).data))
        assert 120 < seen.mean() < 135


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_parts_of_palettes_and_colour_keys_lie_on_white(kind):
    palette = quarters().quantize(4)
    see_through = palette.getpixel((0, 0))
    data = encode(palette, kind, transparency=see_through)
    for spec in SPECS:
        seen = corners(decode(accept(data, LIMIT, spec).data))
        assert close(seen[0], (255, 255, 255)) and close(seen[1:], corners(quarters())[1:])


def test_a_transparent_colour_of_an_rgb_png_lies_on_white():
    data = encode(quarters(), "PNG", transparency=(0xF0, 0, 0))
    for spec in SPECS:
        assert close(corners(decode(accept(data, LIMIT, spec).data))[0], (255, 255, 255))


def test_resized_jpegs_have_no_black_where_the_original_was_transparent():
    image = quarters().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    found = accept(encode(image, "WEBP", lossless=True), LIMIT, ResizeSpec(side=32))
    assert found.format == "jpg" and close(corners(decode(found.data)), [(255, 255, 255)] * 4)


@pytest.mark.parametrize("kind,options", [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_the_first_frame_stands_for_an_animation(kind, options):
    first, second = quarters(), Image.new("RGB", (64, 48), "#ffffff")
    data = encode(first, kind, save_all=True, append_images=[second] * 3, duration=40, loop=0, **options)
    assert Image.open(io.BytesIO(data)).n_frames > 1
    for spec in SPECS:
        assert close(corners(decode(accept(data, LIMIT, spec).data)), corners(first))


@pytest.mark.parametrize(
    "kind,options",
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})],
)
def test_cut_files_are_refused_wherever_they_end(kind, options):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
    data = encode(noise, kind, **options)
    for spec in SPECS:
        accept(data, LIMIT, spec)
        for length in (20, 100, len(data) // 4, len(data) // 2, len(data) * 3 // 4, len(data) - 40):
            assert rejected(data[:length], spec) == "corrupt"


def test_a_flipped_bit_of_a_png_is_seen_by_its_checksums():
    data = bytearray(encode(quarters(), "PNG"))
    data[len(data) // 2] ^= 4
    assert rejected(bytes(data)) == "corrupt"


@pytest.mark.parametrize("options", [{}, {"interlaced": True}])
def test_a_png_that_pillow_decodes_into_noise_is_refused(options):
    """Pillow looks at no chunk's checksum in pixel data; a flipped bit that zlib can read goes on as other pixels."""
    picture = quarters()
    whole = png_of(picture, **options)
    accept(whole, LIMIT)
    broken = bytearray(whole)
    broken[whole.index(b"IDAT") + 200] ^= 64
    with Image.open(io.BytesIO(broken)) as image:
        assert image.tobytes() != picture.convert("RGB").tobytes()
    for spec in SPECS:
        assert rejected(bytes(broken), spec) == "corrupt"
    assert rejected(whole[:-14], None) == "corrupt"  # in the checksum of the pixels
    accept(whole[:-12], LIMIT)  # all pixels, no end mark


def png_of(picture, interlaced=False):
    """An uncompressed PNG, zlib's own checksum in a chunk that Pillow never reads; in Adam7's order of pixels, if asked."""
    rgb = np.asarray(picture.convert("RGB"))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    cut = [rgb[y::down, x::across] for y, x, down, across in (passes if interlaced else [(0, 0, 1, 1)])]
    rows = b"".join(b"\0" + row.tobytes() for part in cut for row in part if part.size)
    header = struct.pack(">IIBBBBB", rgb.shape[1], rgb.shape[0], 8, 2, 0, 0, interlaced)
    pixels = zlib.compress(rows, 0)
    chunks = [(b"IHDR", header), (b"IDAT", pixels[:-4]), (b"IDAT", pixels[-4:]), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_what_is_another_file_too_is_refused():
    picture, archive = encode(quarters(), "JPEG"), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("a.class", b"x" * 50)
        writer.comment = b"hello"
    assert rejected(picture + archive.getvalue()) == "polyglot"
    assert rejected(picture + b"<ScRipt>alert(1)</script>") == "polyglot"
    assert rejected(encode(quarters(), "JPEG", comment=b"<?php system($_GET[0]); ?>")) == "polyglot"
    assert rejected(encode(quarters(), "GIF", comment=b"%PDF-1.7\n1 0 obj")) == "polyglot"
    assert rejected(picture + b"Rar!\x1a\x07\x00" + b"data" * 9 + b"\xc4\x3d\x7b\x00\x40\x07\x00") == "polyglot"


def test_metadata_and_trailers_of_cameras_are_no_polyglots():
    xmp = b'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF/></x:xmpmeta><?xpacket end="w"?>'
    data = encode(quarters(), "JPEG", xmp=xmp) + b"SEFT" + b"\0" * 64 + b"PK\x05\x06 no directory"
    assert accept(data, LIMIT).data == data


def test_types_are_read_from_the_bytes():
    assert rejected(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "not_an_image"
    assert rejected(b"") == "not_an_image"
    png = encode(quarters(), "PNG")
    header = bytearray(png)
    header[16:24] = struct.pack(">II", 100_000, 100_000)
    assert rejected(bytes(header)) in ("too_many_pixels", "corrupt")
    assert rejected(b"\xff\xd8\xff" + png) == "corrupt"


@pytest.mark.parametrize("measure,size", [("longest", (512, 384)), ("shortest", (683, 512))])
@pytest.mark.parametrize("form", ["jpg", "webp", "png"])
def test_resize_measures_the_side_and_records_the_source(measure, size, form):
    data = encode(quarters((1200, 900)), "JPEG", quality=95)
    found = accept(data, LIMIT, ResizeSpec(side=512, measure=measure, format=form))
    assert (found.width, found.height) == decode(found.data).size == size
    assert close(corners(decode(found.data)), corners(quarters()), by=8)
    assert found.about("h") == {
        "sha256": "h",
        "width": size[0],
        "height": size[1],
        "format": form,
        "source_sha256": sha256_bytes(data),
        "resized_from": [1200, 900],
    }
    assert accept(data, LIMIT, ResizeSpec(side=512, measure=measure, format=form)) == found


def test_small_pictures_stay_as_they_are():
    data = encode(quarters((512, 300)), "JPEG")
    assert accept(data, LIMIT, ResizeSpec(side=512)) == Accepted(data, "jpg", 512, 300)
    thin = accept(encode(quarters((4000, 4)), "PNG"), LIMIT, ResizeSpec(side=100))
    assert (thin.width, thin.height) == (100, 1)


def test_reduction_keeps_fine_texture_at_its_mean_instead_of_aliasing_it():
    board = (np.indices((900, 1200)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for kind in ("PNG", "JPEG"):
        data = encode(Image.fromarray(board).convert("RGB"), kind, **({"quality": 98} if kind == "JPEG" else {}))
        seen = np.asarray(decode(accept(data, LIMIT, ResizeSpec(side=500, format="png")).data))
        assert abs(seen.mean() - 127.5) < 2 and seen.std() < 20


def test_resized_pictures_are_in_srgb():
    swapped = _profile_with_swapped_colours()
    picture = Image.new("RGB", (100, 80), (200, 60, 40))
    plain = decode(accept(encode(picture, "PNG", icc_profile=swapped), LIMIT, ResizeSpec(side=50)).data)
    assert not close(plain.getpixel((20, 20)), (200, 60, 40), by=12)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"garbage" * 20):
        same = decode(accept(encode(picture, "PNG", icc_profile=profile), LIMIT, ResizeSpec(side=50)).data)
        assert close(same.getpixel((20, 20)), (200, 60, 40))


def _profile_with_swapped_colours() -> bytes:
    """sRGB's profile with the primaries of red and green exchanged and another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data).replace(b"sRGB", b"test").replace(b"s\0R\0G\0B", b"t\0e\0s\0t")


def test_reports_show_pictures_upright_too():
    import base64
    import re

    from vlmflow.report.page import thumbnail

    exif = Image.Exif()
    exif[0x0112] = 6
    stored = quarters((900, 1200)).transpose(Image.Transpose.ROTATE_90)
    shown = str(thumbnail(encode(stored, "JPEG", exif=exif, quality=95), "x"))
    assert "900x1200" in shown
    image = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", shown)[1])))
    assert close(corners(image.convert("RGB")), corners(quarters()), by=20)
