"""Layer `described`: describe, continue, repair, reject; every sample accounted for, by either engine."""

from types import SimpleNamespace

import pytest
from curation_world import MODEL, chat, context, dataset, png, sample, serving

from vlmflow.curation import caption, describe
from vlmflow.curation.long_text import finished, joined, length, problems, repair_problems
from vlmflow.dataset.layer import read_layer
from vlmflow.errors import RecipeError, StepFailed

SPEC = {
    "engine": "openai", "model_name": "vlm", "endpoint_env": "SEE_URL", "key_env": "K", "min_tokens": 12, "concurrency": 3,
    "repair_endpoint_env": "MEND_URL", "repair_key_env": "K", "repair_model_name": "llm", "failure_limit": 1.0,
}  # fmt: skip
LONG = "A red square stands on a white table. Beside it lies a small blue pencil."


def run(tmp_path, monkeypatch, see, mend=None, n=1, **spec):
    """(rows, manifest, what the describer was asked, what the repairer was asked)."""
    data = dataset(tmp_path / "d", [sample(f"k{i}", None, png(10 + i)) for i in range(n)])
    mend = mend or (lambda body, n: chat(asked(body).rpartition("\n\n")[2]))
    with serving(see) as (seer, url), serving(mend) as (mender, other):
        monkeypatch.setenv("SEE_URL", url)
        monkeypatch.setenv("MEND_URL", other)
        sealed = describe.run(context(tmp_path, describe=SPEC | spec), data)
    return read_layer(sealed, "described"), sealed, seer.bodies, mender.bodies


def asked(body):
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def test_a_recipe_without_the_section_has_no_layer(tmp_path):
    data = dataset(tmp_path / "d", [sample("k", None, png(1))])
    assert describe.run(context(tmp_path), data) is data


def test_a_long_description_is_repaired_once_and_kept(tmp_path, monkeypatch):
    rows, sealed, seen, mended = run(tmp_path, monkeypatch, lambda body, n: chat(LONG), n=2)
    assert rows["k0"] == rows["k0"] | {
        "text": LONG, "rounds": 1, "tokens": 17, "problems": [], "error": None, "requests": 1, "repair_requests": 1,
    }  # fmt: skip
    assert (
        rows["k1"]["requests"] == 1 and rows["k1"]["repair_requests"] == 0
    )  # another picture, the same words to repair
    assert len(seen) == 2 and len(mended) == 1 and mended[0]["model"] == "llm"
    summary = sealed.layers["described"].summary
    assert (summary["described"], summary["mean_tokens"], summary["rounds"]) == (2, 17.0, {"1": 2})
    assert summary["repair_prompt_tokens"] == 11 and summary["prompt_tokens"] == 22


def test_a_short_description_goes_on_and_what_it_says_again_is_left_out(tmp_path, monkeypatch):
    def see(body, n):
        if "so far" not in asked(body):
            return chat("A red square stands on a white table.")
        assert "A red square stands on a white table." in asked(body) and len(body["messages"][0]["content"]) == 2
        return chat("on a white table. Beside it lies a small blue pencil.")

    rows, _, seen, _ = run(tmp_path, monkeypatch, see)
    assert rows["k0"]["text"] == LONG and rows["k0"]["rounds"] == 2 and len(seen) == 2


@pytest.mark.parametrize(("more", "rounds"), [("", 2), ("I'm sorry, I have nothing to add.", 2), ("A cup.", 3)])
def test_what_stays_short_is_rejected_before_a_repair_is_paid(tmp_path, monkeypatch, more, rounds):
    rows, _, _, mended = run(
        tmp_path, monkeypatch, lambda body, n: chat(more if "so far" in asked(body) else "A red square.")
    )
    assert rows["k0"]["error"] == "rejected: short" and rows["k0"]["rounds"] == rounds and not mended


@pytest.mark.parametrize(
    "says",
    ["I'm sorry, but I cannot see the image.", "As an AI language model I do not see.", "My apologies, I erred."],
)
def test_apologies_are_no_description(tmp_path, monkeypatch, says):
    rows, _, _, mended = run(tmp_path, monkeypatch, lambda body, n: chat(says))
    assert rows["k0"]["error"] == "the model refused to describe the image" and not mended


def test_a_repair_mends_repetition_garbage_and_the_unfinished_end(tmp_path, monkeypatch):
    draft = f"{LONG} Beside it lies a small blue pencil. \ufffd\ufffd\ufffd The pencil"
    rows, sealed, _, _ = run(tmp_path, monkeypatch, lambda body, n: chat(draft, "length"), lambda body, n: chat(LONG))
    assert rows["k0"]["text"] == LONG and rows["k0"]["problems"] == ["repetition", "garbage", "truncated"]
    assert sealed.layers["described"].summary["mended"] == {"garbage": 1, "repetition": 1, "truncated": 1}


@pytest.mark.parametrize(("repaired", "code"), [
    (LONG.replace("table", "table in Paris beside the Eiffel tower by night"), "added"),
    (LONG.replace("a small", "7 small"), "added"),
    ("A red square stands.", "shrunk"),
    ("I apologize, I cannot correct this.", "refusal"),
    ("Here is the corrected description: " + LONG, "leak"),
    (LONG[:-8], "truncated"),
])  # fmt: skip
def test_a_repair_that_does_something_else_is_asked_for_once_more_then_rejected(tmp_path, monkeypatch, repaired, code):
    rows, _, _, mended = run(tmp_path, monkeypatch, lambda body, n: chat(LONG), lambda body, n: chat(repaired))
    assert rows["k0"]["error"].startswith("rejected: repaired twice: ") and code in rows["k0"]["problems"]
    assert rows["k0"]["text"] is None and len(mended) == 2 and "rejected (" in asked(mended[1])
    rows, _, _, _ = run(
        tmp_path / "2", monkeypatch, lambda body, n: chat(LONG),
        lambda body, n: chat(LONG if "rejected (" in asked(body) else repaired),
    )  # fmt: skip
    assert rows["k0"]["text"] == LONG and rows["k0"]["repair_requests"] == 2


def test_without_repair_the_unfinished_end_is_cut(tmp_path, monkeypatch):
    rows, _, _, mended = run(tmp_path, monkeypatch, lambda body, n: chat(LONG + " The pencil", "length"), repair=False)
    assert rows["k0"]["text"] == LONG and rows["k0"]["problems"] == ["truncated"] and not mended
    assert "repair_requests" not in rows["k0"]


def test_too_many_rejections_stop_the_step(tmp_path, monkeypatch):
    with pytest.raises(StepFailed, match=r"1 of 1 samples failed.*curation.describe.failure_limit.*rejected: short"):
        run(tmp_path, monkeypatch, lambda body, n: chat("Red."), failure_limit=0.5)


class Seer:
    """A local model: the first answer is short for odd pictures, the second round adds a sentence."""

    def __init__(self):
        self.batches = []

    def generate(self, requests, max_new_tokens, batch):
        self.batches.append(len(requests))
        return [SimpleNamespace(text=self.write(r), finish="stop") for r in requests]

    def write(self, request):
        if "so far" in request.prompt:
            return "Beside it lies a small blue pencil."
        odd = request.images[0].getpixel((0, 0))[0] % 2
        return "A red square stands on a white table." if odd else LONG


@pytest.mark.parametrize("repair", [False, True])
def test_a_local_model_describes_in_batches_and_continues_only_what_is_short(tmp_path, monkeypatch, repair):
    seer = Seer()
    monkeypatch.setattr(caption.Lazy, "__call__", lambda self: seer)
    samples = [sample(f"k{i}", None, png(10 + i)) for i in range(6)] + [sample("k6", None, png(3)[:30])]
    data = dataset(tmp_path / "d", samples, per_shard=7)
    spec = SPEC | {"engine": "model", "repair": repair, "concurrency": 2}
    with serving(lambda body, n: chat(asked(body).rpartition("\n\n")[2])) as (server, url):
        monkeypatch.setenv("MEND_URL", url)
        sealed = describe.run(context(tmp_path, describe=spec), data, MODEL)
    rows = read_layer(sealed, "described")
    assert [rows[f"k{i}"]["text"] for i in range(6)] == [LONG] * 6
    assert [rows[f"k{i}"]["rounds"] for i in range(6)] == [1, 2, 1, 2, 1, 2] and seer.batches == [6, 3]
    assert rows["k6"]["error"].startswith("image cannot be decoded")
    assert len(server.bodies) == (1 if repair else 0)
    with pytest.raises(RecipeError, match="got no model"):
        describe.run(context(tmp_path, describe=spec), data)


def test_joining():
    assert joined("A cat sits on", "on a mat. It purrs.") == "A cat sits on a mat. It purrs."
    assert joined("A cat sits.", "A cat sits. It purrs.") == "A cat sits. It purrs."
    assert (
        joined("A cat sits. It purrs.", "Then a dog. It purrs. Rain falls.")
        == "A cat sits. It purrs. Then a dog. Rain falls."
    )
    assert joined("A cat.", "") == "A cat."


def test_lengths_ends_and_codes():
    assert length("A red, 3.5 m long train.") == 10 and length("一只红色的猫。") == 7
    assert (
        finished("One. Two! Thr") == "One. Two!" and finished("no end") == "" and finished("一只猫。红色") == "一只猫。"
    )
    assert problems("", 1) == ["empty"] and problems("...", 1) == ["empty"] and problems("A cat.", 1) == []
    assert problems("A cat and a dog and a cat and a dog and a cat and a dog.", 1) == ["repetition"]
    assert problems("A cat #####.", 1) == ["garbage"]
    assert repair_problems(LONG, LONG, 5) == []
    assert repair_problems("A cat sits there.", "A cat sits there. A cat sits there. A cat sits there.", 3) == []
