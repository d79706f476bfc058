"""How much of a text says again what it said before."""

from __future__ import annotations

GRAM = 10  # characters, as data-juicer's character repetition filter takes by default (spec data-eval-soup.md 4.3)


def repetition(text: str, size: int = GRAM) -> float:
    """Share of the text's character n-grams that occurred in it before, 0 to 1; case and runs of white space do not count."""
    text = " ".join(text.casefold().split())
    total = len(text) - size + 1
    return 1 - len({text[i : i + size] for i in range(total)}) / total if total > 0 else 0.0
