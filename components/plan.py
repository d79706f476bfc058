"""Component `plan`: the soup candidates of the recipe, as the list that the training loop runs over."""

from kfp import dsl
from kfp.dsl import Artifact, Input

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan(recipe: Input[Artifact]) -> list:
    """List the soup candidates."""
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("plan", recipe.path) as ctx:
        return ports.candidate_names(ctx)
