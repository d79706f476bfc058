"""Which addresses, opt-outs and bytes the puller refuses."""

import pytest
from curation_server import bomb, picture

from vlmflow.curation.accept import Rejected, accept, sniff
from vlmflow.curation.guards import is_public, literal_address, opted_out

PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1",
    "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
    "::ffff:169.254.169.254", "::127.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1", "2001:db8::1", "no address",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    ("host", "address"),
    [("10.0.0.1", "10.0.0.1"), ("127.1", "127.0.0.1"), ("0x7f000001", "127.0.0.1"), ("2130706433", "127.0.0.1"),
     ("0177.0.0.1", "127.0.0.1"), ("[::1]", "::1"), ("example.com", None), ("1.2.3.4.example.com", None), ("999.1.1.1.1", None)],
)  # fmt: skip
def test_hosts_that_spell_an_address(host, address):
    assert literal_address(host) == address


@pytest.mark.parametrize(
    ("headers", "directive"),
    [
        ([], None),
        (["all"], None),
        (["noai"], "noai"),
        (["nofollow, NoImageAI"], "noimageai"),
        (["noindex, max-image-preview:large"], "noindex"),
        (["max-image-preview: large, none"], "none"),
        (["all", "noindex"], "noindex"),
        (["otherbot: noai"], None),
        (["otherbot: noindex, noai"], None),
        (["otherbot: noai, vlmflow: noindex"], "noindex"),
        (["VLMflow: noai"], "noai"),
        (["unavailable_after: Sat, 25 Jun 2050 15:00:00 GMT"], None),
        (["max-snippet:-1, max-video-preview:-1"], None),
    ],
)
def test_robots_tags(headers, directive):
    assert opted_out(headers, "vlmflow") == directive


def test_bytes_are_believed_not_names():
    assert [sniff(picture(1, kind)) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")] == [
        "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF",
    ]  # fmt: skip
    assert sniff(b"<svg/>") is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"<html><body>gone</body></html>", "not_an_image"),
        (bomb(5000, 5000), "too_many_pixels"),
        (bomb(60_000, 60_000), "too_many_pixels"),
        (bomb(50, 50), "corrupt"),
        (picture(1)[:-20], "corrupt"),
        (picture(1, "JPEG", (300, 300))[:800], "corrupt"),
        (b"GIF89a", "corrupt"),
        (b"\xff\xd8\xff\xe0 and then nothing", "corrupt"),
    ],
)
def test_refused_bytes(data, reason):
    with pytest.raises(Rejected) as error:
        accept(data, 1_000_000)
    assert error.value.reason == reason


def test_orientation_decides_width_and_height():
    import io

    from PIL import Image

    from vlmflow.vision.image import decode

    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(out, "JPEG", exif=exif)
    found = accept(out.getvalue(), 10_000)
    assert (found.width, found.height) == decode(out.getvalue()).size == (20, 40)
    assert found.data == out.getvalue()
