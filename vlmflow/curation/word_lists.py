"""The few English words that fusion and its checks know: this is all the language there is in engine "rules"."""

from __future__ import annotations


def words_of(text: str) -> frozenset[str]:
    """A set of words written as one string."""
    return frozenset(text.split())


def _numbered(text: str, start: int) -> dict[str, str]:
    return {word: str(value) for value, word in enumerate(text.split(), start)}


NUMBER_WORDS = _numbered(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty",
    start=0,
)
MONTHS = _numbered("january february march april may june july august september october november december", start=1)
ABBREVIATIONS = words_of("no nos nr vol st mr mrs ms dr rev ver fig approx ca vs jr sr")
"""Words whose dot does not end a sentence."""

FUNCTION_WORDS = words_of(
    "a an the this that these those it its is are was were be being been has have had there and or but of in on "
    "at by for from with without to into onto over under above below between behind near as up out off about "
    "very some his her their our my your which who whose while no not"
)
PREPOSITIONS = words_of(
    "of in on at by for from with without into onto over under above below between behind near against inside"
)
DETERMINERS = words_of("a an the this that these those its his her their our my your some")

DANGLING = PREPOSITIONS | DETERMINERS | words_of("and or but is are was were to as very which who whose while")
"""Words with which no sentence ends: what follows was cut off."""

MEDIA = words_of(
    "scan photo photograph picture image drawing sketch painting illustration screenshot plot chart graph "
    "diagram figure poster print engraving map render"
)

COLOURS = words_of(
    "red green blue yellow orange purple pink brown black white grey gray cyan magenta gold silver beige teal"
)

LABELLED = words_of("word text digit number numeral letter say said saying read reading")
"""Words after which a caption states what is written in the picture (as `textnorm.normal` writes them)."""
INSCRIBED = words_of("handwritten written printed typed drawn painted")
"""Words before a number that is itself what the picture shows."""
TEXT_LABELS = words_of("word text say saying read reading")

GENERIC = words_of("word digit number image picture photo text letter thing object show depict display view say")
"""Content words that add no fact of their own to a caption (as `textnorm.normal` writes them)."""
