"""Component `export`: a Hugging Face directory that loads without vlmflow, and its smoke test."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export(
    recipe: Input[Artifact],
    model: Input[Model],
    scores: Input[list[Artifact]],
    soup: Input[Artifact],
    seed: Input[Dataset],
    web: Input[Dataset],
    sft: Input[Dataset],
    exported: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Export the chosen model with its model card."""
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("export", recipe.path) as ctx:
        from vlmflow.export import run as export

        datasets = ports.get_manifests(seed=seed, web=web, sft=sft)
        made = export.run(ctx, ports.get_model(model), ports.get_scores(ctx, scores), ports.get_soup(soup), datasets)
        ports.put_object(made, exported, page, metrics, title="Exported model")
