"""Words of a text in any script, and all that a sample says: what cleaning, duplicates and contamination count and compare."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Scripts written without spaces: Thai, Lao, Burmese, Khmer, kana, Han. Each of their characters counts as a word."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:['’][^\W_{_UNSPACED}]+)*")


def words(text: str) -> list[str]:
    """Words of `text` in order, case folded, marks left out; characters where a script has no spaces."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def wording(texts: Iterable[str]) -> str:
    """What makes two texts the same: case, white space and end marks do not count (as in `checks.duplicates`)."""
    return "\x1f".join(" ".join(text.casefold().split()).rstrip(".!? ") for text in texts)


def number(data: str | bytes) -> int:
    """64 bits of a sha256 as a signed integer, never 0: compares wordings and bytes in columns. Two of a million equal
    each other by chance once in forty million datasets."""
    data = data.encode() if isinstance(data, str) else data
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big", signed=True) or 1


def turns(meta: Mapping[str, Any]) -> list[str]:
    """Texts of a sample's conversations and preferences, in order; empty when it has none."""
    found = [str(turn.get("value") or "") for turn in meta.get("conversations") or []]
    for pair in meta.get("preferences") or []:
        found += [str(turn.get("value") or "") for turn in pair.get("conversations") or []]
        found += [str(pair.get("chosen") or ""), str(pair.get("rejected") or "")]
    return found
