"""The process that drives kfp.local: `python -m vlmflow.local_worker JOB.json`, everything it prints goes to the log.

It is a process of its own, so that kfp's output, its threads and its 0.7 s of imports stay out of the command line, and
so that one signal ends a run with all of its tasks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import yaml

from vlmflow import process_tree

GRACE = 20.0  # seconds a trainer has to write its checkpoint after SIGTERM


def without_retries(text: str) -> str:
    """The package without retry policies: at a laptop a person sees the error at once, and starts again by hand."""
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        _drop(document, "retryPolicy")
    return yaml.safe_dump_all(documents, sort_keys=True)


def _drop(node: Any, key: str) -> None:
    if isinstance(node, dict):
        node.pop(key, None)
        for value in node.values():
            _drop(value, key)
    elif isinstance(node, list):
        for value in node:
            _drop(value, key)


def _terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    process_tree.stop(process_tree.descendants(os.getpid()), GRACE)
    os._exit(128 + number)


def widen_loops(lanes: int) -> None:
    """Let kfp.local run `lanes` tasks of a loop at a time. It never runs more than two and has no setting for it (platform.md
    1.2, L8): two threads a level, so that nested loops do not multiply; these pipelines nest none."""
    from kfp.local.orchestrator import enhanced_dag_orchestrator

    class Wide(enhanced_dag_orchestrator.ParallelExecutor):
        def __init__(self, max_workers: int | None = None) -> None:
            super().__init__(max_workers)
            self.conservative_max = self.max_workers = lanes

    enhanced_dag_orchestrator.ParallelExecutor = Wide


def main(job_path: str) -> int:
    """Run the job: `package` (YAML path), `arguments`, `pipeline_root`, `lanes`. 0 when every task succeeded."""
    signal.signal(signal.SIGTERM, _terminate)
    process_tree.die_with_parent()
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    from kfp import components, local

    widen_loops(int(job["lanes"]))
    warnings.simplefilter("ignore")  # display names and image names that only matter on a cluster
    pipeline = components.load_component_from_text(without_retries(Path(job["package"]).read_text(encoding="utf-8")))
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=job["pipeline_root"],
        workspace_root=tempfile.mkdtemp(prefix="workspace-"),  # kfp deletes it after every run (platform.md 1.2, L3)
        raise_on_error=True,
    )
    try:
        pipeline(**job["arguments"])
    except RuntimeError as error:  # a task failed; its own words are in the log above
        print(error, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
