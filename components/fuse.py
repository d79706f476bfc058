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
    group: dict = {},  # noqa: B006
):
    """Merge alternative text and synthetic caption into one caption.

    Args:
        group: Shards to compute ahead, as `groups` deals them; empty = all, and the manifest is sealed.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step(ports.named("fuse", group), recipe.path) as ctx:
        from vlmflow.curation import fuse

        manifest = ports.curate(ctx, fuse, ports.get_manifest(dataset), group=group)
        ports.put_manifest(ctx, manifest, data, page, metrics, title="Fused captions", layer="fused")
