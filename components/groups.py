"""Component `groups`: the shards of a dataset in groups, as the list that the curation loop runs over."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def groups(recipe: Input[Artifact], dataset: Input[Dataset], count: int) -> list:
    """Deal the shards of a dataset to groups: one group a task.

    Args:
        count: Number of groups; at most one a shard is made.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("groups", recipe.path):
        from vlmflow.dataset import groups

        return groups.deal(ports.get_manifest(dataset), count)
