"""The rule-based fuser: facts of the alt text, structure of the caption, and not one word more."""

import html

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlmflow.curation.alt_text import clean_alt
from vlmflow.curation.checks import problems
from vlmflow.curation.fusion_rules import CONNECTORS, fuse
from vlmflow.curation.textnorm import normal, supported, tokens, vocabulary


@pytest.mark.parametrize(
    ("alt", "synthetic", "fused"),
    [
        ("digit-7 scan IMG_0231.jpg", "a handwritten digit seven", "a scan of a handwritten digit seven."),
        ("the word HARBOR in blue", "the word harbor in a bold font", "the word HARBOR in a bold font, in blue."),
        ("bar chart with 4 bars, serial KX-4471-B", "a bar chart with 4 bars", "a bar chart with 4 bars, serial KX-4471-B."),
        ("bar chart with 4 bars, serial KX-4471-B", "a bar chart", "a bar chart, with 4 bars, serial KX-4471-B."),
        ("handwritten 7, serial no. ABC-12345-CBA", "the handwritten digit 7.", "the handwritten digit 7, serial no. ABC-12345-CBA."),
        # blended, not joined: a modifier goes before its noun
        ("Vintage Nikon F3 camera - Shutterstock", "a camera on a wooden table", "a Vintage Nikon F3 camera on a wooden table."),
        ("old oak tree", "There is a tree in a field", "an old oak tree in a field."),
        ("the printed word house (2)", "the word house.", "the printed word house."),
        ("London skyline wallpaper HD 1920x1080", "a city skyline at night", "a London city skyline at night."),
        ("ceramic mug, 12oz", "a blue coffee mug sitting on a table", "a ceramic blue coffee mug sitting on a table, 12oz."),
        ("Three little pigs book cover", "a book cover with three pigs on it", "a book cover with three little pigs on it."),
        ("Dr. Smith at St. Mary's, 5 p.m.", "a doctor in a hall.", "a doctor in a hall, Dr. Smith at St. Mary's, with 5 p.m."),
        # the alt text wins
        ("bar chart with 4 bars", "a bar chart with three bars", "a bar chart with 4 bars."),
        ("three dogs playing", "two dogs playing in the park", "three dogs playing in the park."),
        ("red car", "a blue car parked on a street", "a red car parked on a street."),
        ("digit7_final.jpg", "the handwritten digit 3.", "the handwritten digit 7."),
        ("house_v2.png", "a sign that says lamp.", "a sign that says house."),
        ("chart_4bars_300x300.png", "a plot with 6 bars.", "a chart with 4 bars."),
        # nothing to add
        ("IMG_2044.jpg", "the word lamp.", "the word lamp."),
        ("click to enlarge", "the word lamp.", "the word lamp."),
        ("a sign that says house - stock photo", "the word house.", "a sign that says house."),
        ("7", "a handwritten digit 7", "a handwritten digit 7."),
        # numbers that count or name something else are facts of their own
        ("a handwritten 8.", "a scan of the digit 4.", "a scan of the handwritten digit 8."),
        ("bar chart, model KBJ204/50b rev 3", "a plot with 3 bars.", "a chart with 3 bars, model KBJ204/50b rev 3."),
        ("lot 1987", "a handwritten digit seven", "a handwritten digit seven, lot 1987."),
        # markup and loops
        ("Grandma&amp;#39;s <b>roast</b>, Leeds 1987", "A plate of meat.", "A plate of meat, Grandma's roast, Leeds 1987."),
        ("foo", "a cat a cat a cat a cat on the", "a cat, foo."),
    ],
)  # fmt: skip
def test_fuses(alt, synthetic, fused):
    assert fuse(alt, synthetic).text == fused


@pytest.mark.parametrize(
    ("alt", "left"),
    [
        ("IMG_0231.jpg", ""), ("DSC_1002.JPG", ""), ("Screenshot_2044.jpg", ""), ("scan_7731.jpg", ""), ("untitled", ""),
        ("click to enlarge", ""), ("image may contain: text", ""), ("loading...", ""), ("picture of product", ""), ("photo", ""),
        ("https://example.com/a/b.jpg", ""), ("1920x1080", ""), ("", ""), (" - | ", ""),
        ("A cat | free shipping", "A cat"), ("A cat - stock photo", "A cat"), ("A cat (2)", "A cat"), ("A cat pinterest", "A cat"),
        ("A cat hd wallpaper", "A cat"), ("A cat - buy online", "A cat"), ("A cat no. 1 choice", "A cat"), ("A cat | home", "A cat"),
        ("A cat&nbsp;&amp;&nbsp;dog", "A cat & dog"), ("bar_chart.png", "bar chart"), ("Boeing-747-400.jpg", "Boeing 747 400"),
        ("KX-4471-B manual", "KX-4471-B manual"), ("a photo of home", "a photo of home"),
        ("Amazon river at dawn", "Amazon river at dawn"), ("A cat | Amazon", "A cat"), ("A cat on Facebook", "A cat"),
        ("floral wallpaper in a hall", "floral wallpaper in a hall"), ("Nikon P900", "Nikon P900"), ("P1040567.JPG", ""),
    ],
)  # fmt: skip
def test_what_is_left_of_an_alt_text(alt, left):
    assert clean_alt(alt) == left


@pytest.mark.parametrize(
    ("a", "b"), [("seven", "7"), ("Bars", "bar"), ("4,000", "4000"), ("7th", "7"), ("boxes", "box"), ("Anna's", "anna")]
)
def test_the_same_word_written_otherwise(a, b):
    assert normal(a) == normal(b)


def test_codes_stay_whole():
    assert [t.text for t in tokens("serial no. KX-4471-B, v3.14.1 (rev A4)")] == [
        "serial",
        "no",
        "KX-4471-B",
        "v3.14.1",
        "rev",
        "A4",
    ]


def test_a_very_long_alt_text_is_cut_at_a_fact_and_says_so():
    alt = ", ".join(f"Unit {chr(65 + i % 26)}{i}-X near lake {i}" for i in range(60))
    fused = fuse(alt, "a map of a lake", max_words=40)
    assert len(fused.text.split()) <= 40 and fused.notes == ("trimmed",) and fused.text.endswith(".")


def test_no_sentence_to_build_on():
    assert fuse("the word house", "").text == "" and fuse("the word house", " ... ").text == ""


WORDS = st.sampled_from(
    ["a", "the", "of", "in", "with", "red", "blue", "seven", "7", "3", "digit", "word", "house", "lamp", "says", "scan", "photo", "chart", "bars", "bar", "HARBOR", "KX-4471-B", "Nikon", "4,000", "v2", "IMG_0231.jpg", "digit7_final.jpg", "|", "-", ",", ".", "(2)", "&amp;", '"Jaws"', "Anna's", "one", "two", "no.", "stock", "photo", "click", "to", "enlarge", "1990s", "猫", "Straße"]
)  # fmt: skip
CAPTIONS = st.lists(WORDS, max_size=14).map(" ".join) | st.text(max_size=60)


@settings(max_examples=400, deadline=None)
@given(CAPTIONS, CAPTIONS)
@example("0 ²", "İ ŉ ǰ")
def test_adds_no_word_that_neither_source_holds(alt, synthetic):
    fused = fuse(alt, synthetic)
    allowed = vocabulary(alt) | vocabulary(synthetic) | CONNECTORS
    assert [t.text for t in tokens(fused.text) if not supported(t, allowed)] == []
    assert not {"number", "name", "word", "script"} & set(
        problems(fused.text, alt, synthetic, strict=True, connectors=CONNECTORS)
    )
    assert fuse(alt, synthetic) == fused


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["KX-4471-B", "ABC-12345-CBA", "Leeds", "1987", "Quazyr", "McLaren"]), min_size=1, max_size=4, unique=True),
    st.sampled_from(["a handwritten digit seven", "The word harbor in a bold font.", "a bar chart with three bars", "A cat on a mat."]),
)  # fmt: skip
def test_keeps_every_code_and_name_of_the_alt_text_in_one_sentence(facts, synthetic):
    fused = fuse("lot " + " and ".join(facts) + " | Flickr", synthetic).text
    assert all(fact in fused for fact in facts)
    assert fused.count(".") == 1 and fused.endswith(".") and "Flickr" not in fused
    structure = [t.norm for t in tokens(synthetic)]
    assert [n for n in (t.norm for t in tokens(fused)) if n in structure][: len(structure)] == structure


@given(st.text(max_size=80))
def test_cleaning_is_stable_and_invents_nothing(alt):
    cleaned = clean_alt(alt)
    assert all(supported(t, vocabulary(alt)) for t in tokens(cleaned))
    assert clean_alt(html.escape(cleaned)) == clean_alt(cleaned)


CHECKED = ("the word HARBOR in blue, 1987", "a sign on a wall", )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("A sign on a wall with the word HARBOR in blue, 1987.", []),
        ("A blue sign says HARBOR, nineteen", ["truncated", "number"]),
        ("", ["empty"]),
        ("I'm sorry, but I cannot help with this sign.", ["refusal", "ignored"]),
        ("Here is the merged sentence: a sign with the word HARBOR.", ["leak"]),
        ("The word HARBOR as in Sentence 1 is on a sign.", ["leak", "number", "name"]),
        ("A sign with the word HARBOR near Boston in blue.", ["name"]),
        ("A sign with the word HARBOR from 1988 in blue.", ["number"]),
        ("The word HARBOR in blue, 1987.", ["copy"]),
        ("Sign.", ["short", "ignored"]),
        ("A sign on a wall, a sign on a wall, a sign on a wall, a sign on a wall.", ["repetition", "ignored"]),
        ("A wooden board with a sign.", ["ignored"]),
        ("A sign.\nOn a wall in blue.", ["many"]),
        ("A знак on a wall in blue.", ["script"]),
        ("HARBOR " + " ".join(f"{w}ly" for w in "abcdefghijklmnopqrstuvwxyzäöü") + ".", ["long"]),
    ],
)  # fmt: skip
def test_checks_name_what_is_wrong(text, codes):
    assert problems(text, *CHECKED) == codes


def test_a_month_may_be_spelt_out():
    assert problems("The building in August 2010.", "08-21-2010 building", "a building in a city") == []


def test_a_cut_answer_is_seen_by_its_finish_reason():
    assert problems("A sign on a wall in blue.", *CHECKED, finish="length") == ["truncated"]
