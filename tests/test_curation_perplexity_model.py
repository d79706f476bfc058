"""Perplexity and captions with the real model class: equal to the plain computation, whatever the packing or sharding."""

import io
import math

import pytest
import torch
from curation_world import MODEL, context, dataset, sample
from models_tiny import FAMILY, build, picture, tokenizer

from vlmflow.curation import caption, keep, perplexity
from vlmflow.dataset.layer import read_layer
from vlmflow.models.chat import render_caption
from vlmflow.models.inference import VLM, Request, ScoreRequest

PROMPT = "please generate a caption for this image."


@pytest.fixture(scope="module")
def vlm():
    return VLM(build(), tokenizer())


@pytest.fixture
def lazy(vlm, monkeypatch):
    monkeypatch.setattr(perplexity.Lazy, "__call__", lambda self: vlm)


def image(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number, 40 + 9 * number, 50).save(buffer, "PNG")
    return buffer.getvalue()


def text(number: int) -> str:
    return "a red digit seven on grey paper, " * (number % 3) + f"lot {number * 37 % 11}"


def web(count=14):
    return [sample(f"k{i:02d}", text(i), image(i)) for i in range(count)]


def plain(vlm, number: int) -> tuple[float, int]:
    """nll and counted tokens of one sample, by one unpacked forward and a log-softmax in fp32."""
    tiles = FAMILY.tile(picture(number, 40 + 9 * number, 50), vlm.model.config)
    segments = render_caption(text(number), 1, "chat", PROMPT)
    ids, targets = FAMILY.expand(segments, vlm.tokenizer, [len(tiles)], vlm.model.config)
    with torch.inference_mode():
        logits = vlm.model(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(tiles), use_cache=False).logits[
            0
        ]
    logs = torch.log_softmax(logits.float(), -1)
    counted = [i for i, target in enumerate(targets) if target]
    own = len(vlm.tokenizer(text(number), add_special_tokens=False)["input_ids"])
    assert len(counted) == own + 1 and ids[counted[-1]] == vlm.end  # the text's tokens and the end token, no other
    return -sum(float(logs[i - 1, ids[i]]) for i in counted), len(counted)


def test_equals_one_by_one(tmp_path, vlm, lazy):
    ctx = context(tmp_path, perplexity={"text": "alt", "batch_tokens": 300})
    rows = read_layer(perplexity.run(ctx, dataset(tmp_path / "d", web()), MODEL), "ppl")
    for i in range(14):
        nll, tokens = plain(vlm, i)
        r = rows[f"k{i:02d}"]
        assert r["tokens"] == tokens
        assert r["ppl"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert len({r["ppl"] for r in rows.values()}) == 14, "all values are alike: the test would prove nothing"


def test_scores_do_not_depend_on_grouping(vlm):
    requests = [ScoreRequest([picture(i, 40 + 9 * i, 50)], PROMPT, text(i)) for i in range(14)]
    alone = [vlm.score([r])[0] for r in requests]
    for batch_tokens in (64, 300, 4096):
        for a, b in zip(alone, vlm.score(requests, batch_tokens=batch_tokens), strict=True):
            assert a.tokens == b.tokens and b.nll == pytest.approx(a.nll, rel=1e-5)


def test_the_same_samples_are_kept_whatever_the_sharding_and_packing(tmp_path, lazy):
    kept = []
    for per_shard, batch_tokens in ((3, 64), (5, 400), (14, 4096)):
        folder = tmp_path / str(per_shard)
        ctx = context(folder, perplexity={"text": "alt", "batch_tokens": batch_tokens})
        sealed = keep.run(ctx, perplexity.run(ctx, dataset(folder / "d", web(), per_shard), MODEL))
        kept.append({k: r["rank"] for k, r in read_layer(sealed, "keep").items() if r["keep"]})
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) == 3


def test_a_text_that_spells_an_image_token_fails_alone(tmp_path, lazy):
    odd = sample("odd", "look: <|image_pad|> here", image(3))
    ctx = context(tmp_path, perplexity={"text": "alt", "failure_limit": 0.5})
    rows = read_layer(perplexity.run(ctx, dataset(tmp_path / "d", [*web(3), odd]), MODEL), "ppl")
    assert rows["odd"]["error"].startswith(
        "the model cannot take the text: its text contains the image token <|image_pad|>"
    )
    assert [rows[f"k0{i}"]["error"] for i in range(3)] == [None] * 3


def test_captions_equal_those_made_one_by_one(tmp_path, vlm, lazy):
    spec = {"prompt": "describe", "max_new_tokens": 6, "batch": 4, "failure_limit": 1.0}
    rows = read_layer(caption.run(context(tmp_path, caption=spec), dataset(tmp_path / "d", web(6)), MODEL), "synthetic")
    for i in range(6):
        alone = vlm.generate([Request([picture(i, 40 + 9 * i, 50)], "describe")], max_new_tokens=6)[0]
        row, words = rows[f"k{i:02d}"], " ".join(alone.text.split())
        assert row["text"] == (words if any(c.isalnum() for c in words) else None)
    assert any(row["text"] for row in rows.values()), "no caption holds a word: the test would prove nothing"
