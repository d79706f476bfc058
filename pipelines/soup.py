"""The model soup alone: candidates tuned from one checkpoint, their averages, and the chosen one in the registry."""

from kfp import dsl

from components.initial import initial
from components.preflight import preflight
from components.register import register
from components.scoreboard import scoreboard
from pipelines import parts
from pipelines.platform import once, repeatable

LITERALS = {"soup_choice": ["recipe", "greedy", "maximum", "average", "best"]}


@dsl.pipeline(name="vlmflow-soup", display_name="Soup: candidates from one checkpoint, averaged and chosen")
def soup(
    recipe: str,
    checkpoint: str,
    seed: str = "",
    web: str = "",
    sft: str = "",
    soup_choice: str = "recipe",
    evaluators: int = 8,
    overrides: list = [],  # noqa: B006
):
    """Train a candidate for each extra set, make the soups, choose one and register it as a candidate.

    The base set is the data of the recipe's soup stage, the extra sets are the soup's candidates.

    Args:
        recipe: Recipe (YAML or JSON), as a path in the image or a URI in the object store, such as s3://bucket/recipe.yaml.
        checkpoint: Pre-trained model that every candidate starts from: URI of its folder, or a registered version such as
            models:/NAME/3.
        seed: URI of the manifest of dataset `seed`; empty = pulled by the recipe.
        web: URI of the manifest of dataset `web`; empty = pulled by the recipe.
        sft: URI of the manifest of dataset `sft`; empty = pulled by the recipe.
        soup_choice: Which soup is registered; `recipe` keeps what the recipe says.
        evaluators: Number of tasks that the models are dealt to for evaluation.
        overrides: Changes to the recipe, each `section.key=value`, such as ["soup.maximum=3"].
    """
    given = {"seed": seed, "web": web, "sft": sft}
    with parts.finished():
        checked = once(
            preflight(
                source=recipe, overrides=overrides, pipeline="soup", soup_choice=soup_choice, model=checkpoint, **given
            )
        )
        resolved = checked.outputs["recipe"]
        start = once(initial(recipe=resolved, given=checkpoint)).set_display_name("open checkpoint")
        data = parts.datasets(resolved, **given)
        # what the gates compare with: the recipe's model before any training
        untrained = repeatable(initial(recipe=resolved, **data)).set_display_name("initial").outputs["model"]
        trained = parts.candidates(resolved, start.outputs["model"], data)
        soups, table = parts.souped(resolved, trained, untrained, evaluators)
        once(scoreboard(recipe=resolved, scores=table()))
        once(
            register(
                recipe=resolved,
                model=soups.outputs["model"],
                untrained=untrained,
                scores=table(),
                soup=soups.outputs["result"],
                **data,
            )
        )
