"""Component `keep`: keep the captions of lowest perplexity, exactly, over all shards (layer `keep`)."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def keep(
    recipe: Input[Artifact],
    dataset: Input[Dataset],
    data: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Keep the captions of lowest perplexity, exactly, over all shards."""
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("keep", recipe.path) as ctx:
        from vlmflow.curation import keep

        manifest = ports.curate(ctx, keep, ports.get_manifest(dataset))
        ports.put_manifest(ctx, manifest, data, page, metrics, title="Selection", layer="keep")
