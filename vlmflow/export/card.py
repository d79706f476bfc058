"""The model card: what the model is, from what it was made, what it scored, and how to run it.

Every number comes from manifests, recipe, soup and scores of this very model; there is no free text to fill in and
nothing in it depends on clock, host or checkout, so the same model gives the same card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import vlmflow
from vlmflow.registry.gates import of_row
from vlmflow.registry.rows import ScoreRow

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.models.store import ModelRef
    from vlmflow.recipe import Recipe

SMALL = 1_000_000_000  # parameters below which a model that started at random is called a demonstration


@dataclass(frozen=True)
class CardInputs:
    """What a card tells. `rows` is the score table, `final` the row of this model, `parameters` their number."""

    recipe: Recipe
    recipe_digest: str
    model: ModelRef
    rows: list[ScoreRow]
    final: str
    parameters: int
    datasets: Mapping[str, Manifest] = field(default_factory=dict)
    soup: dict[str, Any] = field(default_factory=dict)


def render(inputs: CardInputs) -> str:
    """The card as Markdown with YAML front matter."""
    parts = [
        _front(inputs),
        _about(inputs),
        _scores(inputs),
        USAGE,
        _data(inputs),
        _training(inputs),
        _identity(inputs),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


USAGE = """\
## Usage

Needs torch, transformers and pillow only; the code of the model is in this folder.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(images=[Image.open("image.png")], text=text, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`SHA256SUMS` lists every file; check with `sha256sum -c SHA256SUMS`."""


def _front(inputs: CardInputs) -> str:
    lines = [
        "---",
        f"license: {_yaml(inputs.recipe.export.licence)}",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags:",
        "- vlmflow",
        f"- {_yaml(inputs.recipe.model.family)}",
        "---",
    ]
    return "\n".join(lines)


def _about(inputs: CardInputs) -> str:
    recipe = inputs.recipe
    lines = [f"# {recipe.name}", ""]
    if recipe.description:
        lines += [recipe.description, ""]
    lines += [
        f"A vision-language model of the {recipe.model.family.upper()} family (arXiv 2409.04828) with "
        f"{inputs.parameters:,} parameters, trained by vlmflow from the recipe `{recipe.name}`. Images are cut into tiles of "
        f"{recipe.model.tiling.tile} pixels, at most {recipe.model.tiling.max_tiles} plus a thumbnail."
    ]
    parts = {"vision": recipe.model.vision, "vision_ocr": recipe.model.vision_ocr, "language": recipe.model.language}
    lines += ["", "| part | start |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(part.source or 'random weights')} |" for name, part in parts.items()]
    random = [name for name, part in parts.items() if not part.source]
    if random and inputs.parameters < SMALL:
        lines += [
            "",
            f"> **A demonstration, not a product.** {', '.join(random)} started from random weights and the model is small. "
            "It shows that the recipe works end to end; outside the data named below expect nonsense.",
        ]
    return "\n".join(lines)


def _scores(inputs: CardInputs) -> str:
    """Chance, then every evaluated model; this one in bold."""
    if not inputs.rows:
        return ""
    benchmarks = sorted({row.benchmark for row in inputs.rows})
    first = {name: next(row for row in inputs.rows if row.benchmark == name) for name in benchmarks}
    split = inputs.rows[0].split
    held = "the soup was chosen on other questions" if split == "report" else "the soup was chosen on these questions"
    head = [f"{_cell(name)} (n = {first[name].n})" for name in benchmarks]
    lines = [
        "## Scores",
        "",
        f"Accuracy in percent on the {split} split ({held}), in brackets the Wilson 95 % interval. "
        "`untrained` is the model before any training.",
        "",
        f"| model | {' | '.join(head)} |",
        f"| --- |{' --- |' * len(benchmarks)}",
        f"| chance | {' | '.join(f'{100 * first[name].chance:.1f}' for name in benchmarks)} |",
    ]
    for name in dict.fromkeys(row.row for row in inputs.rows):
        found = of_row(inputs.rows, name)
        cells = [_score(found.get(benchmark)) for benchmark in benchmarks]
        label = f"**{_cell(name)} (this model)**" if name == inputs.final else _cell(name)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _score(row: ScoreRow | None) -> str:
    return (
        f"{100 * row.score:.1f} [{100 * row.interval[0]:.1f}, {100 * row.interval[1]:.1f}]" if row else "not measured"
    )


def _data(inputs: CardInputs) -> str:
    if not inputs.datasets:
        return ""
    lines = ["## Data", "", "| dataset | samples | sources | manifest |", "| --- | --- | --- | --- |"]
    for name, manifest in sorted(inputs.datasets.items()):
        lines.append(f"| {name} | {manifest.samples} | {_cell(', '.join(manifest.sources))} | `{manifest.digest}` |")
    steps = []
    for name, manifest in sorted(inputs.datasets.items()):
        for layer, ref in sorted(manifest.layers.items()):
            steps.append(f"| {name} | {layer} | {_cell(_flat(ref.summary))} | `{ref.digest[:16]}` |")
    if steps:
        lines += [
            "",
            "What curation computed on it:",
            "",
            "| dataset | layer | summary | digest |",
            "| --- | --- | --- | --- |",
        ]
        lines += steps
    return "\n".join(lines)


def _training(inputs: CardInputs) -> str:
    recipe = inputs.recipe
    stages = {**({"bootstrap": recipe.bootstrap} if recipe.bootstrap else {}), **recipe.stages}
    lines = ["## Training", "", "| stage | trained parts (peak learning rate) | data | schedule | length | precision |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, stage in stages.items():
        trained = ", ".join(
            f"{rule.modules}{f' last {rule.last}' if rule.last else ''} ({rule.lr:g})" for rule in stage.train
        )
        data = ", ".join(
            f"{use.dataset}: {use.text}{' (kept)' if use.keep else ''} x {use.weight:g}" for use in stage.data
        )
        schedule = f"{stage.schedule.name}, warm-up {stage.schedule.warmup:g}"
        length = f"{stage.epochs:g} epochs" + (f", at most {stage.max_steps} steps" if stage.max_steps else "")
        length += f", {stage.packs} packs of {stage.budget.tokens} tokens a step"
        lines.append(f"| {name} | {_cell(trained)} | {_cell(data)} | {schedule} | {length} | {stage.dtype} |")
    lines += _soup(inputs)
    return "\n".join(lines)


def _soup(inputs: CardInputs) -> list[str]:
    """Which soup this is, its ingredients, and the decisions of the greedy search on the selection split."""
    soup = inputs.soup
    if not soup:
        return []
    lines = ["", "### Model soup", "", f"Chosen: `{soup.get('chosen', '')}`."]
    if soup.get("ingredients"):
        lines += ["", "| ingredient | weights |", "| --- | --- |"]
        lines += [f"| {_cell(name)} | `{sha}` |" for name, sha in sorted(soup["ingredients"].items())]
    if soup.get("trace"):
        lines += [
            "",
            "Greedy search (accuracy on the selection split):",
            "",
            "| step | candidate | before | after | accepted |",
        ]
        lines.append("| --- | --- | --- | --- | --- |")
        for step in soup["trace"]:
            before = "" if step.get("before") is None else f"{100 * step['before']:.1f}"
            accepted = "yes" if step.get("accepted") else "no"
            lines.append(
                f"| {step['step']} | {_cell(step['candidate'])} | {before} | {100 * step['after']:.1f} | {accepted} |"
            )
    return lines


def _identity(inputs: CardInputs) -> str:
    lineage = inputs.model.lineage
    lines = [
        "## Identity",
        "",
        f"- weights: `{inputs.model.weights_sha256}`",
        f"- made by: {lineage.step}{f' ({lineage.stage})' if lineage.stage else ''}",
        f"- parents: {', '.join(f'`{parent}`' for parent in lineage.parents) or 'none'}",
        f"- common ancestor: `{lineage.ancestor}`",
        f"- recipe: `{inputs.recipe_digest}`",
        f"- vlmflow: {vlmflow.__version__}",
    ]
    return "\n".join(lines)


def _flat(summary: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in sorted(summary.items()) if isinstance(v, (int, float, str, bool))}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _yaml(text: str) -> str:
    return text if text.replace("-", "").replace(".", "").isalnum() else json.dumps(text)
