"""Component `contestants`: models that a person names, and one that is open, dealt to as many evaluation tasks as asked for."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def contestants(recipe: Input[Artifact], models: list, evaluators: int, opened: Input[Model] = None) -> list:
    """List the models to evaluate, in groups: one group a task.

    Args:
        models: URIs of model folders, or registered versions (models:/NAME/3, models:/NAME@champion).
        evaluators: Number of evaluation tasks the models are dealt to.
    """
    from vlmflow import result_ports
    from vlmflow.step import open_step

    with open_step("contestants", recipe.path) as ctx:
        return result_ports.contestants(ctx, models, evaluators, opened)
