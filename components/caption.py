"""Component `caption`: describe every image with the model that can already caption (layer `synthetic`)."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def caption(
    recipe: Input[Artifact],
    dataset: Input[Dataset],
    model: Input[Model],
    data: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
    group: dict = {},  # noqa: B006
):
    """Describe every image with the model that can already caption.

    Args:
        group: Shards to compute ahead, as `groups` deals them; empty = all, and the manifest is sealed.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step(ports.named("caption", group), recipe.path) as ctx:
        from vlmflow.curation import caption

        manifest = ports.curate(ctx, caption, ports.get_manifest(dataset), ports.get_model(model), group=group)
        ports.put_manifest(ctx, manifest, data, page, metrics, title="Synthetic captions", layer="synthetic")
