"""Component `dedup`: what says again what another sample says, over all shards and sources (layer `dedup`)."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def dedup(
    recipe: Input[Artifact],
    dataset: Input[Dataset],
    data: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Find exact and near duplicates, exactly, over all shards, where the recipe asks for it."""
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("dedup", recipe.path) as ctx:
        from vlmflow.curation import dedup

        manifest = ports.curate(ctx, dedup, ports.get_manifest(dataset))
        ports.put_manifest(ctx, manifest, data, page, metrics, title="Duplicates", layer="dedup")
