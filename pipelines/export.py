"""A Hugging Face directory of any model: a registered version, as after a promotion, or a folder of the store."""

from kfp import dsl

from components.contestants import contestants
from components.export import export as export_model
from components.initial import initial
from components.preflight import preflight
from pipelines import parts
from pipelines.platform import once


@dsl.pipeline(name="vlmflow-export", display_name="Export: a Hugging Face directory of one model")
def export(model: str, recipe: str = "", overrides: list = []):  # noqa: B006
    """Export a model with a card that states its scores; scores that were measured before are found again.

    Args:
        model: Model to export: URI of its folder, or a registered version such as models:/NAME@champion.
        recipe: Recipe (YAML or JSON) that the model was made by, as a path in the image or a URI in the object store; empty =
            the one recorded with the registered version.
        overrides: Changes to the recipe, each `section.key=value`, such as ["export.licence=apache-2.0"].
    """
    with parts.finished():
        checked = once(preflight(source=recipe, overrides=overrides, pipeline="export", model=model))
        resolved = checked.outputs["recipe"]
        opened = once(initial(recipe=resolved, given=model)).set_display_name("open model").outputs["model"]
        dealt = once(contestants(recipe=resolved, models=[], evaluators=1, opened=opened))
        table = parts.scored(resolved, dealt)
        once(export_model(recipe=resolved, model=opened, scores=table()))
