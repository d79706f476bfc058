"""Write helm/vlmflow/README.md: every value of the chart with its default and description, from values.yaml and the schema.

    python docs/make_chart_reference.py

A test compares the file with what this makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[1] / "helm" / "vlmflow"
HEAD = """# Chart vlmflow

Platform configuration, promoter, bootstrap, training runtime, rights and network policies for an existing Kubeflow
Pipelines; MLflow, an object store for evaluation and a caption server on request. How to install it:
[docs/cluster.md](../../docs/cluster.md).

Written by `docs/make_chart_reference.py` from `values.yaml` and `values.schema.json`.

| value | default | |
| --- | --- | --- |
"""


def text() -> str:
    """The whole file."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    return HEAD + "\n".join(_rows(schema, values, "")) + "\n"


def _rows(schema: dict[str, Any], values: Any, path: str) -> list[str]:
    rows = []
    for name, value in values.items():
        about = schema["properties"][name] if "properties" in schema else schema["additionalProperties"]
        where = f"{path}.{name}" if path else name
        inner = about.get("additionalProperties")
        if isinstance(value, dict) and ("properties" in about or (isinstance(inner, dict) and "properties" in inner)):
            rows += _rows(about, value, where)
        else:
            choice = f" ({', '.join(about['enum'])})" if "enum" in about else ""
            rows.append(f"| `{where}` | `{json.dumps(value)}` | {about['description']}{choice} |")
    return rows


if __name__ == "__main__":
    (CHART / "README.md").write_text(text())
