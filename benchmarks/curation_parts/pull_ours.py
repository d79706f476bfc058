"""One pull of ours as a process: `python pull_ours.py FOLDER TABLE JSON-SETTINGS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from vlmflow.curation import pull
from vlmflow.recipe.data import DatasetSpec, PullSpec, SourceSpec
from vlmflow.step import Context

if __name__ == "__main__":
    folder, table, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    data = {"web": DatasetSpec(sources={"web": SourceSpec(table=table)})}
    spec = PullSpec(allow_hosts=["127.0.0.1"], failure_limit=1.0, **settings)
    ctx = Context(SimpleNamespace(data=data, pull=spec), str(folder / "store"), folder / "scratch")
    manifest = pull.run(ctx, "web")
    print(json.dumps({"summary": manifest.lineage[0].summary, "shards": [s.uri for s in manifest.shards]}))
