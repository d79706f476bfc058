"""Component `soup`: weight averages of the candidates: maximum, average and greedy."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def soup(
    recipe: Input[Artifact],
    candidates: Input[list[Model]],
    result: Output[Artifact],
    model: Output[Model],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Make the soups and hand on the chosen one."""
    from vlmflow import ports
    from vlmflow.step import open_step

    with open_step("soup", recipe.path) as ctx:
        from vlmflow.soup import run as soup

        made = soup.run(ctx, ports.get_candidates(ctx, candidates))
        ports.put_soup(made, result, model, page, metrics)
