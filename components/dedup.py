"""Component `dedup`: what says again what another sample says, over all shards, sources and datasets (layer `dedup`)."""

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
    seed: Input[Dataset] = None,
    sft: Input[Dataset] = None,
):
    """Find exact and near duplicates, exactly, over all shards, where the recipe asks for it; also of what stands in other
    datasets (`curation.dedup.against`)."""
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("dedup", recipe.path) as ctx:
        from vlmflow.curation import dedup

        others = ports.get_manifests(seed=seed, sft=sft)
        manifest = ports.curate(ctx, dedup, ports.get_manifest(dataset), others)
        ports.put_manifest(ctx, manifest, data, page, metrics, title="Duplicates", layer="dedup")
