"""Component `train`: one training stage of the recipe, from one model to the next."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    recipe: Input[Artifact],
    init: Input[Model],
    seed: Input[Dataset],
    web: Input[Dataset],
    sft: Input[Dataset],
    stage: str,
    model: Output[Model],
    page: Output[HTML],
    metrics: Output[Metrics],
    candidate: str = "",
):
    """Train one stage.

    Args:
        stage: `bootstrap` or the name of a stage in the recipe; a recipe without bootstrap passes the model through.
            Empty = the stage of the recipe's soup.
        candidate: Name of the soup candidate whose data is added, or empty.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("-".join(filter(None, ["train", stage, candidate])), recipe.path) as ctx:
        datasets = ports.get_manifests(seed=seed, web=web, sft=sft)
        ref = ports.train(ctx, stage, ports.get_model(init), datasets, candidate)
        ports.put_model(ref, model, page, metrics, candidate=candidate)
