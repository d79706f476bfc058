"""Component `preflight`: resolve the recipe once and check everything a run needs before anything is spent."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def preflight(
    source: str,
    overrides: list,
    soup_choice: str,
    recipe: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Resolve the recipe and check tables, object store, MLflow and services.

    Args:
        source: Recipe, as a path in the image or a URI in the object store.
        overrides: Changes to the recipe, each `section.key=value`.
        soup_choice: Which soup is exported; `recipe` keeps what the recipe says.
    """
    from vlmflow import ports, preflight
    from vlmflow.step import open_step

    resolved = preflight.resolve(source, overrides, soup_choice)
    ports.put_recipe(resolved, recipe)
    with open_step("preflight", recipe.path) as ctx:
        checks = preflight.check(ctx)
        ports.show("Preflight", {"checks": len(checks)}, page, metrics, table=checks)
