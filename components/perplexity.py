"""Component `perplexity`: score every caption by the perplexity it has under the model (layer `ppl`)."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def perplexity(
    recipe: Input[Artifact],
    dataset: Input[Dataset],
    model: Input[Model],
    data: Output[Dataset],
    page: Output[HTML],
    metrics: Output[Metrics],
    group: dict = {},  # noqa: B006
):
    """Score every caption by the perplexity it has under the model.

    Args:
        group: Shards to compute ahead, as `groups` deals them; empty = all, and the manifest is sealed.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step(ports.named("perplexity", group), recipe.path) as ctx:
        from vlmflow.curation import perplexity

        manifest = ports.curate(ctx, perplexity, ports.get_manifest(dataset), ports.get_model(model), group=group)
        ports.put_manifest(ctx, manifest, data, page, metrics, title="Caption perplexity", layer="ppl")
