"""NEFTune: the size of the noise, where it goes, that it repeats, and that it stays out of everything but training."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models_tiny
import pytest
import training_world as world

from vlmflow.recipe.objective import NoiseSpec

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

from vlmflow.models.loss import packed_loss  # noqa: E402
from vlmflow.training.noise import Noise  # noqa: E402

FAMILY = models_tiny.FAMILY


def received(model: Any, batch: dict[str, Any], seed: int = 0) -> Any:
    """What the language model reads."""
    seen: list[Any] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    torch.manual_seed(seed)
    packed_loss(model, batch)
    hook.remove()
    return seen[0][0]


@pytest.fixture
def model() -> Any:
    return models_tiny.build().train()


@pytest.fixture
def parts(model: Any) -> list[dict[str, Any]]:
    return models_tiny.samples(model.config)


@pytest.mark.parametrize("on", ["text", "merged"])
def test_every_segment_has_the_noise_of_its_own_length(model: Any, parts: list[dict[str, Any]], on: Any) -> None:
    batch = models_tiny.pack(parts)
    clean = received(model, batch)
    noise = Noise(model, FAMILY, NoiseSpec(alpha=5.0, on=on))
    added = received(model, batch) - clean
    image = batch["input_ids"][0] == model.config.image_token_id
    width = clean.shape[1]
    norms = []
    for start, end in zip(batch["cu_seq_lens_q"].tolist(), batch["cu_seq_lens_q"].tolist()[1:], strict=False):
        size = 5.0 / math.sqrt((end - start) * width)
        mine, pictures = added[start:end], image[start:end]
        words = mine[~pictures]
        assert words.abs().max() <= size * 1.0001 and words.abs().max() > 0.98 * size
        assert words.std() == pytest.approx(size / math.sqrt(3), rel=0.05)
        if pictures.any():
            assert mine[pictures].any() == (on == "merged")
        norms.append(mine.norm().item())
    found = noise.norms()
    assert found.tolist() == pytest.approx([sum(norms), len(norms)], rel=1e-4)
    assert noise.norms() is None, "read once"
    if on == "merged":
        assert norms == pytest.approx([5.0 / math.sqrt(3)] * len(parts), rel=0.1)


def test_noise_repeats_by_seed_and_reaches_the_gradient(model: Any, parts: list[dict[str, Any]]) -> None:
    batch = models_tiny.pack(parts)
    Noise(model, FAMILY, NoiseSpec())
    one, again, other = received(model, batch, 1), received(model, batch, 1), received(model, batch, 2)
    assert torch.equal(one, again) and not torch.equal(one, other)
    loss, _ = packed_loss(model, batch)
    loss.backward()
    assert model.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize("on", ["text", "merged"])
def test_neither_evaluation_nor_reference_passes_see_it(model: Any, parts: list[dict[str, Any]], on: Any) -> None:
    batch = models_tiny.pack(parts)
    clean = packed_loss(model, batch)[0].item()
    noise = Noise(model, FAMILY, NoiseSpec(on=on))
    with torch.no_grad():
        assert packed_loss(model, batch)[0].item() == clean
    assert packed_loss(model.eval(), batch)[0].item() == clean
    assert noise.norms() is None
    assert packed_loss(model.train(), batch)[0].item() != clean
    noise.remove()
    assert packed_loss(model, batch)[0].item() == clean


def test_rows_of_a_batch_have_the_noise_of_a_row(model: Any) -> None:
    noise = Noise(model, FAMILY, NoiseSpec(alpha=3.0))
    ids = torch.arange(40).view(2, 20)
    model(input_ids=ids)
    assert noise.norms().tolist() == pytest.approx([2 * 3.0 / math.sqrt(3), 2], rel=0.05)


def test_noise_that_never_arrives_is_measured_as_nothing(model: Any, parts: list[dict[str, Any]]) -> None:
    """The case that was seen elsewhere: embeddings are noised and something else is read."""
    batch = models_tiny.pack(parts)
    noise = Noise(model, FAMILY, NoiseSpec())
    model.model.embed = lambda *args, **kwargs: torch.zeros_like(type(model.model).embed(model.model, *args, **kwargs))
    packed_loss(model, batch)
    assert noise.norms().tolist() == [0.0, len(parts)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("noise")
    init = world.initial(world.context(root, world.recipe()))
    return SimpleNamespace(root=root, init=init, data=world.dataset(root, [world.sample(i) for i in range(16)]))


def train(place: Any, name: str, stop_first: bool = False, **stage: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from safetensors.torch import load_file

    from vlmflow.training import run as training
    from vlmflow.training.trainer import Preempted, Trainer

    ctx = world.context(place.root / name, world.recipe(**stage))
    spec = training.stage_of(ctx.recipe, "sft")
    job = training._job(ctx, name, name, spec, list(spec.data), place.init, {"seed": place.data})
    job = job.model_copy(update={"tracking": {}})
    if stop_first:
        stop = threading.Event()
        stop.set()
        with pytest.raises(Preempted):
            Trainer(job, rendezvous=f"file://{job.work}/meeting", stop=stop).run()
    Trainer(job, rendezvous=f"file://{job.work}/meeting").run()
    log = [json.loads(line) for line in Path(job.log).read_text().splitlines()]
    return load_file(job.out / "model.safetensors"), log


def test_resumed_noise_is_the_same_bits_and_the_log_shows_it(place: Any) -> None:
    noise = {"noise": {"alpha": 5.0, "on": "merged"}}
    whole, log = train(place, "whole", **noise)
    resumed, _ = train(place, "resumed", stop_first=True, **noise)
    without, quiet = train(place, "without")
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert any(not torch.equal(whole[n], without[n]) for n in whole)
    assert all(r["noise_norm"] == pytest.approx(5.0 / math.sqrt(3), rel=0.1) for r in log)
    assert all("noise_norm" not in r for r in quiet)
