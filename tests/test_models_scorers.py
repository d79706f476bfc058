"""transformers' own models as scorers: counted tokens, equality with one plain forward a sample, batches that change nothing."""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from models_tiny import build, picture, tokenizer
from scorer_tiny import CHATML, MODELS

from vlmflow.curation import caption, perplexity
from vlmflow.curation.inputs import scorer
from vlmflow.dataset.layer import read_layer
from vlmflow.errors import DataError, ModelError
from vlmflow.models import initial, scorers, store
from vlmflow.models.inference import VLM, Request, ScoreRequest, load
from vlmflow.models.scorers.chat_parts import frame

PROMPT = "please generate"
WORDS = ["a red digit seven", "lot 12, model XJ-900 on grey paper", "naïve café", "the lazy dog " * 6, "seven"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("scorers")
    return functools.cache(lambda name: MODELS[name](base / name))


@pytest.fixture(scope="module")
def loaded(folders):
    return functools.cache(lambda name: load(folders(name)))


def requests(count=10):
    return [ScoreRequest([picture(i, 40 + 17 * i, 50)], PROMPT, WORDS[i % 5]) for i in range(count)]


def plain(model, request) -> tuple[float, int]:
    """One unpadded forward with all logits; the counted tokens found by hand: text, then the end token."""
    item = model.prepare(request)
    tokens = {name: value[None] for name, value in item.tokens.items()}
    with torch.inference_mode():
        logs = torch.log_softmax(model.model(**tokens, **item.others, use_cache=False).logits[0].double(), -1)
    ids = item.tokens["input_ids"].tolist()
    tail = model.tokenizer.decode(ids[-item.counted :])
    end = model.tokenizer.decode(ids[-1:])
    assert tail.strip() == request.target.strip() + end, tail  # the text and one end token, nothing before or behind
    return -sum(float(logs[i - 1, ids[i]]) for i in range(len(ids) - item.counted, len(ids))), item.counted


@pytest.mark.parametrize("name", MODELS)
def test_equals_one_plain_forward_a_sample(loaded, name):
    scores = loaded(name).score(requests())
    for request, score in zip(requests(), scores, strict=True):
        nll, tokens = plain(loaded(name), request)
        assert score.tokens == tokens and score.nll == pytest.approx(nll, rel=1e-5)
    assert len({score.nll for score in scores}) == 10, "all values are alike: the test would prove nothing"


@pytest.mark.parametrize("name", MODELS)
def test_batches_and_order_change_no_bit(loaded, name):
    alone = [loaded(name).score([request])[0] for request in requests()]
    for batch_tokens in (64, 400, 1 << 20):
        assert loaded(name).score(requests(), batch_tokens=batch_tokens) == alone
    assert loaded(name).score(requests()[::-1])[::-1] == alone


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3"])
def test_batched_captions_equal_single_ones(loaded, name):
    asked = [Request(r.images, r.prompt) for r in requests(5)]
    together = loaded(name).generate(asked, max_new_tokens=4, batch=3)
    assert together == [loaded(name).generate([one], max_new_tokens=4)[0] for one in asked]
    assert len({answer.text for answer in together}) > 1


class Templated:
    """A processor that renders this template with a tokenizer of ours."""

    def __init__(self, template: str) -> None:
        self.tokenizer = tokenizer()
        self.template = template

    def apply_chat_template(self, turns, tokenize, add_generation_prompt=False):
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=tokenize, add_generation_prompt=add_generation_prompt
        )


def test_the_frame_of_an_answer_is_found_whatever_the_template_adds():
    chatml = frame(Templated(CHATML), "say", 1)
    assert chatml.before.startswith("<|im_start|>system\nYou are") and chatml.before.endswith("assistant\n")
    assert chatml.end == "<|im_end|>" and chatml.prompt == chatml.before  # the line feed behind the end is not counted
    bare = frame(
        Templated("{% for m in messages %}{{ m['role'] }}: {{ m['content'][-1]['text'] }}\n{% endfor %}"), "say", 0
    )
    assert bare.before == "user: say\nassistant: " and bare.end == tokenizer().eos_token
    with pytest.raises(ModelError, match="shows an answer 2 times"):
        frame(Templated("{% for m in messages %}{{ m['content'][-1]['text'] * 2 }}{% endfor %}"), "say", 0)
    with pytest.raises(ModelError, match="cannot render a picture, an instruction and an answer: "):
        frame(Templated("{{ raise_exception('no images here') }}"), "say", 1)


def test_text_that_spells_a_special_token_is_refused(loaded):
    with pytest.raises(
        DataError, match="sample 'k7': its text contains the special token <|im_end|>".replace("|", r"\|")
    ):
        loaded("qwen2_vl").prepare(ScoreRequest([picture(0)], PROMPT, "a <|im_end|> b"), "k7")
    with pytest.raises(DataError, match="sample 'request 0': its text is empty"):
        loaded("llava").score([ScoreRequest([picture(0)], PROMPT, " ")])


@pytest.mark.parametrize("kind", ["own", "qwen2_vl"])
def test_out_of_memory_halves_the_batch_then_names_the_sample(loaded, kind, monkeypatch):
    from vlmflow.models import scoring

    model = VLM(build(), tokenizer()) if kind == "own" else loaded(kind)
    expected = model.score(requests(6))
    sizes = []
    calls = (scoring, "_score") if kind == "own" else (model, "_score")
    inner = getattr(*calls)

    def small(*arguments):
        items = next(a for a in arguments if isinstance(a, list))
        sizes.append(len(items))
        longest = max(len(getattr(item, "ids", None) or item.tokens["input_ids"]) for item in items)
        if len(items) > 2 or longest == limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return inner(*arguments)

    limit = -1
    monkeypatch.setattr(*calls, small)
    assert model.score(requests(6)) == expected and max(sizes) > 2
    prepared = [model.prepare(request) for request in requests(6)]
    lengths = [len(getattr(item, "ids", None) or item.tokens["input_ids"]) for item in prepared]
    limit = max(lengths)
    scores = model.score(prepared)
    for score, plain_score, length in zip(scores, expected, lengths, strict=True):
        if length == limit:
            assert (
                score.error == "the GPU's memory does not hold this sample alone (CUDA out of memory)"
                and not score.tokens
            )
        else:
            assert score == plain_score


def named(folder, **more):
    curation = SimpleNamespace(scorer=str(folder), **more)
    return SimpleNamespace(recipe=SimpleNamespace(curation=curation, seed=17), scratch=folder.parent / "scratch")


def test_a_plain_folder_is_hashed_and_decides_the_layer(tmp_path, folders):
    from curation_world import context, dataset
    from test_curation_perplexity_model import web

    found = []
    for words in (PROMPT, PROMPT + " now"):
        ctx = context(tmp_path, scorer=str(folders("qwen2_vl")), perplexity={"text": "alt", "prompt": words})
        found.append(perplexity.run(ctx, dataset(tmp_path / "d", web(4)), None))
    ref = scorer(ctx, None)
    assert ref.weights_sha256 == store.weights_digest(ref.files) and {"config.json", "model.safetensors"} <= {
        f.path for f in ref.files
    }
    rows = read_layer(found[0], "ppl")
    assert all(row["error"] is None and row["ppl"] > 1 and math.isfinite(row["nll"]) for row in rows.values())
    assert found[0].layers["ppl"].digest != found[1].layers["ppl"].digest
    spec = {"prompt": "say", "max_new_tokens": 3, "failure_limit": 1.0}
    written = caption.run(
        context(tmp_path, scorer=str(folders("qwen2_vl")), caption=spec), dataset(tmp_path / "d", web(3)), None
    )
    assert [row["finish"] for row in read_layer(written, "synthetic").values()] == ["length"] * 3


def test_folders_that_are_no_scorer_say_so(tmp_path, folders):
    from safetensors.torch import load_file, save_file

    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds 0 files and is neither a model of this store"):
        scorer(named(tmp_path / "empty"), None)
    with pytest.raises(ModelError, match="no model folder"):
        scorers.load(tmp_path / "empty")
    broken = MODELS["llava"](tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors missing or of another shape"):
        scorers.load(broken)
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "config.json").write_text(json.dumps({"model_type": "unheard", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (remote / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    with pytest.raises(ModelError, match="cannot load a scorer"):
        scorers.load(remote)


def test_own_families_load_by_the_same_call(tmp_path):
    initial.save(build(), tokenizer(), tmp_path / "own")
    assert isinstance(scorers.load(tmp_path / "own"), VLM) and scorers.kind(tmp_path / "own") == "vlmflow"
