"""NEFTune (arXiv 2310.05914): uniform noise on embeddings while training, of size alpha / sqrt(length * width).

Each sample of a pack gets the noise it would get alone: the length is that of its segment, not of the pack. The noise
enters through forward hooks, so no family knows of it, and only where a gradient is recorded in train mode: never in
evaluation, in reference passes or in what is published. Random numbers come from torch's own generator, which the loop
seeds by (seed, step, rank), so a resumed run repeats them.

A noise that silently never reaches the model has been seen elsewhere (spec: systems.md A.1), so it is measured where the
language model receives it: :meth:`Noise.norms`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmflow.errors import ModelError

if TYPE_CHECKING:
    import torch

    from vlmflow.models.family import Family
    from vlmflow.recipe.objective import NoiseSpec


class Noise:
    """Noise on a model's embeddings.

    Args:
        spec: ``text`` = on word embeddings, before image features replace those of the placeholders; ``merged`` = on what the
            language model reads, image features included.

    Raises:
        ModelError: the family does not say where its language model reads the embeddings.
    """

    def __init__(self, model: Any, family: Family, spec: NoiseSpec) -> None:
        if not family.language:
            raise ModelError(
                f"family '{family.name}' does not name its language model; `noise` cannot be placed or measured"
            )
        self.model, self.alpha = model, spec.alpha
        self.bounds: torch.Tensor | None = None
        self.added: tuple[torch.Tensor, torch.Tensor] | None = None
        self.squares: list[torch.Tensor] = []
        reader = model.get_submodule(family.language)
        self.hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            reader.register_forward_pre_hook(self._merged if spec.on == "merged" else self._arrived, with_kwargs=True),
        ]
        if spec.on == "text":
            self.hooks.append(model.get_input_embeddings().register_forward_hook(self._text))

    def norms(self) -> torch.Tensor | None:
        """(sum of the L2 norms of the samples' noise, samples) [2], fp64, of this rank's micro-batches since the last call;
        None without any.

        The norm of a sample is alpha / sqrt(3) in expectation on ``merged``, whatever length and width; on ``text`` that
        times the root of the share of text tokens.
        """
        import torch

        squares, self.squares = self.squares, []
        if not squares:
            return None
        found = torch.cat(squares).double().sqrt()
        return torch.stack([found.sum(), torch.full_like(found[0], len(found))])

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()

    def _active(self) -> bool:
        import torch

        return bool(self.model.training) and torch.is_grad_enabled()

    def _begin(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.bounds, self.added = kwargs.get("cu_seq_lens_q"), None

    def _lengths(self, embeds: torch.Tensor) -> torch.Tensor:
        import torch

        if self.bounds is None:  # rows of a batch instead of a pack
            return torch.full((embeds.shape[0],), embeds.shape[1], device=embeds.device)
        return self.bounds.to(embeds.device).diff().long()

    def _noisy(self, embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings [1, N, D] (or [B, N, D]) plus noise, in their dtype."""
        import torch

        lengths = self._lengths(embeds)
        size = self.alpha / (lengths.float() * embeds.shape[-1]).sqrt()
        rows = embeds.shape[0] * embeds.shape[1]  # told, or a GPU would be waited for to know it
        each = torch.repeat_interleave(size, lengths, output_size=rows).view(*embeds.shape[:-1], 1)
        uniform = torch.rand(embeds.shape, device=embeds.device, dtype=torch.float32) * 2 - 1
        noisy = embeds + (uniform * each).to(embeds.dtype)
        self.added = (noisy.detach(), (noisy.detach().float() - embeds.detach().float()).square().sum(-1))
        return noisy

    def _measure(self, received: torch.Tensor) -> None:
        """Note the noise of the tokens that reached the language model as they left the embeddings."""
        import torch

        assert self.added is not None
        noisy, squares = self.added
        kept = squares * (received.detach() == noisy).all(-1)
        lengths = self._lengths(noisy)
        numbers = torch.arange(len(lengths), device=lengths.device)
        segment = torch.repeat_interleave(numbers, lengths, output_size=squares.numel())
        self.squares.append(torch.zeros(len(lengths), device=kept.device).index_add_(0, segment, kept.flatten()))
        self.added = None

    def _text(self, _: Any, args: Any, embeds: torch.Tensor) -> torch.Tensor | None:
        return self._noisy(embeds) if self._active() else None

    def _arrived(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._active() and self.added is not None:
            self._measure(kwargs["inputs_embeds"])

    def _merged(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not self._active():
            return None
        noisy = self._noisy(kwargs["inputs_embeds"])
        self._measure(noisy)
        return args, {**kwargs, "inputs_embeds": noisy}
