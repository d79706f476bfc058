"""The fuse step: engines, checks, one retry, fallback; every sample accounted for."""

import re

import pytest
from aiohttp import web
from curation_world import MODEL, FakeVLM, chat, context, dataset, impatient, png, sample, serving

from vlmflow.curation import caption, fuse
from vlmflow.dataset.layer import read_layer
from vlmflow.errors import DataError, RecipeError, ServiceError, StepFailed

OPENAI = {"engine": "openai", "model_name": "merger", "endpoint_env": "FUSE_URL", "key_env": "FUSE_KEY"}
ALTS = ["crimson tile, lot KX-1-B", "IMG_0001.jpg", None, "tile from Leeds", "a blue square", "Anna's square"]


@pytest.fixture
def captioned(tmp_path, monkeypatch):
    monkeypatch.setattr(caption.Lazy, "__call__", lambda self: FakeVLM())
    samples = [sample(f"k{i}", alt, png(10 + i)) for i, alt in enumerate(ALTS)] + [sample("k6", "no picture", None)]
    return caption.run(context(tmp_path, caption={"failure_limit": 0.5}), dataset(tmp_path / "d", samples), MODEL)


def test_rules_engine_says_so_and_accounts_for_every_sample(tmp_path, captioned):
    sealed = fuse.run(context(tmp_path), captioned)
    rows = read_layer(sealed, "fused")
    assert rows["k0"]["text"] == "a red 10 square, crimson tile, lot KX-1-B." and rows["k0"]["engine"] == "rules"
    assert rows["k1"] == rows["k1"] | {"text": "a red 11 square.", "engine": "none", "problems": ["alt_empty"]}
    assert rows["k2"]["text"] == "a red 12 square." and rows["k2"]["problems"] == ["alt_empty"]
    assert rows["k5"]["text"] == "a red 15 Anna's square."
    assert rows["k6"]["error"] == "upstream: synthetic: no image" and rows["k6"]["problems"] == ["no_synthetic"]
    summary = sealed.layers["fused"].summary
    assert summary["engines"] == {"failed": 1, "none": 2, "rules": 4}
    assert summary["failures"] == [["upstream: synthetic: no image", 1]]
    assert fuse.run(context(tmp_path), captioned).digest == sealed.digest


def test_the_raw_alt_text_stands_in_when_asked(tmp_path, captioned):
    rows = read_layer(fuse.run(context(tmp_path, fuse={"fallback": "alt"}), captioned), "fused")
    assert rows["k6"] == rows["k6"] | {
        "text": "no picture",
        "engine": "alt",
        "problems": ["no_synthetic"],
        "error": None,
    }


def test_needs_the_synthetic_layer(tmp_path):
    with pytest.raises(DataError, match="has no layer 'synthetic'"):
        fuse.run(context(tmp_path), dataset(tmp_path / "d", [sample("k", "x", png(1))]))


def merge(body):
    alt, synthetic = re.search(
        r"web: (.*)\nDescription by a captioning model: (.*)\n", body["messages"][0]["content"]
    ).groups()
    return f"{synthetic.capitalize()} with {alt.removeprefix('a ')}."


def run_openai(tmp_path, captioned, monkeypatch, reply, **settings):
    with serving(reply) as (server, url):
        monkeypatch.setenv("FUSE_URL", url)
        return server, fuse.run(context(tmp_path, fuse=OPENAI | settings), captioned)


def test_endpoint_fuses_what_has_two_sources(tmp_path, captioned, monkeypatch):
    server, sealed = run_openai(tmp_path, captioned, monkeypatch, lambda body, n: chat(merge(body)))
    rows = read_layer(sealed, "fused")
    assert len(server.bodies) == 4
    assert rows["k0"]["text"] == "A red 10 square with crimson tile, lot KX-1-B." and rows["k0"]["engine"] == "openai"
    assert rows["k1"]["engine"] == "none" and rows["k1"]["text"] == "a red 11 square"
    assert sealed.layers["fused"].summary["completion_tokens"] == 20


def test_a_bad_answer_is_asked_for_once_more_with_the_reason(tmp_path, captioned, monkeypatch):
    def reply(body, n):
        first = "rejected" not in body["messages"][0]["content"]
        return chat("Sure, here is the merged sentence: A tile in Paris" if first else merge(body))

    server, sealed = run_openai(tmp_path, captioned, monkeypatch, reply)
    rows = read_layer(sealed, "fused")
    assert len(server.bodies) == 8 and rows["k3"]["problems"] == ["retried"] and rows["k3"]["prompt_tokens"] == 22
    assert any("a capitalised word that neither source holds" in b["messages"][0]["content"] for b in server.bodies)


@pytest.mark.parametrize(("answer", "finish", "code"), [
    ("I'm sorry, I can't help with that.", "stop", "refusal"),
    ("A red square with crimson", "length", "truncated"),
    ("A red square in Paris with crimson tile.", "stop", "name"),
])  # fmt: skip
def test_failing_twice_drops_or_falls_back_and_is_counted(tmp_path, captioned, monkeypatch, answer, finish, code):
    reply = lambda body, n: chat(answer, finish)  # noqa: E731
    with pytest.raises(StepFailed, match=r"4 of 6 samples failed.*checks failed twice: "):
        run_openai(tmp_path, captioned, monkeypatch, reply)
    _, sealed = run_openai(tmp_path, captioned, monkeypatch, reply, failure_limit=1.0)
    rows = read_layer(sealed, "fused")
    assert rows["k0"]["text"] is None and code in rows["k0"]["problems"]
    assert sealed.layers["fused"].summary["problems"][code] >= 4
    _server, sealed = run_openai(tmp_path, captioned, monkeypatch, reply, fallback="alt")
    rows = read_layer(sealed, "fused")
    assert (
        rows["k0"] == rows["k0"] | {"text": ALTS[0], "engine": "alt", "error": None} and code in rows["k0"]["problems"]
    )


def test_dead_endpoint_then_a_live_one_loses_nothing(tmp_path, captioned, monkeypatch):
    monkeypatch.delenv("FUSE_URL", raising=False)
    with pytest.raises(RecipeError, match="FUSE_URL is not set"):
        fuse.run(context(tmp_path, fuse=OPENAI), captioned)
    monkeypatch.setenv("FUSE_URL", "http://127.0.0.1:9/v1")
    impatient(monkeypatch)
    with pytest.raises(ServiceError, match="does not answer"):
        fuse.run(context(tmp_path, fuse=OPENAI), captioned)
    _, sealed = run_openai(tmp_path, captioned, monkeypatch, lambda body, n: chat(merge(body)))
    assert sealed.layers["fused"].summary["engines"] == {"failed": 1, "none": 2, "openai": 4}


def test_a_server_that_dies_half_way_costs_only_what_was_not_finished(tmp_path, captioned, monkeypatch):
    impatient(monkeypatch)

    def dies(body, n):
        return web.json_response({}, status=401) if "Anna's" in body["messages"][0]["content"] else chat(merge(body))

    with pytest.raises(ServiceError, match="refuses the key"):
        run_openai(tmp_path, captioned, monkeypatch, dies, concurrency=1)
    server, sealed = run_openai(tmp_path / "other", captioned, monkeypatch, lambda body, n: chat(merge(body)))
    asked_whole = len(server.bodies)
    server, again = run_openai(tmp_path, captioned, monkeypatch, lambda body, n: chat(merge(body)))
    assert read_layer(again, "fused") == read_layer(sealed, "fused")
    assert [p.sha256 for p in again.layers["fused"].parts] == [p.sha256 for p in sealed.layers["fused"].parts]
    assert (asked_whole, len(server.bodies)) == (4, 1)  # only the refused one is asked again
