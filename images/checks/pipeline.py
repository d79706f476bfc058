"""In a container: the whole tiny recipe with its own object store and MLflow server, at the size of kill_resume.py."""

import sys
import time
from pathlib import Path

from kill_resume import RECIPE, SIZES, SMALL
from rich.console import Console

from vlmflow import demo, local, local_stack, recipe

began, state = time.monotonic(), Path("/state/run")
with demo.serve("/state/site", SIZES) as site:
    overrides = [*site.overrides(demo.fields(recipe.load(RECIPE).model_dump(mode="json"))), *SMALL]
    try:
        result = local.run(RECIPE, overrides, state, Console(width=140))
    finally:
        local_stack.down(state)
kinds = sorted({path.relative_to(state / "s3/vlmflow").parts[0] for path in (state / "s3/vlmflow").rglob("*.*")})
print(
    f"{time.monotonic() - began:.0f} s, steps {len(result.seconds)}, report {result.report}, in the store: {', '.join(kinds)}"
)
if missing := {"exports", "manifests", "models"} - set(kinds):
    sys.exit(f"the run left no {', '.join(sorted(missing))}")
if result.report is None or not result.summary:
    sys.exit("the run left no report")
