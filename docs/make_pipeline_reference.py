"""Write docs/pipelines.md: every pipeline with its form, its steps and what they leave behind, from the compiled packages.

    python docs/make_pipeline_reference.py

A test compares the file with what this makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmflow import compiler

TARGET = Path(__file__).resolve().parent / "pipelines.md"
HEAD = """# Pipelines

Written by `docs/make_pipeline_reference.py` from the compiled packages in `pipelines/compiled/`.

Each pipeline is one KFP package: upload it (`vlmflow register NAME`, or the chart's bootstrap job), start it in the Kubeflow
UI with the form below, or `vlmflow submit RECIPE --pipeline NAME -p name=value`. `vlmflow run RECIPE --pipeline NAME` runs any of them but `promote`
on one machine, `points` without the option.

What all of them share:

- The first task checks everything (`preflight`; `verify` in `promote`) before anything is spent: recipe, what the form names,
  tables, store, MLflow, services, cluster, each as far as the pipeline needs it.
- The exit handler `finish` runs last, also after a failure or a termination. It deletes TrainJobs that the run left on the
  cluster and writes `ROOT/runs/RUN/end.json`: `state`, `failed`, `message`, `steps` with seconds, `deleted`, `problem`.
- Every task is retried twice, after 30 and 60 s: its work is found again by digest, so a retry continues. What depends on the
  world outside its inputs (checks, scores, registry, models behind an alias) is never answered from KFP's cache.
- A model is named by the URI of its folder in the store (`s3://vlmflow/models/KEY`) or by a registered version
  (`models:/NAME/3`, `models:/NAME@champion`). A dataset is named by the URI of its manifest (`ROOT/manifests/DIGEST.json`;
  each dataset task shows the digest).
- Every task shows a page; the numbers of its metrics can be compared between runs in the UI.

## Shards in groups

`points` and `curate` work on the web dataset in `shard_groups` groups, side by side:

1. `deal` cuts the tables' rows into groups of shards; each group's shards are pulled by a task of its own; then `pull web` finds
   them all by name and seals the manifest.
2. `groups` deals the manifest's shards. Each group is a chain of `ocr`, `caption`, `fuse`, `build` (descriptions, questions and
   answers), `clean` (checks of each sample, benchmarks, a text model's verdict) and `perplexity`, which writes only its shards'
   layer parts: no manifest, no verdict about failures.
3. `merge` checks that every shard was in a group, and the same steps run over the whole dataset: they find every part by digest,
   judge the failures of all shards together against the recipe's limit, and seal the manifest.
4. `dedup` and `keep` compare all samples of all shards with each other.

A step that the recipe leaves out hands the dataset on. The manifest has the same digest and the parts the same bytes whatever the
number of groups (`test_dataset_groups.py::test_the_same_bytes_whatever_the_grouping`), and `points` finds every layer that `curate`
made of the same recipe. On one machine, `vlmflow run --processes N` makes N groups and runs N tasks at a time; without it there is one
group, whose steps use several cores themselves.

## Node pools, images, secrets

They are compiled into the packages that an installation registers, and are never parameters:
`vlmflow compile --installation site.yaml --to DIR`.

```yaml
image: registry.example/vlmflow-data@sha256:...      # of all steps
images: {train: registry.example/vlmflow-train@sha256:...}
pull_secrets: [registry-login]
config_map: vlmflow                                  # endpoints
secrets:                                             # name in pipelines/platform.py -> name here
  mlpipeline-minio-artifact: store-login             # keys accesskey, secretkey
  vlmflow-mlflow: mlflow-trainer                     # keys username, password; writes NAME-candidates
  vlmflow-promoter: mlflow-promoter                  # keys username, password; only the task promote has it
  vlmflow-endpoints: endpoint-keys                   # keys captionKey, fuseKey
pools:
  cpu: {node_selector: {pool: cpu}, cpu: "4", memory: 16Gi}
  gpu:
    node_selector: {pool: gpu}
    tolerations: [{key: nvidia.com/gpu, effect: NoSchedule}]
    accelerator: nvidia.com/gpu
    shared_memory: 8Gi
steps: {caption: gpu, build: gpu, perplexity: gpu, evaluate: gpu, soup: gpu, export: gpu}
default_pool: cpu
```

Every Secret is optional in the package: an installation without a login needs none. Pools of TrainJobs are the launcher's:
[cluster-training.md](cluster-training.md). Policies of promotion come from the key `promotionPolicies` of the ConfigMap (JSON:
registered model -> policy), not from the form: who starts `promote` cannot lower what a candidate must show.
"""
NOTES = {
    "curate": "Result: the manifests of the tasks `pull seed`, `pull sft` and `keep`; give them to `train` or `soup`.",
    "evaluate": "Result: the table of `scoreboard`, also as `scores`, `chance` and `models` in `ROOT/runs/RUN/summary.json`.",
    "export": "Result: a Hugging Face directory under `ROOT/exports/DIGEST`, published only when its smoke test passed. Scores "
    "that were measured before are found again. The card names the datasets in the model's own lineage.",
    "points": "Result: a version of `NAME-candidates`, an export, and `report.html` and `summary.json` in `ROOT/runs/RUN`.",
    "promote": "Result: `@champion` of NAME. `verify` shows the verdict of every gate. A named candidate that fails a gate fails the "
    "run; without a name nothing is done when no newer candidate passes. A retry completes the same promotion.",
    "soup": "Result: the chosen soup as a version of `NAME-candidates`. Its gates compare with the recipe's model before any "
    "training (`initial`), its scores stand beside those of every candidate and soup in `scoreboard`. All candidates start from "
    "the checkpoint; models with different starts are refused.",
    "train": "Result: the model of the task `train`, published under a digest of everything that decides it; an equal training is "
    "found again. A stage that learns from layers (OCR texts, captions, a selection) needs the manifest of a curated dataset.",
}


def text() -> str:
    """The whole file."""
    return HEAD + "".join(section(name) for name in compiler.PIPELINES)


def section(name: str) -> str:
    """One pipeline: what it does, its form, its tasks."""
    spec = compiler.compile_pipeline(name).spec
    about = " ".join(spec["pipelineInfo"]["description"].split())
    lines = ["", f"## {name}", "", about, "", NOTES[name], "", "| form | default | |", "| --- | --- | --- |"]
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    for key in sorted(parameters, key=lambda each: ("defaultValue" in parameters[each], each)):
        asked = parameters[key]
        default = f"`{_plain(asked['defaultValue'])}`" if "defaultValue" in asked else "required"
        choice = f" One of {', '.join(f'`{value}`' for value in asked['literals'])}." if "literals" in asked else ""
        lines.append(f"| `{key}` | {default} | {' '.join(asked['description'].split())}{choice} |")
    lines += ["", "| task | after | artifacts | cached |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(spec)]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _rows(spec: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    inner = spec["components"]["comp-exit-handler-1"]["dag"]
    return [*_dag(spec, inner, ""), *_dag(spec, {"tasks": {"finish": spec["root"]["dag"]["tasks"]["finish"]}}, "")]


def _dag(spec: dict[str, Any], dag: dict[str, Any], place: str) -> list[tuple[str, str, str, str]]:
    tasks, rows = dag["tasks"], []
    for key in _order(tasks):
        task, component = tasks[key], spec["components"][tasks[key]["componentRef"]["name"]]
        if "dag" in component:
            rows += _dag(spec, component["dag"], " (in a loop)")
            continue
        direct = _direct(tasks, key)
        waits = ", ".join(sorted(_name(spec, tasks, each) for each in direct))
        outputs = component.get("outputDefinitions", {})
        kinds = {name: a["artifactType"]["schemaTitle"] for name, a in outputs.get("artifacts", {}).items()}
        made = [f"`{name}` {kind.removeprefix('system.')}" for name, kind in sorted(kinds.items())]
        made += ["a list"] if outputs.get("parameters") else []
        cached = "yes" if task.get("cachingOptions", {}).get("enableCache") else "no"
        rows.append((task["taskInfo"]["name"] + place, waits, ", ".join(made), cached))
    return rows


def _name(spec: dict[str, Any], tasks: dict[str, Any], key: str) -> str:
    if key not in tasks or key == "exit-handler-1":
        return "everything"
    inner = spec["components"][tasks[key]["componentRef"]["name"]].get("dag", {}).get("tasks", {})
    return (
        " and ".join(inner[each]["taskInfo"]["name"] for each in _order(inner)[-1:]) or tasks[key]["taskInfo"]["name"]
    )


def _direct(tasks: dict[str, Any], key: str) -> set[str]:
    """Dependencies of a task that no other of its dependencies has already."""
    needed = set(tasks[key].get("dependentTasks", []))
    return needed - {other for each in needed for other in _all(tasks, each)}


def _all(tasks: dict[str, Any], key: str) -> set[str]:
    direct = set(tasks[key].get("dependentTasks", [])) if key in tasks else set()
    return direct.union(*(_all(tasks, each) for each in direct))


def _order(tasks: dict[str, Any]) -> list[str]:
    return sorted(tasks, key=lambda key: (len(_all(tasks, key)), key))


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
