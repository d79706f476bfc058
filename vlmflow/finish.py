"""The last task of every run, also of a failed or terminated one: nothing is left running, and the run has a summary.

A terminated pipeline ends its own pods, but not the TrainJob that one of them started on other nodes; that goes on
holding GPUs until someone deletes it. The summary says how the run ended and what its steps took, for those who were not
watching.
"""

from __future__ import annotations

from typing import Any

from vlmflow import step, storage
from vlmflow.errors import ServiceError, VlmflowError

MARKER = "end.json"  # in the run's folder, beside summary.json, which holds its results


def run(state: str, failed: str = "", message: str = "") -> dict[str, Any]:
    """Clean up after the run of this environment and write its summary.

    Args:
        state: how the run ended, in Kubeflow's words (SUCCEEDED, FAILED, ...).
        failed: name of the task that failed, message: its error; empty when none did.

    Returns:
        state, failed, message, `steps` (in order, with `seconds` of wall time, of those that ended well), `deleted` (TrainJobs) and
        `problem` (why cleaning up did not work, or empty).

    Raises:
        ServiceError: cleaning up did not work; the summary is written all the same.
    """
    deleted, problem = _clean(step.run_id())
    folder = step.run_folder()
    timings = sorted(
        (storage.read_json(each.uri) for each in storage.list_uris(storage.join(folder, "steps"))),
        key=lambda each: (each["started"], each["step"]),
    )
    made: dict[str, Any] = {
        "state": state,
        "failed": failed,
        "message": message,
        "steps": [{"step": each["step"], "seconds": each["seconds"]} for each in timings],
        "deleted": deleted,
        "problem": problem,
    }
    storage.write_json(storage.join(folder, MARKER), made)
    if problem:
        raise ServiceError(f"what this run started on the cluster may still be there: {problem}")
    return made


def _clean(run_id: str) -> tuple[list[str], str]:
    from vlmflow.training import launchers

    try:
        if launchers.chosen() != "trainjob":
            return [], ""
        from vlmflow.training.trainjob.clean import clean
        from vlmflow.training.trainjob.config import from_environment

        return clean(run_id, from_environment()), ""
    except VlmflowError as error:  # the run ended as it ended; who reads the summary must see what is left
        return [], str(error)
