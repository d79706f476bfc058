"""The POINTS model: features as the paper's code makes them, frozen parts, saving, composition from sources."""

import pytest
import torch
from models_tiny import FAMILY, LANGUAGE, VISION, build, pack, samples, spec, tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from vlmflow.errors import ModelError
from vlmflow.models import family, load_model
from vlmflow.models.initial import save
from vlmflow.models.loss import packed_loss
from vlmflow.models.points.configuration_points import PointsConfig
from vlmflow.models.points.modeling_points import PointsForConditionalGeneration, pixel_shuffle


def test_pixel_shuffle_order():
    """One token = top-left, top-right, bottom-left, bottom-right of its 2x2 block (points.md 2.1)."""
    grid = torch.arange(16.0).view(1, 16, 1)
    assert pixel_shuffle(grid, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_features_are_the_penultimate_hidden_state_of_both_encoders(tmp_path):
    towers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tower = CLIPVisionModel(CLIPVisionConfig(image_size=56, **VISION)).eval()
        tower.save_pretrained(tmp_path / str(seed))
        towers.append(tower)
    model = FAMILY.build(
        spec(vision={"source": str(tmp_path / "1")}, vision_ocr={"source": str(tmp_path / "2")}, ocr_weight=0.25),
        tokenizer(),
    )
    pixels = torch.randn(3, 3, 56, 56)
    projected = []
    for tower in towers:
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        projected.append(model.model.multi_modal_projector(pixel_shuffle(hidden, 2)))
    expected = 0.75 * projected[0] + 0.25 * projected[1]
    assert torch.allclose(model.get_image_features(pixels), expected, atol=1e-6)


def test_uint8_pixels_are_normalised_on_the_device():
    model = build()
    pixels = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.config.image_mean, model.config.image_std))
    floats = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    assert torch.allclose(model.get_image_features(pixels), model.get_image_features(floats), atol=1e-6)


def test_every_parameter_gets_a_gradient_except_the_unused():
    import re

    model = build().train()
    packed_loss(model, pack(samples(model.config)))[0].backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The key bias shifts all scores of a query alike, so its gradient is zero up to rounding; it still has one.
    without = [n for n in without if not n.endswith("k_proj.bias")]
    assert without == [n for n, _ in model.named_parameters() if any(re.match(u, n) for u in FAMILY.unused)]


def test_roles_cover_every_parameter_once():
    import re

    model = build()
    for name, _ in model.named_parameters():
        owners = [role for role, patterns in FAMILY.roles.items() if any(re.match(p, name) for p in patterns)]
        assert len(owners) == 1, (name, owners)


def test_layers_number_the_blocks():
    import re

    model = build()
    names = [name for name, _ in model.named_parameters()]
    found = {role: {int(m[1]) for n in names if (m := re.match(FAMILY.layers(role), n))} for role in FAMILY.numbered}
    assert found == {"vision": {0, 1}, "vision.ocr": {0, 1}, "language": {0, 1}}
    with pytest.raises(ModelError, match="projector"):
        FAMILY.layers("projector")


def test_frozen_towers_record_no_graph():
    model = build().train()
    for tower in (model.model.vision_tower, model.model.vision_tower_ocr):
        tower.requires_grad_(False)
    seen = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    packed_loss(model, pack(samples(model.config)))[0].backward()
    assert seen == [False]
    assert all(p.grad is None for p in model.model.vision_tower.parameters())
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())


def test_only_the_last_layer_of_a_tower_trains():
    model = build().train()
    model.requires_grad_(False)
    model.model.vision_tower.encoder.layers[-1].requires_grad_(True)
    packed_loss(model, pack(samples(model.config)))[0].backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and all(n.startswith("model.vision_tower.encoder.layers.1.") for n in with_gradient)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*")
def test_gradient_checkpointing_gives_the_same_gradients():
    model = build().train()
    batch = pack(samples(model.config))
    packed_loss(model, batch)[0].backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    packed_loss(model, batch)[0].backward()
    assert all(torch.allclose(before[n], p.grad, atol=1e-5) for n, p in model.named_parameters())


def test_count_mismatch_names_both_numbers():
    model = build()
    batch = pack(samples(model.config))
    places = int((batch["input_ids"] == model.config.image_token_id).sum())
    batch["pixel_values"] = batch["pixel_values"][:-1]
    with pytest.raises(ValueError, match=rf"{places} image tokens but the \d+ tiles give {places - 4} features"):
        model(**batch)
    with pytest.raises(ValueError, match="no pixels were given"):
        model(input_ids=batch["input_ids"])


def test_dummy_tile_changes_nothing_but_reaches_the_encoders():
    model = build().train()
    part = samples(model.config)[2]
    batch = pack([part])
    plain = packed_loss(model, batch)[0]
    batch |= {"pixel_values": torch.zeros(1, 56, 56, 3, dtype=torch.uint8), "dummy_tiles": 1}
    dummy = packed_loss(model, batch)[0]
    dummy.backward()
    assert plain.item() == dummy.item()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.vision_tower.parameters())


@pytest.mark.parametrize("tie", [True, False])
def test_save_and_load_keep_the_logits(tmp_path, tie):
    model = build(tie=tie)
    save(model, tokenizer(), tmp_path)
    again, loaded_tokenizer = load_model(tmp_path)
    assert isinstance(again, PointsForConditionalGeneration)
    assert loaded_tokenizer.get_vocab() == tokenizer().get_vocab()
    batch = pack(samples(model.config))
    assert torch.equal(model(**batch).logits, again(**batch).logits)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tie
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(auto.config, PointsConfig) and auto.config.to_dict() == again.config.to_dict()
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert (processor.tile, processor.max_tiles, processor.tokens_per_tile) == (56, 3, 4)


def test_same_seed_same_weights():
    one, two, three = build(seed=5), build(seed=5), build(seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.model.language_model.layers[0].mlp.up_proj.weight,
                           three.model.language_model.layers[0].mlp.up_proj.weight)  # fmt: skip


def test_broken_folder_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="cannot load a model"):
        load_model(tmp_path)
    model = build()
    del model.model.multi_modal_projector.linear_2
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="linear_2"):
        load_model(tmp_path)


def test_unknown_family_lists_the_known():
    with pytest.raises(ModelError, match="known: points"):
        family("clip")


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_composition_from_sources_copies_the_weights(tmp_path, model_type):
    """A full CLIP checkpoint (text tower and projections included) and a language model with a smaller vocabulary."""
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(
        vision_config={"image_size": 56, **VISION},
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
    ))  # fmt: skip
    clip.save_pretrained(tmp_path / "clip")
    size = len(tokenizer())
    language = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, vocab_size=size - 1, tie_word_embeddings=False, **LANGUAGE)
    )
    language.save_pretrained(tmp_path / "language")
    source = {"source": str(tmp_path / "clip")}
    model = FAMILY.build(
        spec(vision=source, vision_ocr=source, language={"source": str(tmp_path / "language")}), tokenizer()
    )
    ours = model.model.vision_tower.state_dict()
    theirs = {
        k: v for k, v in clip.vision_model.state_dict().items() if "post_layernorm" not in k and ".layers.2." not in k
    }
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert model.model.vision_tower is not model.model.vision_tower_ocr
    decoder = language.base_model.state_dict()
    for name, value in model.model.language_model.state_dict().items():
        assert torch.equal(value[: size - 1] if name.startswith("embed_tokens") else value, decoder[name]), name
    assert torch.equal(model.lm_head.weight[: size - 1], language.lm_head.weight)
    assert model.config.text_config.vocab_size == size == model.lm_head.weight.shape[0]
    save(model, tokenizer(), tmp_path / "whole")
    again, _ = load_model(tmp_path / "whole")
    batch = pack(samples(model.config))
    model.set_attn_implementation("vlmflow_varlen")
    assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_full_size_shapes_on_the_meta_device():
    """CLIP-L/14-336 twice and Yi-1.5-9B's shape: 33.6M projector parameters, 144 tokens a tile (points.md 2.1)."""
    config = PointsConfig(
        text_config={"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 48,
                     "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 64000},
    )  # fmt: skip
    with torch.device("meta"):
        model = PointsForConditionalGeneration(config)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    assert count["multi_modal_projector"] == 33_562_624
    clip, last_layer, post_layernorm = 303_507_456, 12_596_224, 2048
    assert count["vision_tower"] == count["vision_tower_ocr"] == clip - last_layer - post_layernorm
    assert config.tokens_per_tile == 144 and FAMILY.tiles_for(1920, 1080, config) * 144 == 1296


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tiling": {"tile": 112, "max_tiles": 3}, "vision": {"config": {**VISION, "image_size": 56}}},
            "56 px but tile is 112",
        ),
        ({"vision_ocr": {"config": {**VISION, "hidden_size": 64}}}, "hidden_size is 32 .* and 64"),
        ({"language": {"config": {"model_type": "qwen2", "vocab_size": 8, **LANGUAGE}}}, "vocab_size is 8"),
        ({"language": {"source": "/nowhere/model"}}, "/nowhere/model"),
        ({"vision": {"source": "/nowhere/clip"}}, "/nowhere/clip"),
    ],
)
def test_parts_that_do_not_fit_say_why(change, message):
    with pytest.raises(ModelError, match=message):
        FAMILY.build(spec(**change), tokenizer())
