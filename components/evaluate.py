"""Component `evaluate`: the benchmarks of the recipe, on the report split, for a group of models."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    recipe: Input[Artifact],
    group: dict,
    scores: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Score a group of models.

    Args:
        group: Model name -> URI of its model folder, as `lineup` deals them.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step(ports.group_name(group), recipe.path) as ctx:
        ports.put_scores(ports.evaluate(ctx, group), scores, page, metrics)
