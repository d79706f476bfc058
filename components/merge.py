"""Component `merge`: waits until every group of shards is computed, and hands the whole dataset on to be sealed."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def merge(
    recipe: Input[Artifact],
    dataset: Input[Dataset],
    parts: Input[list[Dataset]],
    data: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Check that the groups hold every shard of the dataset."""
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("merge", recipe.path) as ctx:
        from vlmflow.dataset import groups

        whole = ports.get_manifest(dataset)
        groups.check_whole(whole, [ports.get_manifest(part) for part in parts])
        ports.put_manifest(ctx, whole, data, page, metrics, title=f"Dataset {whole.name}, {len(parts)} groups computed")
