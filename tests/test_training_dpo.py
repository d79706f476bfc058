"""The loss of preference pairs: equal to a plain reimplementation with a second model, packed or not."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from models_tiny import FAMILY, build, pack, picture, tokenizer

from vlmflow.models.loss import packed_logprobs
from vlmflow.recipe.objective import ObjectiveSpec
from vlmflow.training.dpo import pack_outcome, pairs_first
from vlmflow.training.preference import render_pair

torch = pytest.importorskip("torch")

PAIRS = [
    ("<image>\nwhat is it?", "a red digit seven", "a lazy dog, 12345", 1),
    ("hello", "world", "the lazy dog on grey paper", 0),
    ("<image><image>compare", "déjà vu!", "no", 2),
]
SPECS = [{}, {"beta": 0.5, "label_smoothing": 0.2}, {"sft_weight": 0.7}]


def parts_of(config: Any, pairs: list[tuple[str, str, str, int]] = PAIRS) -> list[dict[str, Any]]:
    """Chosen and rejected sequence of each pair, with tiles of their own."""
    made = []
    for number, (asked, chosen, rejected, images) in enumerate(pairs):
        pair = {"conversations": [{"from": "human", "value": asked}], "chosen": chosen, "rejected": rejected}
        tiles = [FAMILY.tile(picture(10 * number + i, 50 + 30 * i, 60), config) for i in range(images)]
        for segments in render_pair(pair, images, "k"):
            ids, mask = FAMILY.expand(segments, tokenizer(), [len(t) for t in tiles], config)
            made.append({"ids": ids, "labels": FAMILY.labels(ids, mask), "tiles": tiles})
    return made


def moved(model: Any) -> Any:
    """A copy of a model some steps further."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return other


def plain_logprob(model: Any, part: dict[str, Any]) -> tuple[Any, int]:
    """Log-probability of a part's targets by full logits of this part alone, and their number."""
    tiles = torch.from_numpy(np.concatenate(part["tiles"])) if part["tiles"] else None
    logits = model(input_ids=torch.tensor([part["ids"]]), pixel_values=tiles, use_cache=False).logits[0]
    labels = torch.from_numpy(part["labels"])[1:]
    every = torch.log_softmax(logits[:-1].float(), dim=-1)
    at = (labels != -100).nonzero()[:, 0]
    return sum(every[i, labels[i]] for i in at), len(at)


def plain_loss(model: Any, reference: Any, parts: list[dict[str, Any]], spec: ObjectiveSpec) -> Any:
    """DPO as it is written in the paper, pair after pair, with a second model."""
    total = 0.0
    for chosen, rejected in zip(parts[::2], parts[1::2], strict=True):
        (c, n), (r, _) = plain_logprob(model, chosen), plain_logprob(model, rejected)
        with torch.no_grad():
            (c0, _), (r0, _) = plain_logprob(reference, chosen), plain_logprob(reference, rejected)
        h = spec.beta * ((c - c0) - (r - r0))
        e = spec.label_smoothing
        total = total - (1 - e) * torch.log(torch.sigmoid(h)) - e * torch.log(torch.sigmoid(-h))
        total = total + spec.sft_weight * -c / n
    return total


def batch_of(reference: Any, parts: list[dict[str, Any]]) -> dict[str, Any]:
    batch = pack(parts)
    with torch.no_grad():
        known = pairs_first(packed_logprobs(reference, batch)[0], len(parts) // 2)
    return {**batch, "reference": known}


def gradients(model: Any) -> dict[str, Any]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("fields", SPECS, ids=str)
def test_packed_pairs_equal_the_paper_with_a_second_model(fields: dict[str, float]) -> None:
    reference = build()
    model, spec = moved(reference), ObjectiveSpec(kind="dpo", **fields)
    parts = parts_of(model.config)
    model.set_attn_implementation("sdpa")
    reference.set_attn_implementation("sdpa")
    expected = plain_loss(model, reference, parts, spec)
    expected.backward()
    separate = gradients(model)
    model.set_attn_implementation("vlmflow_varlen")
    reference.set_attn_implementation("vlmflow_varlen")
    loss, sums = pack_outcome(model, batch_of(reference, parts), spec)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    close(gradients(model), separate)
    assert sums["margin"].item() == pytest.approx((sums["reward_chosen"] - sums["reward_rejected"]).item(), rel=1e-4)
    assert abs(sums["margin"].item()) > 1e-3, "the copy did not move"


def test_one_pack_equals_a_pack_for_each_pair() -> None:
    reference = build()
    model, spec = moved(reference), ObjectiveSpec(kind="dpo", sft_weight=0.3)
    parts = parts_of(model.config)
    loss, sums = pack_outcome(model, batch_of(reference, parts), spec)
    loss.backward()
    together = gradients(model)
    alone = [pack_outcome(model, batch_of(reference, parts[i : i + 2]), spec) for i in range(0, len(parts), 2)]
    total = sum(found[0] for found in alone)
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    close(gradients(model), together)
    for name, value in sums.items():
        assert value.item() == pytest.approx(sum(float(found[1][name]) for found in alone), rel=1e-4, abs=1e-6), name


def shared(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The packed batch of pairs whose answers show the same tiles, which are in it once (as the loader makes it)."""
    index, count = [], 0
    for part in parts[::2]:
        tiles = sum(len(tile) for tile in part["tiles"])
        index += [*range(count, count + tiles)] * 2
        count += tiles
    pixels = [tile for part in parts[::2] for tile in part["tiles"]]
    return pack(parts) | {"pixel_values": torch.from_numpy(np.concatenate(pixels)), "tile_index": torch.tensor(index)}


@pytest.mark.parametrize("own_class", [True, False])
def test_tiles_encoded_once_for_both_answers_equal_tiles_encoded_twice(own_class: bool) -> None:
    """Without `accepts_loss_only` a model is one of transformers' own, which cannot share tiles: they are repeated before it."""
    reference = build()
    model, spec = moved(reference), ObjectiveSpec(kind="dpo", sft_weight=0.3)
    model.accepts_loss_only = own_class
    parts = parts_of(model.config)
    own = batch_of(reference, parts)
    encoded: list[int] = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda _, args, out: encoded.append(len(out)))
    twice, _ = pack_outcome(model, own, spec)
    twice.backward()
    expected = gradients(model)
    once, _ = pack_outcome(model, {**shared(parts), "reference": own["reference"]}, spec)
    once.backward()
    assert once.item() == pytest.approx(twice.item(), rel=1e-5)
    close(gradients(model), expected)
    assert float(expected["model.vision_tower.embeddings.patch_embedding.weight"].abs().max()) > 0
    assert encoded[1] * (2 if own_class else 1) == encoded[0]


def test_without_a_step_every_pair_costs_log_two() -> None:
    model = build()
    spec = ObjectiveSpec(kind="dpo", label_smoothing=0.1)
    loss, sums = pack_outcome(model.train(), batch_of(model.eval(), parts_of(model.config)), spec)
    assert loss.item() / len(PAIRS) == pytest.approx(math.log(2), rel=1e-7)
    assert [sums[name].item() for name in ("margin", "accuracy", "reward_chosen", "reward_rejected")] == [0, 0, 0, 0]


def test_gradient_vanishes_for_a_pair_that_is_won() -> None:
    """The weight of a pair is the sigmoid of minus its margin: a check that the sign is the right one."""
    model, spec = build(), ObjectiveSpec(kind="dpo", beta=1.0)
    batch = batch_of(model, parts_of(model.config, PAIRS[:1]))
    sizes = []
    for lead in (-40.0, 40.0):  # the policy's lead of the chosen answer over the reference, in nats
        shifted = batch["reference"] - torch.tensor([lead, 0.0])
        pack_outcome(model, {**batch, "reference": shifted}, spec)[0].backward()
        sizes.append(max(float(g.abs().max()) for g in gradients(model).values()))
    assert sizes[1] < 1e-10 < 1e-3 < sizes[0]


def test_a_pack_without_pairs_is_zero_and_reaches_every_parameter() -> None:
    model, spec = build(), ObjectiveSpec(kind="dpo", sft_weight=1.0)
    part = parts_of(model.config)[0]
    batch = pack([{**part, "labels": np.full_like(part["labels"], -100)}]) | {"reference": torch.zeros(0, 2)}
    loss, sums = pack_outcome(model, batch, spec)
    loss.backward()
    assert loss.item() == 0.0 and all(value.item() == 0.0 for value in sums.values())
    found = gradients(model)
    assert set(found) == {n for n, _ in model.named_parameters()} and not any(g.any() for g in found.values())


def test_chunked_log_probabilities_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmflow.models.points import modeling_points

    model = build()
    batch = pack(parts_of(model.config))
    whole, counts = packed_logprobs(model, batch)
    monkeypatch.setattr(modeling_points, "LOSS_ELEMENTS", 3 * model.config.text_config.vocab_size)
    pieces, again = packed_logprobs(model, batch)
    assert torch.allclose(whole, pieces, rtol=1e-6) and torch.equal(counts, again)
    assert counts.tolist() == [int((p["labels"] != -100).sum()) for p in parts_of(model.config)]


def test_transformers_own_classes_give_log_probabilities_too() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from vlmflow.models import register

    register()
    config = AutoConfig.for_model(
        "qwen2", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="vlmflow_varlen")
    ids, lengths = torch.randint(0, 50, (1, 30)), [10, 15, 5]
    borders = torch.tensor([0, 10, 25, 30], dtype=torch.int32)
    labels = torch.where(torch.arange(30)[None] % 3 > 0, ids, -100)
    labels[0, borders[:-1].long()] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
             "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 15, "max_length_k": 15}  # fmt: skip
    found, counts = packed_logprobs(model, batch)
    for number, (a, b) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)):
        every = torch.log_softmax(model(ids[:, a:b]).logits[0].float(), -1)
        at = [i for i in range(a + 1, b) if labels[0, i] != -100]
        assert found[number].item() == pytest.approx(sum(every[i - 1 - a, ids[0, i]].item() for i in at), rel=1e-5)
        assert counts[number] == len(at)
