"""Packed must equal separate, for logits, losses and gradients; and each trap that breaks it must stay broken-proof."""

import pytest
import torch
from models_tiny import FAMILY, build, pack, samples
from tensor_memory import Memory
from transformers import AutoConfig, AutoModelForCausalLM

from vlmflow.errors import ModelError
from vlmflow.models import register
from vlmflow.models.attention import varlen_attention_forward
from vlmflow.models.loss import packed_loss
from vlmflow.models.points import modeling_points
from vlmflow.recipe.optimizer import AdapterSpec
from vlmflow.training import adapters
from vlmflow.training.recompute import recompute


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapted(kind):
    """Puts adapters on language model and encoders, moved away from their start so that they matter."""

    def attach(model):
        found = adapters.adaptable(model)
        spec = AdapterSpec(kind=kind, rank=3, alpha=6.0)
        made = adapters.attach(model, dict.fromkeys(sorted(found.weights), spec), seed=4)
        ours = {name for names in made.values() for name in names}
        torch.manual_seed(11)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in ours)
                if name in ours:
                    parameter.add_(torch.randn_like(parameter) * 0.05)

    return attach


def chunked(model):
    model.loss_rows = 16


FEATURES = {
    "plain": lambda model: None,
    "lora": adapted("lora"),
    "dora": adapted("dora"),
    "recompute": lambda model: recompute(model, FAMILY, ["vision", "vision.ocr", "language"]),
    "loss_rows": chunked,
    "dora, recompute, loss_rows": lambda model: (
        adapted("dora")(model), recompute(model, FAMILY, ["language"]), chunked(model)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "tie", "feature"),
    [("llama", False, "plain"), *(("qwen2", True, feature) for feature in FEATURES)],
)
def test_packed_equals_separate(model_type, tie, feature):
    """Also with every feature on the packed side or, where it changes what is computed, on both."""
    model = build(model_type, tie, attention="sdpa").train()
    if "lora" in feature or "dora" in feature:
        FEATURES[feature](model)
    parts = samples(model.config)
    losses, targets, logits = 0.0, 0, []
    for part in parts:
        single = pack([part])
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            single.pop(name)
        loss, count = packed_loss(model, single)
        loss.backward()
        losses, targets = losses + loss.item(), targets + count
        with torch.no_grad():
            logits.append(model(**{k: v for k, v in single.items() if k != "labels"}).logits[0])
    separate = gradients(model)
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation("vlmflow_varlen")
    if "lora" not in feature and "dora" not in feature:
        FEATURES[feature](model)
    batch = pack(parts)
    loss, count = packed_loss(model, batch)
    loss.backward()
    assert count == targets and loss.item() == pytest.approx(losses, rel=1e-6)
    together = gradients(model)
    assert together.keys() == separate.keys() and len(separate) > 20
    scale = max(g.abs().max().item() for g in separate.values())
    for name, gradient in separate.items():
        assert (together[name] - gradient).abs().max().item() <= 1e-5 * scale, name
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
    assert (packed - torch.cat(logits)).abs().max().item() < 1e-5


def test_a_segment_does_not_see_its_neighbours():
    model = build()
    parts = samples(model.config)
    before = model(**pack(parts)).logits[0]
    start, length = len(parts[0]["ids"]), len(parts[1]["ids"])
    changed = [dict(part) for part in parts]
    changed[0]["tiles"] = [255 - tile for tile in parts[0]["tiles"]]
    changed[3]["ids"] = [parts[3]["ids"][0], *parts[3]["ids"][1:-2], 5, 6]
    after = model(**pack(changed)).logits[0]
    assert torch.equal(before[start : start + length], after[start : start + length])
    assert not torch.allclose(before[:start], after[:start])


def test_order_of_segments_does_not_matter():
    model = build()
    parts = samples(model.config)
    forward, backward = packed_loss(model, pack(parts)), packed_loss(model, pack(parts[::-1]))
    assert forward[0].item() == pytest.approx(backward[0].item(), rel=1e-6) and forward[1] == backward[1]


SHORT_AND_LONG = [[3, 70, 1, 40, 8], [80, 70, 90], [7, 7, 7], [65, 3], [5, 9]]


@pytest.mark.parametrize("lengths", SHORT_AND_LONG, ids=str)
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_text_models_honour_varlen(model_type, lengths):
    """A plain causal language model with cu_seq_lens equals sdpa on each part, also in train mode."""
    register()
    config = AutoConfig.for_model(
        model_type, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="vlmflow_varlen").train()
    ids = torch.randint(0, 50, (1, sum(lengths)))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(input_ids=ids, position_ids=positions, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
                   max_length_q=max(lengths), max_length_k=max(lengths), use_cache=False).logits[0]  # fmt: skip
    model.set_attn_implementation("sdpa")
    alone = [model(input_ids=part, use_cache=False).logits[0] for part in ids.split(lengths, dim=1)]
    assert (packed - torch.cat(alone)).abs().max().item() < 1e-5


def test_sliding_window_is_kept():
    config = {"is_causal": True, "num_key_value_groups": 1}
    module = type("Module", (torch.nn.Module,), config)()
    query, key, value = torch.randn(3, 1, 2, 90, 8).unbind(0)
    bounds = torch.tensor([0, 80, 90], dtype=torch.int32)
    out, _ = varlen_attention_forward(module, query, key, value, None, sliding_window=4, cu_seq_lens_q=bounds)
    at = torch.arange(90)
    segment = (at >= 80).long()
    mask = (at[:, None] >= at) & (at[:, None] - at < 4) & (segment[:, None] == segment)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_the_cuda_call_fits_torch(monkeypatch, window):
    """The arguments for torch's varlen kernel bind to its signature and mean causal attention per segment."""
    import inspect

    import torch.nn.attention.varlen as varlen

    from vlmflow.models import attention

    signature = inspect.signature(varlen.varlen_attn)

    def reference(*args, **kwargs):
        a = signature.bind(*args, **kwargs).arguments
        assert a["enable_gqa"] and a["window_size"] == (-1 if window is None else window - 1, 0) and a["max_q"] == 9
        out = []
        for start, end in zip(a["cu_seq_q"].tolist(), a["cu_seq_q"].tolist()[1:], strict=False):
            parts = [a[name][start:end].transpose(0, 1) for name in ("query", "key", "value")]
            at = torch.arange(end - start)
            mask = at[:, None] >= at
            if window:
                mask &= at[:, None] - at <= a["window_size"][0]
            attend = torch.nn.functional.scaled_dot_product_attention
            out.append(attend(*parts, attn_mask=mask, scale=a["scale"], enable_gqa=True).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(varlen, "varlen_attn", reference)
    query, key, value = torch.randn(1, 4, 15, 8), torch.randn(1, 2, 15, 8), torch.randn(1, 2, 15, 8)
    bounds = torch.tensor([0, 9, 15], dtype=torch.int32)
    ours = attention._cuda(query, key, value, bounds, None, 0.3, window)
    assert torch.allclose(ours, attention._grouped(query, key, value, bounds, 0.0, 0.3, window), atol=1e-6)


def test_the_cuda_path_of_a_language_model_never_asks_the_device(monkeypatch):
    """Forward and backward through torch's real operator, whose kernel for shapes runs on the meta device. Nothing there
    has values, so a length that is read from a tensor (on CUDA a wait in every layer) would raise."""
    from vlmflow.models import attention
    from vlmflow.training.shape import blank

    calls = []

    def counted(*args):
        calls.append(args[0].shape)
        return kernel(*args)

    kernel = attention._cuda
    monkeypatch.setattr(attention, "_fits_kernel", lambda query, dropout: query.dtype == torch.bfloat16)
    monkeypatch.setattr(attention, "_cuda", counted)
    model = blank(build().config).train()
    model.set_attn_implementation("vlmflow_varlen")
    width = model.config.text_config.hidden_size
    bounds = {"cu_seq_lens_q": torch.empty(4, dtype=torch.int32, device="meta"), "max_length_q": 40}
    embeds = torch.empty(1, 100, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    positions = torch.empty(1, 100, dtype=torch.long, device="meta")
    for _ in range(2):
        out = model.model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **bounds).last_hidden_state
        out.sum().backward()
    assert len(calls) == 2 * model.config.text_config.num_hidden_layers and out.shape == embeds.grad.shape
    with pytest.raises(RuntimeError, match="meta"):
        model.model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False, cu_seq_lens_q=bounds["cu_seq_lens_q"]
        )


@pytest.mark.parametrize(
    ("width", "dtype", "dropout", "capability", "fits"),
    [
        (64, torch.bfloat16, 0.0, (9, 0), True),
        (72, torch.float16, 0.0, (8, 0), True),
        (256, torch.bfloat16, 0.0, (8, 6), True),
        (64, torch.float32, 0.0, (9, 0), False),
        (64, torch.bfloat16, 0.1, (9, 0), False),
        (20, torch.bfloat16, 0.0, (9, 0), False),
        (264, torch.bfloat16, 0.0, (9, 0), False),
        (64, torch.float16, 0.0, (7, 5), False),
    ],
)
def test_which_packs_the_cuda_kernel_takes(monkeypatch, width, dtype, dropout, capability, fits):
    from types import SimpleNamespace

    from vlmflow.models import attention

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 2, 9, width), device=torch.device("cuda", 0))
    assert attention._fits_kernel(query, dropout) == fits
    assert not attention._fits_kernel(torch.empty(1, 2, 9, width, dtype=dtype), dropout), "not on a CPU"


def test_training_after_scoring_the_same_pack():
    """Attention plans are kept; one made under inference_mode must still serve a backward pass."""
    from vlmflow.models import attention

    attention._plan.cache_clear()
    model = build()
    batch = pack(samples(model.config))
    with torch.inference_mode():
        scored, _ = packed_loss(model, batch)
    trained, _ = packed_loss(model, batch)
    trained.backward()
    assert scored.item() == trained.item()


def test_lengths_must_cover_the_row():
    model = build()
    batch = pack(samples(model.config))
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_q"][:-1]
    with pytest.raises(ValueError, match="cu_seq_lens runs from 0 to"):
        model(**batch)


def test_loss_matches_full_logits_and_chunks(monkeypatch):
    model = build()
    batch = pack(samples(model.config))
    full = model(**batch)
    summed, count = packed_loss(model, batch)
    assert full.targets.item() == count and full.logits.shape[1] == batch["input_ids"].shape[1]
    expected = torch.nn.functional.cross_entropy(full.logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
    assert summed.item() == pytest.approx(expected.item(), rel=1e-6)
    assert full.loss.item() == pytest.approx(expected.item() / count, rel=1e-6)
    summed.backward()
    whole = gradients(model)
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(modeling_points, "LOSS_ELEMENTS", 7 * model.config.text_config.vocab_size)
    chunked, _ = packed_loss(model, batch)
    chunked.backward()
    assert chunked.item() == pytest.approx(summed.item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, whole[name], atol=1e-4), name


def test_full_logits_are_never_built():
    model = build()
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    batch = pack(samples(model.config))
    _, count = packed_loss(model, batch)
    assert rows == [count] and count < batch["input_ids"].shape[1] / 2


def of_transformers(**config):
    made = AutoConfig.for_model("qwen2", **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                                "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40, **config})  # fmt: skip
    return AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize("rows", [None, 2])
def test_packed_loss_of_a_transformers_model(rows):
    """Families on transformers' own classes go through logits_to_keep."""
    model = of_transformers()
    model.loss_rows = rows
    ids = torch.randint(0, 40, (1, 15))
    labels = torch.where(torch.arange(15) % 3 == 0, ids, -100)
    labels[0, 0] = -100
    summed, count = packed_loss(model, {"input_ids": ids, "labels": labels})
    summed.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], reduction="sum")
    expected.backward()
    assert count == 4 and summed.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name
    none, count = packed_loss(model, {"input_ids": ids, "labels": torch.full_like(labels, -100)})
    none.backward()
    assert count == 0 and none.item() == 0
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match=r"final_logit_softcapping = 30\.0 behind its output layer"):
        packed_loss(model, {"input_ids": ids, "labels": labels})


def lost(model, batch):
    """(loss, gradients, peak bytes, largest tensor) of a forward and backward pass."""
    model.zero_grad(set_to_none=True)
    with Memory() as memory:
        summed, _ = packed_loss(model, batch)
        summed.backward()
    return summed.item(), gradients(model), memory.peak, memory.largest


def naive(model, batch):
    """The same from full logits of every position."""
    model.zero_grad(set_to_none=True)
    with Memory() as memory:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0, :-1].float()
        summed = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], reduction="sum")
        summed.backward()
    return summed.item(), gradients(model), memory.peak, memory.largest


@pytest.mark.parametrize("own", [True, False], ids=["points", "transformers"])
def test_loss_rows_bound_the_logits_and_change_nothing(own):
    """Against cross-entropy on full logits: equal, for a fraction of the memory. Both kinds of family."""
    rows, vocabulary = 32, 4096
    if own:
        model = build(tie=False)
        model.lm_head = torch.nn.Linear(48, vocabulary, bias=False)
    else:
        model = of_transformers(vocab_size=vocabulary)
    model.train()
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (1, 400))
    batch = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    full = naive(model, batch)
    whole = lost(model, batch)
    model.loss_rows = rows
    chunks = lost(model, batch)
    for found in (whole, chunks):
        assert found[0] == pytest.approx(full[0], rel=1e-6)
        scale = max(g.abs().max().item() for g in full[1].values())
        assert all((found[1][n] - g).abs().max().item() <= 1e-6 * scale for n, g in full[1].items())
    logits = 399 * vocabulary * 4
    assert full[3] >= logits and whole[3] >= logits
    assert chunks[3] <= vocabulary * max(rows, 48) * 4, "the head's weight or a chunk is the largest tensor"
    assert chunks[2] < whole[2] - 1.5 * logits, "logits and their gradient never exist together"


def test_chunks_start_by_themselves_above_a_number_of_logits(monkeypatch):
    """Automatic chunks, for both kinds of family; the head itself is called equally often however many there are."""
    seen, entropy = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional,
        "cross_entropy",
        lambda logits, *a, **k: seen.append(len(logits)) or entropy(logits, *a, **k),
    )
    for model in (build(), of_transformers()):
        head, calls = model.get_output_embeddings(), []
        head.register_forward_hook(lambda *_, c=calls: c.append(1))
        ids = torch.randint(0, 40, (1, 60))
        monkeypatch.setattr(modeling_points, "LOSS_ELEMENTS", 1 << 25)
        packed_loss(model, {"input_ids": ids, "labels": ids})
        whole = len(calls)
        monkeypatch.setattr(modeling_points, "LOSS_ELEMENTS", 16 * head.out_features)
        packed_loss(model, {"input_ids": ids, "labels": ids})
        assert seen[-5:] == [59, 16, 16, 16, 11] and len(calls) == 2 * whole


def test_a_long_pack_of_many_segments_builds_nothing_of_its_square():
    """8k tokens in 160 segments with images: no tensor comes near [N, N], as a bool mask of the pack would."""
    model = build().train()
    base = samples(model.config)
    parts, total = [], 0
    while total < 8192:
        part = base[len(parts) % len(base)]
        parts.append(part)
        total += len(part["ids"])
    batch = pack(parts)
    length = batch["input_ids"].shape[1]
    assert length >= 8192 and len(parts) > 50 and len(batch["pixel_values"]) > 50
    _, _, peak, largest = lost(model, batch)
    mask = length * length  # bytes of the smallest one, bool
    assert largest < mask / 4, f"{largest:,} bytes in one tensor, {peak:,} at the peak"


def test_tiles_of_a_batch_do_not_see_each_other():
    """Encoders take equal tiles as rows of a batch, so nothing of another tile is in reach: equal bits without it."""
    model = build().train()
    tiles = torch.randint(0, 256, (5, 56, 56, 3), dtype=torch.uint8)
    before = model.get_image_features(tiles)
    changed = tiles.clone()
    changed[2] = 255 - changed[2]
    after = model.get_image_features(changed)
    same = [torch.equal(before[i], after[i]) for i in range(5)]
    assert same == [True, True, False, True, True]
    alone = torch.cat([model.get_image_features(tile[None]) for tile in tiles])
    assert (alone - before).abs().max().item() < 1e-5


def test_no_targets_still_reaches_the_graph():
    model = build().train()
    batch = pack(samples(model.config))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, count = packed_loss(model, batch)
    loss.backward()
    assert count == 0 and loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
