"""Component `initial`: the model before any training, composed from hub models or random, with its tokenizer."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def initial(
    recipe: Input[Artifact],
    seed: Input[Dataset],
    web: Input[Dataset],
    sft: Input[Dataset],
    model: Output[Model],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Build the model that training starts from."""
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("initial", recipe.path) as ctx:
        from vlmflow.models import initial

        ref = initial.run(ctx, ports.get_manifests(seed=seed, web=web, sft=sft))
        ports.put_model(ref, model, page, metrics)
