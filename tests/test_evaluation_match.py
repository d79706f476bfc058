"""Replies to verdicts: the failure cases that were measured in the usual kits (data-eval-soup 7.4), and ours."""

from __future__ import annotations

import pytest

from vlmflow.evaluation.match import match, match_choice, match_reading, match_yes_no, normalise
from vlmflow.evaluation.numbers import number
from vlmflow.evaluation.tsv import Question

ANIMALS = {"A": "cat", "B": "dog", "C": "hot dog", "D": "bird"}


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("b", "B"), ("B.", "B"), ("(b)", "B"), ("(B)", "B"), ("Ｂ", "B"), ("（Ｂ）", "B"), ('"B"', "B"), ("'B'", "B"),
        ("**B**", "B"), ("B: dog", "B"), ("B) dog", "B"), ("B. dog", "B"), ("(b) dog", "B"), ("b. dog", "B"), ("B, dog", "B"),
        ("B, a dog", "B"), ("The answer is B", "B"), ("The answer is B.", "B"), ("the correct answer is (b).", "B"),
        ("Answer: B", "B"), ("The answer is option B, the dog", "B"), ("Option B", "B"), ("I choose B.", "B"),
        ("答案是B", "B"), ("答案：B", "B"), ("选B。", "B"), ("答案是B选项", "B"), ("故选：B", "B"), ("\\boxed{B}", "B"),
        ("So the result is \\boxed{\\text{B}}.", "B"), ("B is correct", "B"), ("A is correct because it has whiskers", "A"),
        ("C because the sausage lies in a bun and there is mustard on it", "C"), ("A because of the whiskers", "A"),
        ("dog", "B"), ("Dog.", "B"), ("hot dog", "C"), ("It is a hot dog", "C"), ("a dog", "B"), ("The answer is a dog", "B"),
        ("The answer is a dog, not seen before", None), ("I see a cat", "A"), ("A cat", "A"), ("A dog", "B"),
        ("<think>A or B? Maybe C.</think>\nB", "B"), ("B\n\nA. no, B. yes, C. no, D. no", "B"), ("It's B", "B"), ("It is B.", "B"),
        ("B\n\nThe image shows a dog, not a cat (A) or a bird (D).", "B"), ("B是正确的", "B"), ("\\(\\boxed{\\mathrm{B}}\\)", "B"),
        ("The cat is on the left so D", None), ("The dog, B", "B"), ("It's a dog", "B"), ("\n**B. dog**\nnot A. cat", "B"),
        ("<think>cut before", None), ("this is a dog", "B"), ("It is a, b or c", None),
        ("The answer is A or B", None), ("The answer is (A) and (B)", None), ("The answer is B, a dog", "B"), ("选A或B", None),
        # nothing to read, or more than one answer
        ("", None), ("   ", None), ("hotdog", None), ("I do not know", None), ("E", None), ("B or C", None), ("A and B", None),
        ("a cat or a dog", None), ("A. cat B. dog C. hot dog D. bird", None), ("It is not a dog", None), ("neither", None),
        ("The answer is A. No, the answer is B.", None), ("<think>B, but wait", None), ("U.S. flag", None), ("Aardvark", None),
        ("I think so", None), ("catalogue", None), ("this is 不是 dog", None),
    ],
)  # fmt: skip
def test_choice(reply: str, letter: str | None) -> None:
    for gold in ANIMALS:
        found = match_choice(reply, gold, ANIMALS)
        assert found.extracted == letter
        assert found.correct == (letter == gold)
        assert found.rule.startswith("choice.")


def test_choice_reads_the_option_text_before_a_leading_letter() -> None:
    keys = {"A": "C major", "B": "A minor", "C": "G major"}
    assert match_choice("C major", "A", keys).correct
    assert match_choice("A minor.", "B", keys).correct


def test_choice_numbers_are_whole_numbers() -> None:
    options = {"A": "5", "B": "3.5", "C": "15", "D": "-5"}
    assert match_choice("There are 15 of them", "C", options).extracted == "C"
    assert match_choice("about 3.5 in total", "B", options).extracted == "B"
    assert match_choice("it says 5 here", "A", options).extracted == "A"
    assert match_choice("it says -5 here", "D", options).extracted == "D"
    assert match_choice("it says 5.2 here", "A", options).extracted is None


def test_choice_chinese_options() -> None:
    options = {"A": "苹果", "B": "香蕉"}
    assert match_choice("图中是香蕉", "B", options).correct
    assert match_choice("不是香蕉", "B", options).extracted is None


def test_choice_more_than_four_options_and_no_answer_outside_them() -> None:
    options = dict(zip("ABCDEFG", "1234567", strict=True))
    assert match_choice("G", "G", options).correct
    assert match_choice("H", "G", options).rule == "choice.outside"


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Yes", "yes"), ("yes.", "yes"), ("YES!", "yes"), ("**Yes**", "yes"), ('"No"', "no"), ("no", "no"), ("No, it is not", "no"),
        ("Yes, but no cat is visible", "yes"), ("The answer is yes", "yes"), ("The answer is no.", "no"),
        ("There is no cat", "no"), ("是的", "yes"), ("不是", "no"), ("没有", "no"), ("否", "no"), ("Ｙｅｓ", "yes"), ("Nope", "no"),
        ("Not sure", None), ("None", None), ("notice the cat", None), ("I notice it", None), ("Eyes are visible", None), ("", None),
        ("Nothing", None), ("know", None), ("No idea", None), ("I have no idea", None), ("Yesterday", None), ("yes or no", None),
        ("It could be yes and it could be no", None), ("I cannot tell", None), ("I'm not sure, yes?", None), ("maybe", None),
        ("是否", None), ("不确定", None), ("N", None), ("It is not yes", None),
    ],
)  # fmt: skip
def test_yes_no(reply: str, value: str | None) -> None:
    for gold in ("Yes", "No"):
        found = match_yes_no(reply, gold)
        assert found.extracted == value
        assert found.correct == (value == gold.lower())


@pytest.mark.parametrize(
    ("reply", "gold", "right"),
    [
        ("7", "7", True), ("7.", "7", True), (" ７ ", "7", True), ("Seven", "seven", True), ("Hello,  World!", "hello world", True),
        ('"Hello"', "hello", True), ("don't", "dont", True), ("1,000", "1000", True), ("3.5", "35", False), ("-5", "5", False),
        ("12:30", "1230", False), ("12:30", "12:30", True), ("7 7", "77", False), ("seven", "7", False), ("hotdog", "dog", False),
        ("8", "7", False), ("", "7", False), ("2010", "2011", False), ("50%", "50", False), ("a-b", "a-b", True), ("?", "?", True),
        ("!", "?", False), ("e\u0301t\u00e9", "été", True), ("ﬁsh", "fish", True), ("Straße", "STRASSE", True), (".5", "5", False),
        ("\u200b7", "7", True), ("1,2", "12", False),
    ],
)  # fmt: skip
def test_reading(reply: str, gold: str, right: bool) -> None:
    assert match_reading(reply, [gold]).correct is right


def test_reading_empty_is_unparsed_and_any_of_several_answers_counts() -> None:
    assert match_reading("  ", ["7"]).extracted is None
    assert match_reading("...", ["7"]).extracted is None
    question = Question("1", "?", '["7", "seven"]')
    assert match("reading", "Seven", question).correct
    assert not match("reading", '["7", "seven"]', question).correct


def test_reading_number_words_only_when_asked() -> None:
    assert not match_reading("seven", ["7"]).correct
    assert match_reading("seven", ["7"], numbers=True).rule == "reading.number"
    assert match_reading("007", ["7"], numbers=True).correct
    assert match_reading("Twenty-one", ["21"], numbers=True).correct
    assert not match_reading("seventeen", ["7"], numbers=True).correct
    assert not match_reading("seven dogs", ["7"], numbers=True).correct


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("zero", 0), ("nineteen", 19), ("ninety nine", 99), ("one hundred and five", 105), ("two thousand three", 2003),
        ("three hundred thousand", 300_000), ("-2", -2), ("3.50", 3.5), ("五", 5), ("one two", None), ("twenty zero", None),
        ("hundred", None), ("and", None), ("", None), ("five and", None), ("one million two hundred", 1_000_200),
    ],
)  # fmt: skip
def test_number(text: str, value: float | None) -> None:
    assert number(text) == value


def test_normalise_is_idempotent() -> None:
    for text in ("Hello,  World!", "1,000.50", "St. John's", "(a) [b]", "12:30 p.m.", "ﬁ Ａ"):
        assert normalise(normalise(text)) == normalise(text)


def test_unknown_kind_lists_the_known() -> None:
    with pytest.raises(ValueError, match="reading, multiple_choice, yes_no"):
        match("essay", "x", Question("1", "?", "x"))


def test_environment_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERBOSE", "1")  # switches a rule off in VLMEvalKit
    assert match_choice("The answer is A", "A", ANIMALS).correct
