"""Component `scoreboard`: the scores of all groups as one table, and as the run's summary."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Metrics, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def scoreboard(
    recipe: Input[Artifact],
    scores: Input[list[Artifact]],
    table: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
):
    """Put the scores of all groups side by side."""
    from vlmflow import result_ports
    from vlmflow.step import open_step

    with open_step("scoreboard", recipe.path) as ctx:
        result_ports.put_scoreboard(ctx, result_ports.get_scores(ctx, scores), table, page, metrics)
