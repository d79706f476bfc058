"""Component `deal`: the shards that a dataset's tables will become, in groups, as the list that the pull loop runs over."""

from kfp import dsl
from kfp.dsl import Artifact, Input

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deal(recipe: Input[Artifact], dataset: str, count: int) -> list:
    """Deal the rows of a dataset's tables to groups: one group a task.

    Args:
        dataset: Name of the dataset in the recipe's `data` section.
        count: Number of groups; at most one a shard is made.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step(f"deal-{dataset}", recipe.path) as ctx:
        return ports.pull_groups(ctx, dataset, count)
