"""Component `report`: one HTML page about the whole run."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(
    recipe: Input[Artifact],
    seed: Input[Dataset],
    web: Input[Dataset],
    sft: Input[Dataset],
    untrained: Input[Model],
    bootstrap: Input[Model],
    ocr: Input[Model],
    align: Input[Model],
    candidates: Input[list[Model]],
    scores: Input[list[Artifact]],
    soup: Input[Artifact],
    registered: Input[Artifact],
    exported: Input[Artifact],
    page: Output[HTML],
):
    """Write the report page of the run."""
    from vlmflow import ports, result_ports
    from vlmflow.step import open_step

    with open_step("report", recipe.path) as ctx:
        models = ports.get_models(untrained=untrained, bootstrap=bootstrap, ocr=ocr, align=align)
        models |= ports.get_candidates(ctx, candidates)
        datasets = ports.get_manifests(seed=seed, web=web, sft=sft)
        result_ports.put_report(
            ctx, datasets, models, result_ports.get_scores(ctx, scores), soup, registered, exported, page
        )
