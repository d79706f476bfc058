"""Component `pull`: a table of URLs and texts becomes a dataset: shards of images and one manifest."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pull(
    recipe: Input[Artifact],
    dataset: str,
    data: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
    manifest: str = "",
    stage: str = "",
    candidate: str = "",
    group: dict = {},  # noqa: B006
    parts: Input[list[Dataset]] = None,
):
    """Download the images of one dataset of the recipe.

    Args:
        dataset: Name of the dataset in the recipe's `data` section; a dataset that the recipe lacks comes out empty.
        manifest: URI of a manifest that is used as it is; empty = pull.
        stage: Stage that the dataset is for; one that it does not use comes out empty. Empty = for any.
        candidate: Soup candidate whose data the stage adds, or empty.
        group: Shards to pull ahead, as `deal` deals them; empty = all, and the manifest is sealed.
        parts: What the groups pulled; only waited for, because finished shards are found by name.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step(ports.named(f"pull-{dataset}", group), recipe.path) as ctx:
        pulled = ports.pull(ctx, dataset, manifest, stage, candidate, group)
        ports.put_manifest(ctx, pulled, data, page, metrics, title=f"Dataset {dataset}")
