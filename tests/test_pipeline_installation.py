"""Node pools, images and secrets of an installation end in the compiled package, and only there."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmflow import compiler
from vlmflow.errors import RecipeError
from vlmflow.installation import (
    DATA_STEPS,
    SECRETS,
    VARIABLE,
    Installation,
    from_environment,
    load,
    step_of,
    with_images,
)

IMAGE = "registry.example/vlmflow-data@sha256:" + "a" * 64
ROOT = Path(__file__).resolve().parents[1]
OCR, DATA, OWN = (f"registry.example/{name}@sha256:" + "c" * 64 for name in ("ocr", "data", "own"))
TRAIN = "registry.example/vlmflow-train@sha256:" + "b" * 64
GIVEN = {
    "image": IMAGE,
    "pull_secrets": ["pull"],
    "config_map": "site",
    "secrets": {"mlpipeline-minio-artifact": "store-login", "vlmflow-promoter": "promoter-login"},
    "pools": {
        "cpu": {"node_selector": {"pool": "cpu"}, "cpu": "4", "memory": "16Gi"},
        "gpu": {
            "node_selector": {"pool": "gpu"},
            "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
            "accelerator": "nvidia.com/gpu",
            "shared_memory": "8Gi",
        },
    },
    "steps": {"caption": "gpu", "perplexity": "gpu"},
    "default_pool": "cpu",
}


def parts(package, step):
    """(container, Kubernetes settings) of every executor of a step; a step may be used several times."""
    settings = package.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found = [n for n in compiler.executors(package.spec) if step_of(n) == step]
    return [(compiler.executors(package.spec)[name]["container"], settings[name]) for name in found]


def test_every_use_of_a_step_gets_its_pool_image_and_secrets():
    package = compiler.compile_pipeline("curate", installation=Installation.model_validate(GIVEN))
    assert len(parts(package, "caption")) == 2  # in the groups, and to seal the manifest
    for container, settings in parts(package, "caption"):
        assert container["image"] == IMAGE
        assert container["resources"] == {"accelerator": {"resourceType": "nvidia.com/gpu", "resourceCount": "1"}}
        assert settings["nodeSelector"] == {"labels": {"pool": "gpu"}}
        assert settings["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert [m["sizeLimit"] for m in settings["emptyDirMounts"]] == ["8Gi"]
    ((container, settings),) = parts(package, "keep")
    assert settings["nodeSelector"] == {"labels": {"pool": "cpu"}} and "tolerations" not in settings
    assert container["resources"] == {
        "resourceCpuRequest": "4", "resourceMemoryRequest": "16Gi", "resourceMemoryLimit": "16Gi",
    }  # fmt: skip
    assert {entry["configMapName"] for entry in settings["configMapAsEnv"]} == {"site"}
    secrets = [(s["secretName"], s["secretNameParameter"]["runtimeValue"]["constant"]) for s in settings["secretAsEnv"]]
    assert ("store-login", "store-login") in secrets and "mlpipeline-minio-artifact" not in dict(secrets)
    assert [s["secretName"] for s in settings["imagePullSecret"]] == ["pull"]
    parameters = package.spec["root"]["inputDefinitions"]["parameters"]
    assert set(parameters) == {"recipe", "overrides", "model", "shard_groups"}  # nothing of it is asked in the form


def test_a_package_with_an_installation_is_one_that_kfp_loads():
    from kfp import components

    package = compiler.compile_pipeline("promote", installation=Installation.model_validate(GIVEN))
    assert components.load_component_from_text(package.text).name == "vlmflow-promote"
    (_, settings) = parts(package, "promote")[0]
    assert "promoter-login" in {entry["secretName"] for entry in settings["secretAsEnv"]}


def test_another_image_for_training_is_allowed_where_it_was_asked_for():
    asked = Installation.model_validate({"image": IMAGE, "images": {"train": TRAIN}})
    package = compiler.compile_pipeline("train", require_digest=True, installation=asked)
    assert [container["image"] for container, _ in parts(package, "train")] == [TRAIN]
    assert {container["image"] for container, _ in parts(package, "pull")} == {IMAGE}


def test_a_release_has_an_image_for_steps_without_torch_and_what_the_installation_says_wins():
    asked = with_images(Installation.model_validate({"images": {"pull": OWN}}), IMAGE, DATA, OCR)
    package = compiler.compile_pipeline("points", require_digest=True, installation=asked)
    used = {
        name: {c["image"] for c, _ in parts(package, name)} for name in ("train", "ocr", "keep", "pull", "evaluate")
    }
    assert used == {"train": {IMAGE}, "ocr": {OCR}, "keep": {DATA}, "pull": {OWN}, "evaluate": {IMAGE}}
    alone = compiler.compile_pipeline("points", image=IMAGE)
    assert {e["container"]["image"] for e in compiler.executors(alone.spec).values() if "container" in e} == {IMAGE}


def test_steps_of_the_data_image_need_no_torch():
    blocked = ("torch", "transformers", "deepspeed", "safetensors", "tokenizers", "rapidocr", "matplotlib", "sklearn")
    wanted = [f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))"]
    for step in DATA_STEPS:
        if not (ROOT / "components" / f"{step}.py").exists():
            continue
        tree = ast.parse((ROOT / "components" / f"{step}.py").read_text())
        found = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        wanted += [line for line in found if line.startswith("from vlmflow")]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(wanted)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": {"ocr": "gpu"}}, "pools that are not defined: {'ocr': 'gpu'}"),
        ({"default_pool": "gpu"}, "pools that are not defined"),
        ({"image": "vlmflow:latest"}, "floats"),
        ({"images": {"train": "vlmflow"}}, "floats"),
        ({"pool": {}}, "pool"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, given, said):
    path = tmp_path / "site.yaml"
    path.write_text(json.dumps(given))
    with pytest.raises(RecipeError, match=r"site\.yaml is not the platform configuration") as caught:
        load(path)
    assert said in str(caught.value)


def test_the_secrets_are_those_of_the_platform():
    """A misspelt one would leave a step without its login; it is refused."""
    used = {
        entry["secretName"]
        for name in compiler.PIPELINES
        for settings in compiler.compile_pipeline(name)
        .platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        .values()
        for entry in settings["secretAsEnv"]
    }
    assert used == set(SECRETS)
    with pytest.raises(ValueError, match=r"mlpipeline-minio-artefact.*are used by no step"):
        Installation.model_validate({"secrets": {"mlpipeline-minio-artefact": "x"}})


def test_the_bootstrap_jobs_configuration(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert from_environment() is None
    monkeypatch.setenv(VARIABLE, json.dumps(GIVEN))
    assert from_environment() == Installation.model_validate(GIVEN)
    monkeypatch.setenv(VARIABLE, "{")
    with pytest.raises(RecipeError, match=VARIABLE):
        from_environment()
