"""Component `preflight`: resolve the recipe once and check everything a run needs before anything is spent."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def preflight(
    source: str,
    overrides: list,
    recipe: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
    pipeline: str = "points",
    soup_choice: str = "recipe",
    scorer: str = "",
    model: str = "",
    stage: str = "",
    candidate: str = "",
    seed: str = "",
    web: str = "",
    sft: str = "",
):
    """Resolve the recipe and check what the pipeline needs: tables, object store, MLflow, services, cluster.

    Args:
        source: Recipe, as a path in the image or a URI in the object store; empty = the one recorded with the registered `model`.
        overrides: Changes to the recipe, each `section.key=value`.
        pipeline: The pipeline that asks.
        soup_choice: Which soup is exported; `recipe` keeps what the recipe says.
        scorer: Address of the model that captions and scores; empty = the recipe's.
        model: Address of the model that the run starts from, or empty.
        stage: Stage that must be in the recipe, or empty.
        candidate: Soup candidate whose data the stage adds, or empty.
        seed: URI of the manifest of dataset `seed`, or empty.
        web: URI of the manifest of dataset `web`, or empty.
        sft: URI of the manifest of dataset `sft`, or empty.
    """
    from vlmflow import ports, preflight
    from vlmflow.step import open_step

    resolved = preflight.resolve(source, overrides, soup_choice, pipeline, scorer, model)
    ports.put_recipe(resolved, recipe)
    with open_step("preflight", recipe.path) as ctx:
        given = {name: uri for name, uri in {"seed": seed, "web": web, "sft": sft}.items() if uri}
        trainings = preflight.trainings_of(ctx.recipe, pipeline, stage, candidate)
        checks = preflight.check_given(ctx, [model], given, trainings)
        checks += preflight.check(ctx, pipeline, given, stage, candidate)
        ports.show("Preflight", {"checks": len(checks)}, page, metrics, table=checks)
