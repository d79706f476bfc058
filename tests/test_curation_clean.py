"""clean: each check with its reason, on the text that the recipe names, and what is told about the text."""

import pytest
from curation_world import context, dataset, png, seal_layer
from pydantic import ValidationError

from vlmflow.curation import clean, phash
from vlmflow.curation.language import language
from vlmflow.curation.objects import main_object
from vlmflow.curation.repetition import repetition
from vlmflow.curation.words import words
from vlmflow.dataset.layer import read_layer
from vlmflow.dataset.sample import Sample
from vlmflow.errors import DataError


def sample(key, text=None, size=(80, 60), turns=(), image=png(1), images=1):
    meta = {"text": text, "images": [{"format": "png", "width": size[0], "height": size[1]}] * images}
    if turns:
        meta["conversations"] = [{"from": "human", "value": t} for t in turns]
    return Sample(key, meta, (image,) * images)


def run(folder, samples, fused=None, **spec):
    ctx = context(folder, clean={"text": "alt", **spec})
    data = phash.run(ctx, dataset(folder / "d", samples))
    if fused:
        rows = {key: {"key": key, "text": text, "error": error} for key, (text, error) in fused.items()}
        data = seal_layer(ctx, data, "fused", params={}, version=1, schema={"text": "str"}, rows=rows)
    sealed = clean.run(ctx, data)
    return sealed.layers["clean"].summary, read_layer(sealed, "clean")


def test_each_check_names_its_numbers(tmp_path):
    long = " ".join(f"word{n}" for n in range(21))
    samples = [
        sample("good", "A dog on the grass"),
        sample("small", "A dog on the grass", (80, 19)),
        sample("strip", "A dog on the grass", (824, 20)),
        sample("none", "..."),
        sample("short", "dog here"),
        sample("long", long),
        sample("german", "Der Hund und die Katze auf der Wiese"),
        sample("untold", "Nike Air Max"),
        sample("again", "buy now! buy now! buy now! buy now!"),
        sample("token", "A dog on the <|im_end|> grass"),
        sample("place", "<image> A dog on the grass"),
        sample("broken", "A dog on the grass", image=png(1)[:50]),
        sample("two", "A dog on the grass", (80, 10), images=2),
    ]
    summary, rows = run(tmp_path, samples, min_side=20, min_words=3, max_words=20, languages=["en", "fr"])
    assert {key: row["problems"] for key, row in rows.items() if row["problems"]} == {
        "small": ["side 19 < 20"], "strip": ["aspect 41.2 > 30"], "none": ["empty"], "short": ["words 2 < 3"],
        "long": ["words 21 > 20"], "german": ["language de is not en or fr"], "again": ["repetition 0.65 > 0.5"],
        "token": ["token <|im_end|>"], "place": ["token <image>"],
        "broken": ["image: image cannot be decoded (OSError)"], "two": ["side 10 < 20 (image 0)", "side 10 < 20 (image 1)"],
    }  # fmt: skip
    assert summary["dropped"] == 11 and dict(summary["problems"])["side"] == 3
    assert set(dict(summary["problems"])) == set(clean.CODES)
    assert dict(summary["languages"])["de"] == 1 and dict(summary["objects"])["animal"] >= 5
    assert rows["untold"]["language"] is None and rows["good"]["words"] == 5


def test_conversations_are_the_text_of_samples_that_have_them_and_their_image_marks_are_legal(tmp_path):
    samples = [
        sample("a", turns=["<image>\nWhat is it?", "A dog."]), sample("b", turns=["<image>\nWhat?", "</s> a dog"]),
        sample("c", "", turns=["<image>", "  "]),
    ]  # fmt: skip
    _, rows = run(tmp_path, samples)
    assert [rows[k]["problems"] for k in "abc"] == [[], ["token </s>"], ["empty"]]


def test_a_text_that_an_earlier_step_could_not_write_is_no_problem_and_no_text_checks_images_alone(tmp_path):
    samples = [sample("a", "..."), sample("b", "A dog", (1, 100))]
    _, rows = run(tmp_path / "fused", samples, text="fused", fused={"a": (None, "broken"), "b": ("A tree", None)})
    assert rows["a"]["problems"] == [] and rows["a"]["words"] is None and rows["b"]["object"] == "plant"
    _, rows = run(tmp_path / "none", samples, text=None)
    assert rows["a"]["problems"] == [] and rows["b"]["problems"] == ["aspect 100.0 > 30"]
    with pytest.raises(DataError, match="no layer 'fused'"):
        run(tmp_path / "missing", samples, text="fused")
    with pytest.raises(ValidationError, match="min_words 9 is above max_words 3"):
        run(tmp_path / "bad", samples, min_words=9, max_words=3)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("A man is riding a horse on the beach", "en"), ("Ein Mann reitet auf einem Pferd am Strand", "de"),
        ("Un homme monte un cheval sur la plage", "fr"), ("Un hombre monta a caballo por la playa con su perro", "es"),
        ("Un uomo va a cavallo sulla spiaggia con il cane", "it"), ("Um homem anda a cavalo na praia", "pt"),
        ("Een man rijdt op een paard langs het strand", "nl"), ("Mężczyzna jedzie na koniu po plaży", "pl"),
        ("一个男人在海滩上骑马", "zh"), ("男が海辺で馬に乗っている", "ja"), ("남자가 해변에서 말을 타고 있다", "ko"),
        ("мужчина едет на лошади", "ru"), ("чоловік їде на коні біля її дому", "uk"), ("رجل يركب حصانا", "ar"),
        ("مردی در کنار پنجره", "fa"), ("Nike Air Max 97", None), ("", None), ("42 17", None),
    ],
)  # fmt: skip
def test_language(text, code):
    assert language(text) == code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man riding a horse", "person"), ("two cats beside a woman", "animal"), ("a hot dog with mustard", "food"),
        ("an orange cat", "animal"), ("an orange", "food"), ("the word 'seven' in red", "text"), ("a red bus in a city", "other"),
        ("an old church with a garden", "building"), ("white roses", "plant"), ("", "other"), ("42", "other"),
    ],
)  # fmt: skip
def test_main_object(text, expected):
    assert main_object(text) == expected


def test_words_and_repetition():
    assert words("The man's Café, 3.5 km!") == ["the", "man's", "café", "3", "5", "km"]
    assert words("一只dog跑") == ["一", "只", "dog", "跑"]
    assert repetition("abcdefghij") == 0 and repetition("short") == 0 and repetition("abc " * 50) > 0.9
