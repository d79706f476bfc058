"""Component `clean`: what is wrong with each sample by itself, and what stands in a benchmark (layers `phash`, `clean`,
`contamination`, `judge`)."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def clean(
    recipe: Input[Artifact],
    dataset: Input[Dataset],
    data: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
    group: dict = {},  # noqa: B006
):
    """Check every sample by itself, against the benchmarks and by a text model, where the recipe asks for it.

    Args:
        group: Shards to compute ahead, as `groups` deals them; empty = all, and the manifest is sealed.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step(ports.named("clean", group), recipe.path) as ctx:
        from vlmflow.curation import clean, contamination, judge, phash

        manifest = ports.get_manifest(dataset)
        for step in (phash, clean, contamination, judge):
            manifest = ports.curate(ctx, step, manifest, group=group)
        layers = ("clean", "contamination", "judge")
        ports.put_manifest(ctx, manifest, data, page, metrics, title="Checks of samples", layer=layers)
