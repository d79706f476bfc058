"""Component `build`: conversations from images and pages: long descriptions, questions and answers (layers `described`, `docqa`)."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def build(
    recipe: Input[Artifact],
    dataset: Input[Dataset],
    model: Input[Model],
    data: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
    group: dict = {},  # noqa: B006
):
    """Write long descriptions of images, and questions about pages, where the recipe asks for them.

    Args:
        group: Shards to compute ahead, as `groups` deals them; empty = all, and the manifest is sealed.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step(ports.named("build", group), recipe.path) as ctx:
        from vlmflow.curation import describe, docqa

        manifest = ports.curate(ctx, describe, ports.get_manifest(dataset), ports.get_model(model), group=group)
        manifest = ports.curate(ctx, docqa, manifest, group=group)
        ports.put_manifest(ctx, manifest, data, page, metrics, title="Built samples", layer=("described", "docqa"))
