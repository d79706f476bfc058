"""Which language a short text is in, by its writing system and its small words; None where these do not tell.

No model and no download: scripts name most languages that are not written in Latin letters, and the words that no sentence
does without (the, und, para) name the others, each word weighing the less the more languages share it. A caption of three
nouns holds no such word: its language is None, which no rule drops. Letters that one language alone uses count as a word.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from functools import lru_cache

from vlmflow.curation.word_lists import words_of
from vlmflow.curation.words import words

SMALL_WORDS = {
    "en": words_of(
        "the a an of and in is on with to for it this that are at by from his her was as has have be its their there which "
        "not you your my our we they he she or but near some into over two "
        "man woman people person wearing holding sitting standing riding walking photo picture image front next background "
        "white black red green blue"
    ),
    "de": words_of(
        "der die das und ist ein eine einer einem einen mit auf von im zu den dem des für nicht sich auch an bei aus wird "
        "sind vor über unter zwei ich wir sie er es oder wie nach zum zur am vom"
    ),
    "fr": words_of(
        "le la les des du de un une et est dans sur avec pour au aux ce cette qui que par en il elle son sa ses sont pas plus "
        "nous vous je deux près à l d d'un d'une"
    ),
    "es": words_of(
        "a el la los las de del un una unos y en con por para es está que se su sus al lo como más no son dos sobre o muy este "
        "esta hay junto"
    ),
    "it": words_of(
        "a il lo la i gli le un uno una di del della dei delle degli e in con per su sul sulla che è nel nella da dal non si al "
        "alla sono due come"
    ),
    "pt": words_of(
        "o a os as um uma de do da dos das e em no na nos nas com por para que é não se ao à seu sua mais como são está dois "
        "duas ou pelo pela"
    ),
    "nl": words_of(
        "de het een en van in op met voor is dat niet aan te zijn naar bij door uit over om ook als er die naast twee wordt "
        "deze dit ik je wij hij zij"
    ),
    "sv": words_of(
        "en ett och på med i av för är som att det den till inte från vid har två under över om sig de vi jag ska"
    ),
    "da": words_of(
        "en et og på med i af for er som at det den til ikke fra ved har to under over om sig de vi jeg skal"
    ),
    "no": words_of(
        "en ei et og på med i av for er som at det den til ikke fra ved har to under over om seg de vi jeg skal"
    ),
    "fi": words_of(
        "ja on ei se että joka kun hän ovat oli kanssa myös mutta sekä kaksi vieressä päällä edessä hyvin tai niin"
    ),
    "pl": words_of(
        "i w na z do się nie jest to że od za przez dla po o jak są ale przy obok dwa dwie który która u oraz lub"
    ),
    "cs": words_of(
        "a v na s z do se je to že od za pro po o jak jsou ale při vedle dva dvě který která u nebo ve jeho není"
    ),
    "ro": words_of(
        "și în cu de la pe un o este pentru din nu care mai sunt al ai ale lângă doi două sau prin despre fost"
    ),
    "hu": words_of("a az és egy van nem hogy ez is meg de mint két vagy mellett alatt fölött volt lesz ki be fel le"),
    "tr": words_of(
        "ve bir bu ile için de da çok olarak iki olan üzerinde yanında gibi daha var değil en ne o ya veya her"
    ),
    "id": words_of(
        "yang dan di dengan untuk dari ini itu pada adalah ke sebuah seorang tidak dua atas oleh atau juga akan dalam"
    ),
    "vi": words_of("và của là một có trong với cho các không được trên người này những đang hai để ở bên khi đã từ ra"),
}
"""ISO 639-1 code -> words, case folded."""

LETTERS = {
    "ß": "de", "ñ": "es", "¿": "es", "¡": "es", "ã": "pt", "õ": "pt", "œ": "fr", "ł": "pl", "ż": "pl", "ź": "pl", "ś": "pl",
    "ą": "pl", "ę": "pl", "ř": "cs", "ů": "cs", "ě": "cs", "ő": "hu", "ű": "hu", "ğ": "tr", "ı": "tr", "ş": "tr", "ț": "ro",
    "ș": "ro", "ơ": "vi", "ư": "vi", "đ": "vi", "ạ": "vi", "ế": "vi", "ộ": "vi", "ấ": "vi", "ả": "vi",
}  # fmt: skip
"""Letters and marks of one of these languages alone."""

SCRIPTS = {
    "HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh", "GREEK": "el", "HEBREW": "he", "THAI": "th",
    "DEVANAGARI": "hi", "BENGALI": "bn", "TAMIL": "ta", "TELUGU": "te", "GEORGIAN": "ka", "ARMENIAN": "hy", "ARABIC": "ar",
    "CYRILLIC": "ru",
}  # fmt: skip
"""First word of a letter's Unicode name -> the language that it is read as."""
VARIANTS = {"ar": {"fa": "پچژگک", "ur": "ٹڈڑںے"}, "ru": {"uk": "іїєґ", "sr": "ђћџљњј", "be": "ў"}}
"""Languages of a shared script and the letters that tell them apart from its commonest."""

ENOUGH = 0.5  # of the weight of small words: one that two languages share
LEAD = 1.25  # by which the best must exceed the next


def language(text: str) -> str | None:
    """ISO 639-1 code of the language of `text`, or None when it cannot be told (too few words, two equally likely)."""
    scripts = Counter(_script(c) for c in text if c.isalpha())
    if not scripts:
        return None
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    if kana * 8 >= scripts["CJK"] + kana > 0:
        scripts["HIRAGANA"] += scripts.pop("CJK", 0)  # Japanese is written in Han characters too
    script, count = scripts.most_common(1)[0]
    if 2 * count < sum(scripts.values()):
        return None
    if script == "LATIN":
        return _latin(text)
    found = SCRIPTS.get(script)
    for code, letters in VARIANTS.get(found or "", {}).items():
        if any(c in letters for c in text.casefold()):
            return code
    return found


def _latin(text: str) -> str | None:
    weights = _weights()
    scores: dict[str, float] = defaultdict(float)
    for word in words(text):
        for code in weights.get(word, ()):
            scores[code] += 1 / len(weights[word])
    for letter in set(unicodedata.normalize("NFC", text.casefold())):
        if letter in LETTERS:
            scores[LETTERS[letter]] += 1
    (best, score), (_, second) = [*sorted(scores.items(), key=lambda pair: (-pair[1], pair[0])), ("", 0.0), ("", 0.0)][
        :2
    ]
    return best if score >= ENOUGH and score >= LEAD * second else None


@lru_cache(maxsize=1)
def _weights() -> dict[str, list[str]]:
    """Languages by small word."""
    found: dict[str, list[str]] = {}
    for code, small in SMALL_WORDS.items():
        for word in small:
            found.setdefault(word, []).append(code)
    return found


@lru_cache(maxsize=8192)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "?").split(" ")[0]
