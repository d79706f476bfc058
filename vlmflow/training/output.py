"""The folder of the trained model: its weights and config, everything else as it was in the initial model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from vlmflow.training.job import Job, emit

NOT_COPIED = {"model.json", "model.safetensors.index.json"}


def write_model(job: Job, engine: Any, attached: Mapping[str, Any], rank: int) -> None:
    """Write ``job.out`` on rank 0; adapters are merged, a moving average takes the weights' place. Collective.

    Args:
        attached: weight -> adapter that trained in its place.
    """
    from vlmflow.training import adapters
    from vlmflow.training import engine as ds

    state = ds.export_state(engine, exact=adapters.is_part)
    if rank:
        return
    shutil.rmtree(job.out, ignore_errors=True)
    initial = job.model_folder()
    for path in sorted(initial.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in NOT_COPIED:
            target = job.out / path.relative_to(initial)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    engine.module.save_pretrained(job.out, state_dict=adapters.merge(state, attached))
    if (ema := engine.ema) is not None:
        text = f"published is the moving average of the weights (decay {ema.decay:g}) over {ema.taken} steps"
        emit(event="note", text=text)
