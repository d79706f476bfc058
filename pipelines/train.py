"""One training stage of a recipe, from a given model and given datasets."""

from kfp import dsl

from components.initial import initial
from components.preflight import preflight
from components.train import train as train_stage
from pipelines import parts
from pipelines.platform import once, repeatable


@dsl.pipeline(name="vlmflow-train", display_name="Training: one stage from a given model")
def train(
    recipe: str,
    model: str,
    stage: str,
    candidate: str = "",
    seed: str = "",
    web: str = "",
    sft: str = "",
    overrides: list = [],  # noqa: B006
):
    """Train one stage of the recipe.

    Args:
        recipe: Recipe (YAML or JSON), as a path in the image or a URI in the object store, such as s3://bucket/recipe.yaml.
        model: Model to start from: URI of its folder, or a registered version such as models:/NAME/3.
        stage: Name of the stage in the recipe; `bootstrap` is the recipe's section of that name.
        candidate: Soup candidate whose data is added to the stage's own, or empty.
        seed: URI of the manifest of dataset `seed`; empty = pulled by the recipe if the stage uses it.
        web: URI of the manifest of dataset `web`, as `curate` seals it; empty = pulled by the recipe, without any layer, if the
            stage uses it.
        sft: URI of the manifest of dataset `sft`; empty = pulled by the recipe if the stage uses it.
        overrides: Changes to the recipe, each `section.key=value`, such as ["stages.sft.epochs=2"].
    """
    given = {"seed": seed, "web": web, "sft": sft}
    with parts.finished():
        checked = once(
            preflight(
                source=recipe,
                overrides=overrides,
                pipeline="train",
                model=model,
                stage=stage,
                candidate=candidate,
                **given,
            )
        )
        resolved = checked.outputs["recipe"]
        start = once(initial(recipe=resolved, given=model)).set_display_name("open model")
        data = parts.datasets(resolved, stage=stage, candidate=candidate, **given)
        repeatable(train_stage(recipe=resolved, init=start.outputs["model"], stage=stage, candidate=candidate, **data))
