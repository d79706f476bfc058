"""Component `finish`: the exit handler of every pipeline: cleans up and writes how the run ended."""

from kfp import dsl
from kfp.dsl import HTML, Output, PipelineTaskFinalStatus

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finish(status: PipelineTaskFinalStatus, page: Output[HTML]):
    """Delete what the run left on the cluster and write its summary, however it ended."""
    from vlmflow import finish, ports
    from vlmflow.step import frame

    with frame("finish"):
        made = finish.run(status.state, status.pipeline_task_name or "", status.error_message or "")
        steps = made.pop("steps")
        ports.show(f"Run {made['state'].lower()}", made, page, None, table=steps)
