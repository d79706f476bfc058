"""POINTS as a transformers model: two CLIP encoders, one shared projector, a causal language model (points.md 2.1).

Training code for POINTS was never released and its chat class has no `forward`; this one trains, packs, generates,
saves and exports like any other `PreTrainedModel`. It imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, CLIPVisionModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput

from .configuration_points import PointsConfig

# Target rows x vocabulary above which the loss is computed in recomputed chunks instead of one matrix (fp32 logits).
LOSS_ELEMENTS = 1 << 25


@dataclass
class PointsOutput(ModelOutput):
    """Output of POINTS. `loss_sum` is the nats summed over `targets` targets; `loss` their quotient (or by request)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    last_hidden_state: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    targets: torch.Tensor | None = None


class PointsProjector(nn.Module):
    """Linear, GELU, Linear with biases: [.., shuffle^2 * vision width] -> [.., language width]."""

    def __init__(self, config: PointsConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size * config.shuffle**2, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


def pixel_shuffle(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Merge factor x factor neighbours: [T, side*side, C] -> [T, (side/factor)^2, factor^2 * C].

    The channels of one output token are its block in row-major order: top-left, top-right, bottom-left, bottom-right.
    """
    tiles, patches, width = features.shape
    side = int(patches**0.5)
    half = side // factor
    blocks = features.view(tiles, half, factor, half, factor, width).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(tiles, half * half, factor * factor * width)


def target_loss(
    hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module, rows: int | None = None, reduction: str = "sum"
) -> torch.Tensor:
    """Cross-entropy in nats of rows `hidden` [n, D] against `labels` [n], in fp32: summed, or [n] with "none".

    Only target rows ever meet the head; above `rows` of them (default: LOSS_ELEMENTS logits) they do so in chunks whose
    logits are recomputed in the backward pass, so the full [n, V] matrix never exists. The head is called once, with the
    chunks inside: ZeRO 3 gathers a module's weights around each call and needs equally many calls on every rank, whatever
    their targets.
    """
    logits = head.forward

    def piece(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits(rows).float(), values, reduction=reduction)

    def whole(hidden: torch.Tensor) -> torch.Tensor:
        vocabulary: Any = head.out_features
        most = rows or max(1, LOSS_ELEMENTS // vocabulary)
        if hidden.shape[0] <= most:
            return piece(hidden, labels)
        parts = [
            checkpoint(piece, hidden[i : i + most], labels[i : i + most], use_reentrant=False)
            for i in range(0, hidden.shape[0], most)
        ]
        return torch.cat(parts) if reduction == "none" else torch.stack(parts).sum()

    head.forward = whole  # type: ignore[method-assign]
    try:
        return head(hidden)
    finally:
        del head.forward


class PointsPreTrainedModel(PreTrainedModel):
    config_class = PointsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _no_split_modules = ["CLIPEncoderLayer", "CLIPVisionEmbeddings"]  # noqa: RUF012
    input_modalities = ("image", "text")  # type: ignore[assignment]


class PointsModel(PointsPreTrainedModel):
    """Encoders, projector and the language model without its head."""

    def __init__(self, config: PointsConfig) -> None:
        super().__init__(config)
        self.vision_tower = trim_tower(CLIPVisionModel(config.vision_config))
        self.vision_tower_ocr = trim_tower(CLIPVisionModel(config.vision_ocr_config))
        self.multi_modal_projector = PointsProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [T, S, S, 3] -> normalised [T, 3, S, S] in the encoders' dtype, on the device; floats pass through."""
        weight = next(self.vision_tower.embeddings.patch_embedding.parameters())
        if pixels.dtype != torch.uint8:
            return pixels.to(device=weight.device, dtype=weight.dtype)
        mean = torch.tensor(self.config.image_mean, device=weight.device).view(1, 3, 1, 1)
        std = torch.tensor(self.config.image_std, device=weight.device).view(1, 3, 1, 1)
        scaled = pixels.to(weight.device).permute(0, 3, 1, 2).float().div_(255.0)
        return scaled.sub_(mean).div_(std).to(weight.dtype)

    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> torch.Tensor:
        """Tiles (uint8 [T, S, S, 3] or normalised float [T, 3, S, S]) -> language-width features [T, tokens, D].

        Each encoder's penultimate hidden state (no class token, no post-layernorm) is shuffled and projected by the
        shared projector; the projected features are averaged with `ocr_weight`. Frozen encoders record no graph.
        """
        config = self.config
        pixels = self.normalise(pixel_values)
        weight = config.ocr_weight
        total: torch.Tensor | None = None
        for tower, share in ((self.vision_tower, 1.0 - weight), (self.vision_tower_ocr, weight)):
            if share == 0.0 and not self.training:
                continue
            trains = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
            with torch.set_grad_enabled(trains):
                features = _penultimate(tower, pixels)
            projected = self.multi_modal_projector(pixel_shuffle(features, config.shuffle)) * share
            total = projected if total is None else total + projected
        assert total is not None
        return total

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None = None,
        dummy_tiles: int = 0,
        tile_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings [B, N, D] with image features written over the placeholder positions, in reading order.

        The last `dummy_tiles` tiles belong to no token: their features enter with weight zero, so that a text-only
        micro-batch still runs the encoders' collectives. `tile_index` int64 [T] is the tile at each place, where places
        show the same one: it is encoded once and its gradients are summed. Raises ValueError naming both counts on a
        mismatch.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if image_features is None and pixel_values is not None and pixel_values.shape[0] > 0:
            image_features = self.get_image_features(pixel_values)
        mask = input_ids == self.config.image_token_id
        places = int(mask.sum())
        if image_features is None:
            if places:
                raise ValueError(
                    f"POINTS: the ids hold {places} image tokens but no pixels were given; "
                    "pass pixel_values, or remove the image tokens from the text"
                )
            return embeds
        features = image_features.to(device=embeds.device, dtype=embeds.dtype)
        if dummy_tiles:
            embeds = embeds + features[-dummy_tiles:].sum() * 0.0
            features = features[:-dummy_tiles]
        if tile_index is not None:
            features = features.index_select(0, tile_index.to(features.device))
        flat = features.reshape(-1, features.shape[-1])
        if flat.shape[0] != places:
            raise ValueError(
                f"POINTS: the ids hold {places} image tokens but the {features.shape[0]} tiles give {flat.shape[0]} "
                f"features ({self.config.tokens_per_tile} a tile); the sample was truncated inside an image or tiled "
                "with other limits than it was tokenised with"
            )
        return embeds.masked_scatter(mask.unsqueeze(-1), flat) if places else embeds

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        dummy_tiles: int = 0,
        tile_index: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """As the language model's forward, on embeddings that contain the image features."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("POINTS: give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, pixel_values, image_features, dummy_tiles, tile_index)
        varlen = self.language_model.config._attn_implementation == "vlmflow_varlen"
        if varlen and attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
            # A ready 4-D mask is passed on as it is: no dense [N, N] mask is built; the attention ignores it.
            attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs_embeds.device)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class PointsForConditionalGeneration(PointsPreTrainedModel, GenerationMixin):
    """POINTS with its language head; trains on packed sequences and generates with a cache."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_only = True
    loss_rows: int | None = None  # rows of logits in memory at once while training; None = up to LOSS_ELEMENTS logits

    def __init__(self, config: PointsConfig) -> None:
        super().__init__(config)
        self.model = PointsModel(config)
        embeddings = self.model.get_input_embeddings()
        name = next(n for n, m in self.model.named_modules() if m is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `PointsModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_only: bool = False,
        target_losses: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PointsOutput:
        """Logits [B, N, V] and, with `labels` [B, N] (-100 = no target, not shifted), the loss.

        Packed training: one row, `position_ids` restarting per segment, `cu_seq_lens_q/k` int32 with a leading 0,
        `max_length_q/k`, `use_cache=False`, no attention mask, attention implementation `vlmflow_varlen`; `tile_index`
        where segments show the same tiles (see `PointsModel.embed`). A label at
        the first token of a segment is ignored by construction of the labels (Family.labels), so no target crosses.

        `loss` = summed nats / `num_items_in_batch` (default: the targets here). `loss_only` computes the head on the
        target rows alone and returns no logits. `target_losses` gives the nats of each target [n], in order, as
        `loss_sum` and `loss`, undivided.
        """
        if labels is not None:
            kwargs.setdefault("use_cache", False)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits = loss = loss_sum = targets = None
        if not loss_only:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else None
            if isinstance(logits_to_keep, torch.Tensor):
                kept = hidden[:, logits_to_keep]
            else:
                kept = hidden if keep is None else hidden[:, keep]
            logits = self.lm_head(kept)
        if labels is not None:
            wanted = labels[:, 1:] != -100
            values = labels[:, 1:][wanted]
            targets = wanted.sum()
            if values.numel():
                reduction = "none" if target_losses else "sum"
                loss_sum = target_loss(hidden[:, :-1][wanted], values, self.lm_head, self.loss_rows, reduction)
            else:  # no target: zero that still reaches every parameter's graph, so that no rank waits for another
                zero = self.lm_head(hidden[:, :1]).float().sum() * 0.0
                loss_sum = zero.reshape(1)[:0] if target_losses else zero
            items = targets.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = loss_sum if target_losses else loss_sum / items
        return PointsOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            last_hidden_state=hidden,
            loss_sum=loss_sum,
            targets=targets,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Pixels are fed at the prefill only; without a cache they are needed at every step."""
        prepare: Callable[..., dict[str, Any]] = GenerationMixin.prepare_inputs_for_generation
        inputs = prepare(self, *args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs["pixel_values"] = inputs["image_features"] = None
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Beams and several returned sequences: the tiles of one row stay together."""
        pixels = kwargs.pop("pixel_values", None)
        if expand_size > 1 and pixels is not None and input_ids is not None:
            places = (input_ids == self.config.image_token_id).sum(dim=1) // self.config.tokens_per_tile
            blocks = torch.split(pixels, places.tolist())
            pixels = torch.cat([block for block in blocks for _ in range(expand_size)])
        expand: Callable[..., Any] = GenerationMixin._expand_inputs_for_generation
        input_ids, model_kwargs = expand(
            self, expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixels is not None:
            model_kwargs["pixel_values"] = pixels
        return input_ids, model_kwargs


def trim_tower(tower: CLIPVisionModel) -> CLIPVisionModel:
    """Take from a CLIP encoder what POINTS never uses: the last layer and the post-layernorm (they would get no
    gradient, waste optimizer state and make data-parallel training report unused parameters)."""
    tower.encoder.layers = tower.encoder.layers[:-1]
    tower.post_layernorm = nn.Identity()  # type: ignore[assignment]
    return tower


def _penultimate(tower: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """Penultimate hidden state without the class token: [T, 3, S, S] -> [T, patches, C]."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
    return hidden[:, 1:]


__all__ = ["PointsForConditionalGeneration", "PointsModel", "PointsPreTrainedModel"]
