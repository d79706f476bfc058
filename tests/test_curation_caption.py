"""Captions by a local model and by an endpoint: one row a sample, failures named, nothing done twice."""

import json

import pytest
from curation_world import MODEL, FakeVLM, chat, context, dataset, png, sample, serving

from vlmflow.curation import caption
from vlmflow.dataset.layer import read_layer
from vlmflow.errors import RecipeError, StepFailed


@pytest.fixture
def vlm(monkeypatch):
    fake = FakeVLM()
    monkeypatch.setattr(caption.Lazy, "__call__", lambda self: fake)
    return fake


def web_samples():
    good = [sample(f"k{i}", f"alt {i}", png(10 + i)) for i in range(6)]
    return [*good, sample("k6", "broken", png(3)[:30]), sample("k7", "none", None), sample("k8", "wordless", png(255))]


def test_local_model_describes_every_picture_and_names_what_failed(tmp_path, vlm):
    ctx = context(tmp_path, caption={"failure_limit": 0.5, "max_new_tokens": 9, "batch": 3})
    sealed = caption.run(ctx, dataset(tmp_path / "d", web_samples()), MODEL)
    rows = read_layer(sealed, "synthetic")
    assert [rows[f"k{i}"]["text"] for i in range(6)] == [f"a red {10 + i} square" for i in range(6)]
    assert rows["k6"]["error"].startswith("image cannot be decoded")
    assert rows["k7"]["error"] == "no image"
    assert rows["k8"]["error"] == "the model's description holds no word"
    assert sealed.layers["synthetic"].summary["finish"] == {"failed": 2, "stop": 7}
    assert vlm.calls[0] == ("generate", 4, 9, 3)


def test_a_finished_step_loads_no_model_and_gives_the_same_manifest(tmp_path, vlm):
    ctx = context(tmp_path, caption={"failure_limit": 0.5})
    data = dataset(tmp_path / "d", web_samples())
    first = caption.run(ctx, data, MODEL)
    vlm.calls.clear()
    assert caption.run(ctx, data, MODEL).digest == first.digest and vlm.calls == []
    other = MODEL.model_copy(update={"weights_sha256": "e" * 64})
    assert caption.run(ctx, data, other).layers["synthetic"].digest != first.layers["synthetic"].digest


def test_too_many_failures_stop_the_step_with_reasons(tmp_path, vlm):
    with pytest.raises(StepFailed, match=r"3 of 9 samples failed.*the recipe allows 2.0%.*1 x "):
        caption.run(context(tmp_path), dataset(tmp_path / "d", web_samples()), MODEL)


def test_model_engine_needs_a_model(tmp_path):
    with pytest.raises(RecipeError, match="got no model"):
        caption.run(context(tmp_path), dataset(tmp_path / "d", web_samples()))


def test_endpoint_gets_each_readable_picture_once(tmp_path, monkeypatch):
    def reply(body, n):
        content = body["messages"][0]["content"]
        text = (
            "I'm sorry, I cannot help with that." if len(server_refuses(body)) else f"picture of {len(content)} parts"
        )
        return chat(text)

    refused = png(12)

    def server_refuses(body):
        import base64

        url = body["messages"][0]["content"][0]["image_url"]["url"]
        return "x" if url.endswith(base64.b64encode(refused).decode()) else ""

    spec = {
        "engine": "openai",
        "model_name": "m",
        "failure_limit": 0.5,
        "endpoint_env": "CAP_URL",
        "key_env": "CAP_KEY",
    }
    monkeypatch.setenv("CAP_KEY", "sk-secret")
    data = dataset(tmp_path / "d", web_samples())
    with serving(reply) as (server, url):
        monkeypatch.setenv("CAP_URL", url)
        sealed = caption.run(context(tmp_path, caption=spec), data)
    rows = read_layer(sealed, "synthetic")
    assert len(server.bodies) == 7  # the broken and the missing picture cost no request
    assert rows["k0"]["text"] == "picture of 2 parts" and rows["k0"]["completion_tokens"] == 5
    assert rows["k2"]["error"] == "the model refused to describe the image"
    assert sealed.layers["synthetic"].summary["prompt_tokens"] == 77
    stored = json.dumps(sealed.model_dump(mode="json"))
    assert "sk-secret" not in stored and url not in stored
    # a second run finds the layer and needs no server
    assert caption.run(context(tmp_path, caption=spec), data).digest == sealed.digest


def test_a_cut_picture_of_any_format_costs_no_request():
    import io

    from PIL import Image

    from vlmflow.curation.inputs import check_pictures, pictures
    from vlmflow.errors import DataError

    picture = Image.effect_noise((320, 240), 60).convert("RGB")
    for kind in ("JPEG", "PNG", "WEBP"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        whole = sample("k", None, buffer.getvalue())
        check_pictures(whole)
        cut = sample("k", None, buffer.getvalue()[: len(buffer.getvalue()) // 2])
        for check in (check_pictures, pictures):
            with pytest.raises(DataError, match="image cannot be decoded"):
                check(cut)
