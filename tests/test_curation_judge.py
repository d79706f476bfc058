"""Layer `judge`: grammar verdicts, questions that need no image; over conversations, docqa pairs and captions."""

import pytest
from curation_world import chat, context, dataset, png, serving

from vlmflow.curation import judge
from vlmflow.curation.judge import Round, matcher, options_of, read_verdict
from vlmflow.dataset.layer import add_layer, read_layer
from vlmflow.dataset.sample import Sample
from vlmflow.errors import StepFailed

SPEC = {"model_name": "llm", "endpoint_env": "JUDGE_URL", "key_env": "K", "concurrency": 2, "failure_limit": 1.0}
CHOICE = "<image>\nWhich planet is largest?\nA. Mars\nB. Jupiter\nC. Venus\nAnswer with the letter."


def talk(key, *rounds):
    turns = [{"from": "system", "value": "be kind"}]
    for question, answer in rounds:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    about = [{"sha256": "", "width": 8, "height": 6, "format": "png"}]
    return Sample(
        key, {"text": f"alt of {key}", "images": about, "conversations": turns if rounds else None}, (png(1),)
    )


def words(body):
    return body["messages"][0]["content"]


def run(tmp_path, monkeypatch, says, samples, layer=None, **spec):
    data = dataset(tmp_path / "d", samples)
    if layer:
        name, schema, rows = layer
        data = add_layer(
            context(tmp_path), data, name, params={}, version=1, schema=schema, failure_limit=1.0,
            compute=lambda reader, _: [{"key": key, **rows[key]} for key in reader.keys()],
        )  # fmt: skip
    with serving(lambda body, n: chat(says(words(body)))) as (server, url):
        monkeypatch.setenv("JUDGE_URL", url)
        curation = {"judge": SPEC | spec}
        if spec.get("text") == "docqa":
            curation["docqa"] = {"model_name": "m"}
        sealed = judge.run(context(tmp_path, **curation), data)
    return read_layer(sealed, "judge"), sealed, server


def test_a_recipe_without_the_section_has_no_layer(tmp_path):
    data = dataset(tmp_path / "d", [talk("k", ("a?", "b"))])
    assert judge.run(context(tmp_path), data) is data


def test_grammar_of_conversations(tmp_path, monkeypatch):
    samples = [
        talk("k0", ("<image>What is it?", "A cat."), ("Sure?", "Yes.")),
        talk("k1", ("What?", "An cat were.")),
        talk("k2"),
    ]
    says = lambda text: "Yes: 'An cat were' is no sentence." if "An cat" in text else "No."  # noqa: E731
    rows, sealed, server = run(tmp_path, monkeypatch, says, samples)
    assert rows["k0"]["problems"] == [] and rows["k0"]["error"] is None
    assert rows["k1"]["problems"] == ["grammar: An cat were' is no sentence."]
    assert rows["k2"]["error"] == "upstream: the sample has no conversations"
    assert "Question: What is it?\nAnswer: A cat.\n\nQuestion: Sure?\nAnswer: Yes." in words(server.bodies[0])
    assert "be kind" not in words(server.bodies[0]) and len(server.bodies) == 2
    summary = sealed.layers["judge"].summary
    assert (summary["judged"], summary["problems"], summary["requests"]) == (2, {"grammar": 1}, 2)


def test_a_verdict_that_cannot_be_read_is_asked_for_once_more_then_counts_as_none(tmp_path, monkeypatch):
    rows, _, server = run(tmp_path, monkeypatch, lambda text: "Perhaps.", [talk("k0", ("What?", "A cat."))])
    assert rows["k0"]["error"].startswith("no verdict") and [b["seed"] for b in server.bodies] == [17, 18]
    with pytest.raises(StepFailed, match=r"curation.judge.failure_limit"):
        run(tmp_path, monkeypatch, lambda text: "Perhaps.", [talk("k0", ("What?", "A cat."))], failure_limit=0.5)


def knows(text):
    return "Jupiter" if "largest" in text else "7" if "days" in text else "unknown"


@pytest.mark.parametrize(("rounds", "asked", "needless"), [
    ([(CHOICE, "B")], 1, True),
    ([(CHOICE, "A")], 1, False),
    ([("<image>How many days has a week?", "seven")], 1, True),
    ([("<image>How many days has a week?", "7"), (CHOICE, "B. Jupiter")], 2, True),
    ([("<image>What colour is the car?", "red"), (CHOICE, "B")], 1, False),
    ([(CHOICE, "B"), ("<image>Describe it.", "A long and careful description of a planet.")], 0, False),
])  # fmt: skip
def test_questions_answered_rightly_without_the_image(tmp_path, monkeypatch, rounds, asked, needless):
    rows, sealed, server = run(tmp_path, monkeypatch, knows, [talk("k0", *rounds)], checks=["needs_image"])
    assert rows["k0"]["asked"] == len(server.bodies) == asked
    assert bool(rows["k0"]["problems"]) is needless
    if needless:
        assert rows["k0"]["problems"] == [f"needs no image: {asked} of {asked} answered without it"]
        assert sealed.layers["judge"].summary["problems"] == {"needs no image": 1}
    assert all("<image>" not in words(b) and isinstance(words(b), str) for b in server.bodies)


def test_the_same_question_of_many_samples_is_asked_once(tmp_path, monkeypatch):
    rows, _, server = run(
        tmp_path, monkeypatch, knows, [talk(f"k{i}", (CHOICE, "AB"[i % 2])) for i in range(8)], checks=["needs_image"]
    )
    assert len(server.bodies) == 1 and [bool(rows[f"k{i}"]["problems"]) for i in range(8)] == [False, True] * 4


def test_docqa_pairs_and_captions(tmp_path, monkeypatch):
    pairs = {
        "k0": {"pairs": [{"question": "How many days has a week?", "answer": "7"}]},
        "k1": {"pairs": []},
        "k2": {"error": "no pair left"},
    }
    samples = [talk(f"k{i}") for i in range(3)]
    says = lambda text: knows(text) if "cannot be known" in text else "no"  # noqa: E731
    layer = ("docqa", {"pairs": "json"}, pairs)
    rows, _, _ = run(tmp_path, monkeypatch, says, samples, layer, text="docqa", checks=["grammar", "needs_image"])
    assert rows["k0"]["problems"] == ["needs no image: 1 of 1 answered without it"] and rows["k0"]["requests"] == 2
    assert [rows[k]["error"] for k in ("k1", "k2")] == [
        "upstream: the sample has no docqa",
        "upstream: docqa: no pair left",
    ]
    layer = ("fused", {"text": "str"}, {"k0": {"text": "A cat"}, "k1": {"error": "x"}, "k2": {"text": "Cat a is"}})
    rows, _, server = run(
        tmp_path / "2", monkeypatch, lambda t: "yes, order" if "Cat a" in t else "no", samples, layer, text="fused"
    )
    assert rows["k2"]["problems"] == ["grammar: order"] and rows["k1"]["error"] == "upstream: fused: x"
    assert len(server.bodies) == 2 and words(server.bodies[0]).endswith("=\nA cat")
    rows, _, server = run(tmp_path / "3", monkeypatch, lambda t: "no", samples, text="alt")
    assert len(server.bodies) == 3


def test_what_decides_is_in_the_layers_name(tmp_path, monkeypatch):
    def digest(**spec):
        return run(tmp_path, monkeypatch, lambda t: "no", [talk("k0", ("a?", "b"))], **spec)[1].layers["judge"].digest

    same = digest()
    assert digest(concurrency=7, drop=False, price_in=1.0) == same
    assert len({same, digest(checks=["needs_image"]), digest(model_name="other"), digest(text="alt")}) == 4


@pytest.mark.parametrize(("reply", "verdict"), [
    ("no", (False, "not said")), ("No, it is fine.", (False, "it is fine.")), ("YES", (True, "not said")),
    ("**Yes**: a typo", (True, "a typo")), ("<think>yes yes</think>no", (False, "not said")),
    ("", None), ("Nothing is wrong", None), ("Yesterday", None), ("The text has no error", None),
])  # fmt: skip
def test_verdicts(reply, verdict):
    assert read_verdict(reply) == verdict


def test_options():
    assert options_of(CHOICE) == {"A": "Mars", "B": "Jupiter", "C": "Venus"}
    assert options_of("Which? (A) red (B) dark blue") == {"A": "red", "B": "dark blue"}
    assert options_of("Who is J. Smith?") == options_of("Vitamin A. What?") == {}


@pytest.mark.parametrize(("question", "answer", "reply", "right"), [
    ("Is it?", "Yes.", "yes, it is", True), ("Is it?", "No", "yes", False), ("How many?", "1,000", "1000", True),
    ("Who?", "Ada Lovelace", "ada lovelace.", True), ("Who?", "Ada Lovelace", "unknown", False),
])  # fmt: skip
def test_answers_are_compared_as_in_evaluation(question, answer, reply, right):
    assert matcher(Round(question, answer))(reply) is right


@pytest.mark.parametrize("answer", ["", "...", "It is a long answer with many words.", "x" * 41])
def test_answers_that_cannot_be_compared_are_not_asked(answer):
    assert matcher(Round("What?", answer)) is None
