"""Layer `docqa`: replies read strictly but robustly, filters each with its count, styles drawn by key."""

import json
from collections import Counter

import pytest
from curation_world import chat, context, dataset, impatient, png, sample, serving

from vlmflow.curation import docqa, prompts
from vlmflow.curation.docqa_text import REASONS, read, sift, unsupported
from vlmflow.curation.textnorm import vocabulary
from vlmflow.dataset.layer import add_layer, read_layer
from vlmflow.errors import DataError, ServiceError, StepFailed

SPEC = {"model_name": "llm", "endpoint_env": "QA_URL", "key_env": "QA_KEY", "failure_limit": 1.0, "concurrency": 2}
PAGE = """Invoice No. KX-4471 of 21 August 2021
Acme Instruments Ltd., Leeds
Total due: 1,250.00 EUR within 30 days
Paymentterms: bank transfer only; signed by Maria Lopez"""
GOOD = [
    {"question": "What is the number of the invoice?", "answer": "KX-4471"},
    {"question": "Who signed?", "answer": "Maria Lopez"},
    {"question": "What is due?", "answer": "A total of 1250.00 EUR is due within 30 days."},
]


def reply(pairs):
    return lambda body, n: chat(json.dumps(pairs))


def with_ocr(tmp_path, pages):
    """A dataset whose `ocr` layer holds these texts; None = a page that could not be read."""
    data = dataset(tmp_path / "d", [sample(f"k{i}", None, png(i)) for i in range(len(pages))])
    rows = [
        {"key": f"k{i}", "text": page} if page is not None else {"key": f"k{i}", "error": "cannot be decoded"}
        for i, page in enumerate(pages)
    ]
    return add_layer(
        context(tmp_path), data, "ocr", params={}, version=1, schema={"text": "str"}, failure_limit=1.0,
        compute=lambda reader, _: [row for row in rows if row["key"] in reader.index],
    )  # fmt: skip


def run(tmp_path, monkeypatch, says, pages=(PAGE,), **spec):
    with serving(says) as (server, url):
        monkeypatch.setenv("QA_URL", url)
        sealed = docqa.run(context(tmp_path, docqa=SPEC | spec), with_ocr(tmp_path, pages))
    return read_layer(sealed, "docqa"), sealed, server


def test_a_recipe_without_the_section_has_no_layer_and_the_step_needs_ocr(tmp_path):
    data = dataset(tmp_path / "d", [sample("k", None, png(1))])
    assert docqa.run(context(tmp_path), data) is data
    with pytest.raises(DataError, match="has no layer 'ocr'"):
        docqa.run(context(tmp_path, docqa=SPEC), data)


def test_pairs_of_a_page(tmp_path, monkeypatch):
    rows, sealed, server = run(tmp_path, monkeypatch, reply(GOOD), [PAGE, "short", "", None, PAGE + "\nend"])
    assert rows["k0"]["pairs"] == GOOD and rows["k0"]["dropped"] == {} and rows["k0"]["error"] is None
    assert rows["k1"] == rows["k1"] | {"pairs": [], "note": "5 characters < 80", "error": None, "style": None}
    assert rows["k3"]["error"] == "upstream: ocr: cannot be decoded"
    assert len(server.bodies) == 2 and PAGE in server.bodies[0]["messages"][0]["content"]
    summary = sealed.layers["docqa"].summary
    assert (summary["pairs"], summary["pages_without_text"], summary["dropped_share"]) == (6, 2, 0.0)
    assert sum(s["pages"] for s in summary["styles"].values()) == 2 and summary["requests"] == 2


def test_styles_are_drawn_by_key_and_seed(tmp_path):
    drawn = Counter(docqa.style_of(f"k{i}", 1) for i in range(500))
    assert set(drawn) == set(prompts.DOCQA_STYLES) and min(drawn.values()) > 60
    assert [docqa.style_of(f"k{i}", 1) for i in range(20)] != [docqa.style_of(f"k{i}", 2) for i in range(20)]


def test_long_pages_are_cut_at_a_line():
    assert docqa.cut("one\ntwo\nthree", 9) == "one\ntwo" and docqa.cut("one\ntwo\nthree", 7) == "one\ntwo"
    assert docqa.cut("abcdefgh", 5) == "abcde" and docqa.cut("abc", 5) == "abc"


DROPPED = [
    ({"question": "What is <image> the total?", "answer": "1250.00"}, "image_token"),
    ({"question": "What is the total?", "answer": "1250.00 <|image_pad|>"}, "image_token"),
    ({"question": "What is the total?", "answer": "<fake_token_around_image><global-img>"}, "image_token"),
    ({"question": "How do I print it?", "answer": "print(total)"}, "code"),
    ({"question": "What is it?", "answer": "function total() { return x; }"}, "code"),
    ({"question": "What is it?", "answer": "<div class='x'>due</div>"}, "code"),
    ({"question": "Who delivered it?", "answer": "Unanswerable"}, "unanswerable"),
    ({"question": "Who delivered it?", "answer": "The page does not mention who delivered it."}, "unanswerable"),
    ({"question": "Who delivered it?", "answer": "I'm sorry, I cannot help with that."}, "unanswerable"),
    ({"question": "Who delivered it?", "answer": "N/A"}, "unanswerable"),
    ({"question": "What is due?", "answer": "The total is due. " * 40}, "long"),
    ({"question": "What is due? " * 50, "answer": "1250.00"}, "long"),
    ({"question": "Which number?", "answer": "KX-4472"}, "hallucinated"),
    ({"question": "What is due?", "answer": "1,350.00 EUR"}, "hallucinated"),
    ({"question": "Who signed?", "answer": "John Miller"}, "hallucinated"),
    ({"question": "Where?", "answer": "The firm sits in London."}, "hallucinated"),
    ({"question": "WHO SIGNED", "answer": "Lopez"}, "duplicate"),
    ({"question": "Who signed it?"}, "malformed"),
    ({"question": "Who signed it?", "answer": None}, "malformed"),
    ({"question": "...", "answer": "Lopez"}, "malformed"),
]


@pytest.mark.parametrize(("pair", "reason"), DROPPED, ids=[f"{r}-{i}" for i, (_, r) in enumerate(DROPPED)])
def test_each_filter_drops_and_counts(tmp_path, monkeypatch, pair, reason):
    rows, sealed, _ = run(tmp_path, monkeypatch, reply([*GOOD, pair]))
    assert rows["k0"]["pairs"] == GOOD and rows["k0"]["dropped"] == {reason: 1}
    assert sealed.layers["docqa"].summary["dropped"] == {reason: 1}


def test_every_reason_is_tested():
    assert {reason for _, reason in DROPPED} == set(REASONS)


@pytest.mark.parametrize("answer", [
    "Leeds", "Acme Instruments Ltd.", "Payment terms are bank transfer.", "1250 EUR", "€1,250.00", "21",
    "Two people are named.", "The invoice of August 21, 2021 is due in 30 days.", "Yes, by Maria Lopez.", "PaymentTerms",
])  # fmt: skip
def test_what_the_page_bears_out_is_no_hallucination(answer):
    squeezed = "".join(c for c in PAGE.casefold() if c.isalnum())
    assert unsupported(answer, vocabulary(PAGE), squeezed) == []


FORMS = {
    "list": json.dumps(GOOD),
    "fenced": "Here you are:\n```json\n" + json.dumps(GOOD, indent=1) + "\n```\nDone.",
    "wrapped": json.dumps({"pairs": GOOD}),
    "nested": json.dumps({"page": 1, "qa": [{"Question": p["question"], "Answer": p["answer"]} for p in GOOD]}),
    "lines": "\n".join(json.dumps(p) for p in GOOD),
    "cut off": json.dumps([*GOOD, GOOD[0]])[:-12],
    "trailing comma": json.dumps(GOOD)[:-1] + ",]",
    "labels": "\n\n".join(f"Q: {p['question']}\nA: {p['answer']}" for p in GOOD),
    "numbered": "\n".join(
        f"{i}. **Question:** {p['question']}\n   **Answer:** {p['answer']}" for i, p in enumerate(GOOD, 1)
    ),
    "Q1": "\n".join(f"Q{i}: {p['question']}\nA{i}: {p['answer']}" for i, p in enumerate(GOOD, 1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_replies_are_read_in_the_forms_that_models_write(form):
    pairs, _ = read(FORMS[form])
    assert pairs == GOOD


@pytest.mark.parametrize(
    "text", ["", "I cannot do that.", "{", "[" * 5000, '{"question": ', "[1, 2]", "null", '["Q", "A"]', "Question?"]
)
def test_what_holds_no_pair_gives_none(text):
    assert read(text)[0] == []


def test_numbers_as_answers_are_texts_and_a_second_line_goes_on():
    assert read('[{"question": "How much?", "answer": 1250}]')[0] == [{"question": "How much?", "answer": "1250"}]
    assert read("Q: How\nmuch?\nA: 12\n50\n\nThat is all.")[0] == [{"question": "How much?", "answer": "12 50"}]


def test_no_pair_left_is_asked_for_once_more_and_then_a_failure_with_reasons(tmp_path, monkeypatch):
    bad = [{"question": "Who?", "answer": "unanswerable"}, {"question": "Where?", "answer": "Paris"}]
    rows, _, server = run(tmp_path, monkeypatch, lambda body, n: chat(json.dumps(bad if n == 1 else GOOD)))
    assert rows["k0"]["pairs"] == GOOD and rows["k0"]["dropped"] == {"unanswerable": 1, "hallucinated": 1}
    assert [b["seed"] for b in server.bodies] == [17, 18] and rows["k0"]["requests"] == 2
    rows, _, _ = run(tmp_path / "2", monkeypatch, reply(bad))
    assert rows["k0"]["error"] == "no pair left: hallucinated, unanswerable" and rows["k0"]["pairs"] == []
    with pytest.raises(StepFailed, match=r"curation.docqa.failure_limit.*1 x no pair left: the reply holds none"):
        run(tmp_path / "3", monkeypatch, lambda body, n: chat("Sorry."), failure_limit=0.5)


def test_a_sick_server_leaves_no_failures_behind(tmp_path, monkeypatch):
    from aiohttp import web

    impatient(monkeypatch, attempts=2)
    sick = lambda body, n: chat(json.dumps(GOOD)) if n == 1 else web.Response(status=500)  # noqa: E731
    pages = [PAGE, PAGE + "\n2", PAGE + "\n3"]
    with pytest.raises(ServiceError, match="2 of 3 requests"):
        run(tmp_path, monkeypatch, sick, pages, failure_limit=0.3, concurrency=1)
    rows, _, server = run(tmp_path, monkeypatch, reply(GOOD), pages, failure_limit=0.3)
    assert len(server.bodies) == 2 and all(row["error"] is None for row in rows.values())


def test_pairs_are_dropped_in_a_fixed_order():
    both = [{"question": "Who is <image>?", "answer": "unanswerable"}]
    assert sift(both, PAGE, 500)[1] == {"image_token": 1}
