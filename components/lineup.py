"""Component `lineup`: which models are evaluated, dealt to as many tasks as asked for."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def lineup(
    recipe: Input[Artifact],
    untrained: Input[Model],
    candidates: Input[list[Model]],
    soup: Input[Artifact],
    evaluators: int,
    bootstrap: Input[Model] = None,
) -> list:
    """List the models to evaluate, in groups: one group a task.

    Args:
        evaluators: Number of evaluation tasks the models are dealt to.
    """
    from vlmflow import result_ports
    from vlmflow.step import open_step

    with open_step("lineup", recipe.path) as ctx:
        return result_ports.lineup(ctx, untrained, bootstrap, candidates, soup, evaluators)
