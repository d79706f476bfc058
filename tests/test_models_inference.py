"""Generation and scoring do not depend on how requests are batched; the initial model step finds its own output."""

import math

import pytest
import torch
from models_tiny import FAMILY, TEXTS, build, picture, samples, spec, tokenizer

from vlmflow.errors import DataError
from vlmflow.models import initial
from vlmflow.models.chat import render_caption
from vlmflow.models.inference import VLM, Request, ScoreRequest, load


@pytest.fixture(scope="module")
def vlm():
    return VLM(build(), tokenizer())


def requests(count=7):
    return [Request([picture(i, 40 + 25 * i, 50)] * (i % 3), f"{TEXTS[i % 4]} {i}?") for i in range(count)]


def test_batched_generation_equals_single(vlm):
    together = vlm.generate(requests(), max_new_tokens=8, batch=4)
    alone = [vlm.generate([request], max_new_tokens=8)[0] for request in requests()]
    assert together == alone
    assert len({answer.text for answer in together}) > 1, "all answers are alike: the test would prove nothing"
    assert vlm.generate([], max_new_tokens=4) == []


def test_cached_generation_equals_uncached(vlm):
    part = samples(vlm.model.config)[0]
    inputs = {"input_ids": torch.tensor([part["ids"]]), "pixel_values": torch.from_numpy(part["tiles"][0])}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    cached = vlm.model.generate(**inputs, **options)
    uncached = vlm.model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached, uncached) and cached.shape[1] == len(part["ids"]) + 8


def test_encoders_run_once_per_generation(vlm):
    calls = []
    handle = vlm.model.model.multi_modal_projector.register_forward_hook(lambda *_: calls.append(1))
    vlm.generate(requests(2)[1:], max_new_tokens=5)
    handle.remove()
    assert len(calls) == 2  # one call an encoder


def test_beams_keep_the_tiles_of_a_row_together(vlm):
    rows = [samples(vlm.model.config)[i] for i in (0, 1)]
    width = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([[0] * (width - len(row["ids"])) + row["ids"] for row in rows])
    mask = torch.tensor([[0] * (width - len(row["ids"])) + [1] * len(row["ids"]) for row in rows])
    pixels = torch.cat([torch.from_numpy(tile) for row in rows for tile in row["tiles"]])
    out = vlm.model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, num_beams=2, num_return_sequences=2,
                             max_new_tokens=4, do_sample=False, pad_token_id=0)  # fmt: skip
    single = vlm.model.generate(input_ids=ids[1:], attention_mask=mask[1:], pixel_values=torch.from_numpy(rows[1]["tiles"][0]),
                                num_beams=2, num_return_sequences=2, max_new_tokens=4, do_sample=False, pad_token_id=0)  # fmt: skip
    length = min(out.shape[1], single.shape[1])
    assert torch.equal(out[2:, :length], single[:, :length])


def test_finish_says_why_it_stopped(vlm):
    model = build(seed=4)
    stopper = VLM(model, tokenizer())
    answer = stopper.generate(requests(1), max_new_tokens=1)[0]
    first = tokenizer()(answer.text, add_special_tokens=False)["input_ids"]
    assert answer.finish == "length" and first
    stopper.end = first[0]
    assert stopper.generate(requests(1), max_new_tokens=3)[0].finish == "stop"
    assert stopper.generate(requests(1), max_new_tokens=3)[0].text == ""


def scored(count=6):
    return [ScoreRequest(r.images, r.prompt, TEXTS[i % 4]) for i, r in enumerate(requests(count))]


def test_scores_do_not_depend_on_packing(vlm):
    together = vlm.score(scored(), batch_tokens=4096)
    some = vlm.score(scored(), batch_tokens=150)
    alone = [vlm.score([request])[0] for request in scored()]
    for one, two, three in zip(together, some, alone, strict=True):
        assert one.tokens == two.tokens == three.tokens
        assert one.nll == pytest.approx(three.nll, rel=1e-5) and two.nll == pytest.approx(three.nll, rel=1e-5)


def test_score_counts_target_and_end_tokens(vlm):
    request = scored(1)[0]
    ids, mask = FAMILY.expand(
        render_caption(request.target, 0, "chat", request.prompt), tokenizer(), [], vlm.model.config
    )
    rows = torch.log_softmax(vlm.model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    nll = -sum(rows[i - 1, ids[i]].item() for i in range(len(ids)) if mask[i])
    score = vlm.score([request])[0]
    assert score.tokens == sum(mask) == len(tokenizer()(request.target)["input_ids"]) + 1
    assert score.nll == pytest.approx(nll, rel=1e-5) and math.exp(score.nll / score.tokens) > 1


def test_bad_requests_are_named(vlm):
    with pytest.raises(DataError, match="sample 'request 1': its text is empty"):
        vlm.score([ScoreRequest([], "a", "b"), ScoreRequest([], "a", " ")])
    with pytest.raises(DataError, match="request 0"):
        vlm.generate([Request([], "<|image_pad|>")], max_new_tokens=2)


def test_initial_model_is_published_once_and_loads(tmp_path):
    from types import SimpleNamespace

    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.sample import Sample
    from vlmflow.dataset.shard import describe_shard, write_shard
    from vlmflow.models import store

    shard = tmp_path / "shard.tar"
    texts = [{"text": text} for text in TEXTS] + [
        {"conversations": [{"from": "human", "value": "<image>\nWhat word?"}]}
    ]
    write_shard(shard, [Sample(f"k{i}", {"id": str(i), "images": [], **text}) for i, text in enumerate(texts)])
    manifest = Manifest(
        name="seed", shards=[describe_shard(shard, str(shard), len(texts), "captions")], layers={}, lineage=[]
    )
    recipe = SimpleNamespace(name="tiny", seed=17, model=spec())
    ctx = SimpleNamespace(recipe=recipe, root=str(tmp_path / "store"), scratch=tmp_path / "scratch", run_id="test")
    first = initial.run(ctx, {"seed": manifest})
    assert first.lineage.ancestor == first.weights_sha256 and first.lineage.data == [manifest.digest]
    names = {file.path for file in first.files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "processor_config.json", "generation_config.json"} <= names  # fmt: skip
    assert initial.run(ctx, {"seed": manifest}) == first
    other = SimpleNamespace(recipe=recipe, root=str(tmp_path / "other"), scratch=tmp_path / "scratch", run_id="test")
    again = initial.run(other, {"seed": manifest})
    assert [(f.path, f.sha256) for f in again.files] == [(f.path, f.sha256) for f in first.files]
    changed = SimpleNamespace(name="tiny", seed=18, model=spec())
    assert initial.run(SimpleNamespace(recipe=changed, root=ctx.root, scratch=ctx.scratch), {"seed": manifest}) != first
    model = load(store.load_ref(f"{first.uri}/model.json"))
    assert model.generate([Request([picture(0)], "What?")], max_new_tokens=3)[0].finish in ("stop", "length")
    with pytest.raises(DataError, match="names dataset 'seed', but the step was given \\['web'\\]"):
        initial.run(ctx, {"web": manifest})


def test_the_placeholder_is_never_generated(vlm):
    image = vlm.model.config.image_token_id
    bias = vlm.model.lm_head.register_forward_hook(
        lambda module, inputs, out: out + 1e4 * torch.nn.functional.one_hot(torch.tensor(image), out.shape[-1])
    )
    answer = vlm.generate(requests(1), max_new_tokens=3)[0]
    bias.remove()
    assert answer.finish == "length" and "<|image_pad|>" not in answer.text
    assert vlm.model.generation_config.suppress_tokens == [image]


def test_an_image_is_encoded_once_whatever_shows_it(vlm, monkeypatch):
    encoded, inner = [], vlm.model.get_image_features
    monkeypatch.setattr(
        vlm.model, "get_image_features", lambda tiles: encoded.append(len(tiles)) or inner(tiles), raising=False
    )
    image, other = picture(1, 120, 60), picture(2, 50, 110)
    tiles = [len(FAMILY.tile(each, vlm.model.config)) for each in (image, other)]
    asked = [ScoreRequest([image], f"what {i}", TEXTS[i % 4] * (1 + i)) for i in range(6)] + [
        ScoreRequest([other, image], "?", "b")
    ]
    alone = [vlm.score([request])[0] for request in asked]
    encoded.clear()
    assert vlm.score(asked, batch_tokens=150) == alone  # several packs
    assert sum(encoded) == sum(tiles)
    encoded.clear()
    vlm.generate([Request(r.images, r.prompt) for r in asked], max_new_tokens=2, batch=2)
    assert sum(encoded) == sum(tiles)


def test_scores_have_the_same_bits_whatever_the_packing_order_and_threads(vlm):
    texts = [" ".join(TEXTS * 3)[: 3 + 11 * i] for i in range(16)]
    asked = [ScoreRequest([picture(i, 40 + 25 * i, 50)] * (i % 3), f"say {i}", text) for i, text in enumerate(texts)]
    alone = [vlm.score([request])[0] for request in asked]
    assert len({score.nll for score in alone}) == 16
    for batch_tokens in (64, 300, 1 << 20):
        assert vlm.score(asked, batch_tokens=batch_tokens) == alone
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert vlm.score(asked[::-1])[::-1] == alone
    finally:
        torch.set_num_threads(threads)
