"""Component `ocr`: read the text in every image with an OCR engine (layer `ocr`)."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ocr(
    recipe: Input[Artifact],
    dataset: Input[Dataset],
    data: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
    group: dict = {},  # noqa: B006
):
    """Read the text in every image with an OCR engine.

    Args:
        group: Shards to compute ahead, as `groups` deals them; empty = all, and the manifest is sealed.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step(ports.named("ocr", group), recipe.path) as ctx:
        from vlmflow.curation import ocr

        manifest = ports.curate(ctx, ocr, ports.get_manifest(dataset), group=group)
        ports.put_manifest(ctx, manifest, data, page, metrics, title="OCR", layer="ocr")
