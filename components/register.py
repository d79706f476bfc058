"""Component `register`: a version of `NAME-candidates` in MLflow with parameters, metrics and lineage."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    recipe: Input[Artifact],
    model: Input[Model],
    untrained: Input[Model],
    scores: Input[list[Artifact]],
    soup: Input[Artifact],
    seed: Input[Dataset],
    web: Input[Dataset],
    sft: Input[Dataset],
    registered: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Register the chosen model."""
    from vlmflow import ports, result_ports
    from vlmflow.step import open_step

    with open_step("register", recipe.path) as ctx:
        from vlmflow.registry import run as registry

        datasets = ports.get_manifests(seed=seed, web=web, sft=sft)
        searched = ports.get_soup(soup)
        judged = result_ports.judged_scores(ctx, ports.get_model(untrained), searched)
        scored = result_ports.get_scores(ctx, scores)
        made = registry.run(ctx, ports.get_model(model), scored, searched, datasets, judged)
        ports.put_object(made, registered, page, metrics, title="Registered model")
