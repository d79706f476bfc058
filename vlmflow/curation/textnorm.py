"""Words, numbers and codes of a caption, and the removal of what is not about the picture.

Fusion and its checks must agree on when two words are the same ("seven" and 7, "bars" and "bar", "4,000" and 4000) and
on what in a web alt text is junk (file names, site names, "click to enlarge"). Both live here, without a language model.
Sources: CapsFusion's published outputs and the defects counted in them (spec data-eval-soup.md 4.2).
"""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass

NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}
MONTHS = {
    month: str(value)
    for value, month in enumerate(
        [
            "january",
            "february",
            "march",
            "april",
            "may",
            "june",
            "july",
            "august",
            "september",
            "october",
            "november",
            "december",
        ],
        start=1,
    )
}
FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "it",
        "its",
        "is",
        "are",
        "was",
        "were",
        "be",
        "being",
        "been",
        "has",
        "have",
        "had",
        "there",
        "and",
        "or",
        "but",
        "of",
        "in",
        "on",
        "at",
        "by",
        "for",
        "from",
        "with",
        "without",
        "to",
        "into",
        "onto",
        "over",
        "under",
        "above",
        "below",
        "between",
        "behind",
        "near",
        "as",
        "up",
        "out",
        "off",
        "about",
        "very",
        "some",
        "his",
        "her",
        "their",
        "our",
        "my",
        "your",
        "which",
        "who",
        "whose",
        "while",
        "no",
        "not",
    ]
)
PREPOSITIONS = frozenset(
    [
        "of",
        "in",
        "on",
        "at",
        "by",
        "for",
        "from",
        "with",
        "without",
        "into",
        "onto",
        "over",
        "under",
        "above",
        "below",
        "between",
        "behind",
        "near",
        "against",
        "inside",
    ]
)
DETERMINERS = frozenset(
    ["a", "an", "the", "this", "that", "these", "those", "its", "his", "her", "their", "our", "my", "your", "some"]
)

_EXTENSIONS = r"(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|pdf|psd|mp4|html?|php)"
_FILE = re.compile(rf"[^\s/\\|]+\.{_EXTENSIONS}\b", re.IGNORECASE)
_CAMERA = re.compile(
    r"^(?:img|dsc[nf_]?|dscn|pxl|mvi|gopr|image|photo|pic|picture|scan|screenshot|screen[ _-]?shot|untitled|download"
    r"|file|p)[ _-]*\d[\d_ -]*$",
    re.IGNORECASE,
)
_FILE_JUNK = frozenset(
    [
        "final",
        "copy",
        "small",
        "large",
        "medium",
        "big",
        "thumb",
        "thumbnail",
        "resized",
        "edit",
        "edited",
        "crop",
        "web",
        "hd",
        "new",
        "old",
    ]
)
_VERSION = re.compile(r"^v\d+$", re.IGNORECASE)
_SIZE = re.compile(r"\b\d{2,5}\s?[x×]\s?\d{2,5}(?:\s?px)?\b|\b\d+\s?(?:px|kb|mb|dpi)\b", re.IGNORECASE)
_URL = re.compile(
    r"\b(?:https?://|www\.)\S+|\b\S+@\S+\.\w+\b|\b[\w-]+\.(?:com|net|org|co\.uk|de|ru|io|shop)\b(?:/\S*)?", re.I
)
_TAG = re.compile(r"<[^<>]{0,200}>")
_COPY_NUMBER = re.compile(r"\(\s*\d{1,3}\s*\)")
_SITES = "shutterstock|getty ?images|istock(?:photo)?|alamy|dreamstime|depositphotos|123rf|adobe stock|flickr|pinterest|" \
    "instagram|facebook|twitter|youtube|tumblr|etsy|ebay|amazon|aliexpress|wikipedia|wikimedia(?: commons)?|imgur|reddit"  # fmt: skip
_BOILERPLATE = re.compile(
    r"\b(?:(?:royalty[- ]free|free)? ?stock (?:photos?|images?|vectors?|illustrations?|footage)|royalty[- ]free|"
    r"click (?:here )?(?:to|for) (?:enlarge|zoom|view|see)(?: (?:the )?(?:full )?(?:image|photo|picture|size))?|"
    r"click (?:to|for) (?:a )?larger(?: (?:image|view))?|click here|"
    r"(?:this )?image may contain:?(?: [\w ,]+)?|may be an image of|no (?:photo )?description available|"
    r"(?:hd|4k|desktop|mobile|free|iphone) wallpapers?|wallpapers?|image gallery|photo gallery|thumbnails?|"
    r"(?:free|fast) shipping|buy (?:it )?(?:online|now)|add to (?:cart|basket)|shop now|for sale|best price|on sale|"
    r"(?:no\.? ?|number ?|#)1 choice|read more|learn more|see more|view (?:larger|full size|all)|download(?: now| free)?|"
    r"loading(?:\.{2,}|…)?|all rights reserved|copyright|watermark(?:ed)?|photo credit:?|image credit:?|courtesy of|"
    rf"(?:(?:via|on|from|by|at) )?(?:{_SITES})|picture of product|product image|placeholder)(?!\w)|©|®|™",
    re.IGNORECASE,
)
_ALONE = frozenset(
    [
        "image",
        "images",
        "photo",
        "photos",
        "picture",
        "pic",
        "untitled",
        "logo",
        "banner",
        "icon",
        "advertisement",
        "ad",
        "loading",
        "thumbnail",
        "home",
        "null",
        "none",
        "undefined",
        "unknown",
        "img",
        "default",
        "alt",
        "text",
        "title",
        "screenshot",
        "scan",
        "video",
        "cover",
        "avatar",
        "header",
        "slide",
        "background",
    ]
)  # one of these as the whole alt text says nothing about the picture
_SEPARATOR = re.compile(r"\s+[|–—·•»~-]+\s+|\s*[|·•»]\s*")


@dataclass(frozen=True)
class Token:
    """One word of a caption: its surface, what it is compared by, and the marks around it."""

    text: str  # the surface without marks around it
    norm: str  # what it is compared by
    kind: str  # word | number | code
    lead: str = ""  # opening marks kept with it: quotes, brackets
    trail: str = ""  # closing marks: quotes, an abbreviation's dot
    stop: bool = False  # a phrase ends after this token

    @property
    def surface(self) -> str:
        return self.lead + self.text + self.trail

    @property
    def content(self) -> bool:
        """Whether the token carries a fact rather than grammar."""
        return self.kind != "word" or self.text.lower() not in FUNCTION_WORDS


_PLAIN_NUMBER = re.compile(r"^[$€£#]?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?$|^[$€£#]?\d+(?:\.\d+)?%?$")
_ORDINAL = re.compile(r"^(\d+)(?:st|nd|rd|th)$")


def normal(word: str) -> str:
    """What a word is compared by: case, plural, possessive and the way of writing a number do not count."""
    low = word.casefold().replace("’", "'")
    if low.endswith("'s"):
        low = low[:-2]
    if low in NUMBER_WORDS:
        return NUMBER_WORDS[low]
    if _PLAIN_NUMBER.match(low):
        bare = low.strip("$€£#%").replace(",", "")
        whole = bare.lstrip("0") or "0"
        return "0" + whole if whole.startswith(".") else whole
    ordinal = _ORDINAL.match(low)
    if ordinal:
        return ordinal.group(1)
    if low.isalpha() and len(low) > 3 and low.endswith("s") and not low.endswith("ss"):
        return low[:-2] if low.endswith(("xes", "ches", "shes", "sses")) else low[:-1]
    return low


def kind_of(word: str) -> str:
    """number (7, seven, 4,000), code (has a digit and more: KX-4471-B, 3.14.1, A4) or word."""
    low = word.casefold()
    if low in NUMBER_WORDS or _PLAIN_NUMBER.match(low) or _ORDINAL.match(low):
        return "number"
    return "code" if any(c.isdigit() for c in word) else "word"


_EDGES = "\"'“”‘’«»()[]{}<>.,;:!?…*=+^~|/\\`-–—_&"
_OPENING = "\"'“‘«(["
_CLOSING = "\"'”’»)]"
_JOINED = re.compile(r"^([A-Za-z]*[a-z]{2,})[-_]?(\d{1,3})$|^(\d{1,3})[-_]?([a-z]{3,})$")  # digit-7, digit7, 4bars


def tokens(text: str) -> list[Token]:
    """Split `text` into words in order; marks stay with their words, lone marks end a phrase."""
    out: list[Token] = []
    for chunk in text.split():
        core = chunk.strip(_EDGES)
        if not core or not any(c.isalnum() for c in core):
            if out and chunk not in "&+'\"":
                out[-1] = _ended(out[-1])
            continue
        start = chunk.index(core)
        before, after = chunk[:start], chunk[start + len(core) :]
        if out and any(c in "([" for c in before):
            out[-1] = _ended(out[-1])
        joined = _JOINED.match(core)
        pieces = [p for p in joined.groups() if p] if joined and not _ORDINAL.match(core.lower()) else [core]
        for position, piece in enumerate(pieces):
            last = position == len(pieces) - 1
            out.append(
                Token(
                    text=piece,
                    norm=normal(piece),
                    kind=kind_of(piece),
                    lead="".join(c for c in before if c in '"“«') if position == 0 else "",
                    trail=("." if _abbreviated(core, after) else "".join(c for c in after if c in '"”»'))
                    if last
                    else "",
                    stop=last and any(c in ".,;:!?…)]|" for c in after) and not _abbreviated(core, after),
                )
            )
    return out


_ABBREVIATIONS = frozenset(
    ["no", "nos", "nr", "vol", "st", "mr", "mrs", "ms", "dr", "rev", "ver", "fig", "approx", "ca", "vs", "jr", "sr"]
)


def _abbreviated(core: str, after: str) -> bool:
    return after == "." and (core.casefold() in _ABBREVIATIONS or (len(core) == 1 and core.isupper()))


def _ended(token: Token) -> Token:
    return Token(token.text, token.norm, token.kind, token.lead, token.trail, True)


def vocabulary(text: str) -> set[str]:
    """Everything that a text supports: its words, and the parts of joined words, as they are compared."""
    found: set[str] = set()
    plain = unescape(text)
    for token in tokens(plain):
        found.add(token.norm)
    for piece in re.findall(r"[^\W\d_]+|\d+", plain):
        found.add(normal(piece))
    for piece in re.split(r"[\s_/\\|]+", plain):
        found.update(token.norm for token in tokens(piece))
    return found


def supported(token: Token, sources: set[str]) -> bool:
    """Whether a word, or every part of a joined word, stands in `sources` (a `vocabulary`)."""
    if token.norm in sources or token.text.casefold() in sources:
        return True
    parts = [normal(p) for p in re.findall(r"[^\W\d_]+|\d+", token.text)]
    return bool(parts) and all(part in sources for part in parts)


def unescape(text: str) -> str:
    """HTML entities (also doubly escaped), tags and odd white space to plain text."""
    text = html.unescape(html.unescape(text))
    text = _TAG.sub(" ", text)
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Zs") else c for c in text)
    return " ".join(text.split())


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
