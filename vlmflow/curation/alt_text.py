"""The part of a web alt text that may be about the picture.

Web alt texts hold file names, site names, shop talk and markup beside facts. What is kept here is what fusion may use
and what its checks measure lengths against; file names give up their words ("digit7_final.jpg" -> "digit7").
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

from vlmflow.curation.word_lists import words_of

_EXTENSIONS = r"(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|pdf|psd|mp4|html?|php)"
_FILE = re.compile(rf"[^\s/\\|]+\.{_EXTENSIONS}\b", re.IGNORECASE)
_CAMERA = re.compile(
    r"^(?:img|dsc[nf_]?|dscn|pxl|mvi|gopr|image|photo|pic|picture|scan|screenshot|screen[ _-]?shot|untitled|download"
    r"|file)[ _-]*\d[\d_ -]*$|^p\d{7}$",
    re.IGNORECASE,
)
_FILE_JUNK = words_of("final copy small large medium big thumb thumbnail resized edit edited crop web hd new old")
_VERSION = re.compile(r"^v\d+$", re.IGNORECASE)
_SIZE = re.compile(r"\b\d{2,5}\s?[x×]\s?\d{2,5}(?:\s?px)?\b|\b\d+\s?(?:px|kb|mb|dpi)\b", re.IGNORECASE)
_URL = re.compile(
    r"\b(?:https?://|www\.)\S+|\b\S+@\S+\.\w+\b|\b[\w-]+\.(?:com|net|org|co\.uk|de|ru|io|shop)\b(?:/\S*)?", re.I
)
_TAG = re.compile(r"<[^<>]{0,200}>")
_COPY_NUMBER = re.compile(r"\(\s*\d{1,3}\s*\)")
_SITES = (
    "shutterstock|getty ?images|istock(?:photo)?|alamy|dreamstime|depositphotos|123rf|adobe stock|flickr|pinterest|tumblr|"
    "etsy|ebay|aliexpress|wikimedia(?: commons)?|imgur"
)
_FAMOUS = "instagram|facebook|twitter|youtube|reddit|amazon|wikipedia"  # may be what the picture shows
_BOILERPLATE = re.compile(
    r"\b(?:(?:royalty[- ]free|free)? ?stock (?:photos?|images?|vectors?|illustrations?|footage)|royalty[- ]free|"
    r"click (?:here )?(?:to|for) (?:enlarge|zoom|view|see)(?: (?:the )?(?:full )?(?:image|photo|picture|size))?|"
    r"click (?:to|for) (?:a )?larger(?: (?:image|view))?|click here|"
    r"(?:this )?image may contain:?(?: [\w ,]+)?|may be an image of|no (?:photo )?description available|"
    r"(?:hd|4k|desktop|mobile|free|iphone) wallpapers?|wallpapers? (?:hd|4k)|image gallery|photo gallery|thumbnails?|"
    r"(?:free|fast) shipping|buy (?:it )?(?:online|now)|add to (?:cart|basket)|shop now|for sale|best price|on sale|"
    r"(?:no\.? ?|number ?|#)1 choice|read more|learn more|see more|view (?:larger|full size|all)|free download|download (?:now|free|here)|"
    r"loading(?:\.{2,}|…)|all rights reserved|copyright|watermark(?:ed)?|photo credit:?|image credit:?|courtesy of|"
    rf"(?:(?:via|on|from|by|at) )?(?:{_SITES})|(?:via|on) (?:{_FAMOUS})|picture of product|product image|placeholder)(?!\w)|©|®|™",
    re.IGNORECASE,
)
_ALONE = words_of(
    "image images photo photos picture pic untitled logo banner icon advertisement ad loading thumbnail home "
    "null none undefined unknown img default alt text title screenshot scan video cover avatar header slide "
    "background " + _FAMOUS.replace("|", " ")
)  # one of these as the whole alt text says nothing about the picture
_SEPARATOR = re.compile(r"\s+[|–—·•»~-]+\s+|\s*[|·•»]\s*")


def unescape(text: str) -> str:
    """HTML entities (also doubly escaped), tags and odd white space to plain text."""
    if "&" in text:
        text = html.unescape(html.unescape(text))
    text = _TAG.sub(" ", text)
    if not (text.isascii() and text.isprintable()):
        text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Zs") else c for c in text)
    return " ".join(text.split())


@lru_cache(maxsize=256)
def clean_alt(text: str) -> str:
    """The part of a web alt text that may be about the picture; "" when nothing is left.

    File names become their words without camera numbers, versions and sizes ("digit7_final.jpg" -> "digit7");
    links, site names, shop talk and markup go.
    """
    text = unescape(text)
    text = _URL.sub(" ", text)
    text = _FILE.sub(lambda match: " " + _words_of_file(match.group(0)) + " ", text)
    text = _SIZE.sub(" ", text)
    text = _COPY_NUMBER.sub(" ", text)
    text = _BOILERPLATE.sub(" | ", text)
    text = " ".join(chunk for chunk in text.split() if not _CAMERA.match(chunk))
    phrases = []
    for phrase in _SEPARATOR.split(text):
        phrase = phrase.replace("_", " ").strip(" ,;:-–—|/\\")
        if any(c.isalnum() for c in phrase) and phrase.casefold().strip(" .!?…") not in _ALONE:
            phrases.append(" ".join(phrase.split()))
    return ", ".join(dict.fromkeys(phrases))


def _words_of_file(name: str) -> str:
    stem = name.rsplit(".", 1)[0]
    if _CAMERA.match(stem):
        return ""
    stem = _SIZE.sub(" ", stem.replace("_", " ").replace("%20", " "))
    parts = [p for p in re.split(r"[\s-]+" if not re.search(r"[A-Z]+-\d|\d-[A-Z]", stem) else r"\s+", stem) if p]
    kept = [
        p
        for p in parts
        if p.lower() not in _FILE_JUNK and not _VERSION.match(p) and not re.fullmatch(r"\d{4,}|[0-9a-f]{8,}", p)
    ]
    words = " ".join(kept)
    return "" if _CAMERA.match(words) or words.casefold() in _ALONE else words
