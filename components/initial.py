"""Component `initial`: the model that training starts from: one that is given, or the recipe's before any training."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def initial(
    recipe: Input[Artifact],
    model: Output[Model],
    page: Output[HTML],
    metrics: Output[Metrics],
    given: str = "",
    seed: Input[Dataset] = None,
    web: Input[Dataset] = None,
    sft: Input[Dataset] = None,
):
    """Build or open the model that training starts from.

    Args:
        given: URI of a model's folder, or a registered version (models:/NAME/3, models:/NAME@champion); empty = build the
            recipe's model, composed from hub models or random, with its tokenizer.
    """
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("initial", recipe.path) as ctx:
        datasets = ports.get_manifests(seed=seed, web=web, sft=sft)
        ports.put_model(ports.start(ctx, datasets, given), model, page, metrics)
