"""Component `evaluate`: the benchmarks of the recipe, on the report or selection split, for a group of models."""

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
    split: str = "report",
):
    """Score a group of models.

    Args:
        group: `name` of the group and its `models` (name -> URI of the model folder), as `lineup` deals them.
        split: `report`, whose questions take part in no choice, or `selection`, by which soups and gates decide.
    """
    from vlmflow import result_ports
    from vlmflow.step import open_step

    with open_step(f"evaluate-{group['name']}", recipe.path) as ctx:
        result_ports.put_scores(result_ports.evaluate(ctx, group["models"], split), scores, page, metrics)
