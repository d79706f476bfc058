"""Component `export`: a Hugging Face directory that loads without vlmflow, and its smoke test."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export(
    recipe: Input[Artifact],
    model: Input[Model],
    scores: Input[list[Artifact]],
    exported: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
    soup: Input[Artifact] = None,
    seed: Input[Dataset] = None,
    web: Input[Dataset] = None,
    sft: Input[Dataset] = None,
):
    """Export a model with its model card; datasets that are not given are those that the model names itself."""
    from vlmflow import ports, result_ports
    from vlmflow.step import open_step

    with open_step("export", recipe.path) as ctx:
        from vlmflow.export import run as export

        ref = ports.get_model(model)
        datasets = ports.get_manifests(seed=seed, web=web, sft=sft) or ports.manifests_of(ctx, ref)
        searched = ports.get_soup(soup) if soup else None
        made = export.run(ctx, ref, result_ports.get_scores(ctx, scores), searched, datasets)
        ports.put_object(made, exported, page, metrics, title="Exported model")
