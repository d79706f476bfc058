"""Component `fuse`: merge alternative text and synthetic caption into one caption (layer `fused`)."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fuse(
    recipe: Input[Artifact],
    dataset: Input[Dataset],
    data: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Merge alternative text and synthetic caption into one caption."""
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("fuse", recipe.path) as ctx:
        from vlmflow.curation import fuse

        manifest = ports.curate(ctx, fuse, ports.get_manifest(dataset))
        ports.put_manifest(ctx, manifest, data, page, metrics, title="Fused captions", layer="fused")
