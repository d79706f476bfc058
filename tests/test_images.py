"""What the Containerfiles promise, read from their text. `make test-images` builds them and runs the tiny recipe inside."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import vlmflow

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "images"
NAMES = ("data", "ocr", "services", "train")
BAKE = (IMAGES / "docker-bake.hcl").read_text(encoding="utf-8")

every_image = pytest.mark.parametrize("name", NAMES)


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Containerfile, continued lines joined."""
    text = (IMAGES / f"{name}.Containerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(line.split()[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def last_stage(name: str) -> list[tuple[str, str]]:
    found = instructions(name)
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def extras(name: str) -> list[str]:
    """Extras that an image installs."""
    line = next(rest for word, rest in instructions(name) if word == "RUN" and "images/install.py" in rest)
    words = shlex.split(line)[2:]
    return words[2:] if words[0] == "--torch" else words


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("images_install", IMAGES / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_file_an_image() -> None:
    assert sorted(path.stem for path in IMAGES.glob("*.Containerfile")) == list(NAMES)


@every_image
def test_runs_as_a_numbered_user_that_is_not_root(name: str) -> None:
    users = [rest for word, rest in last_stage(name) if word == "USER"]
    assert users == ["10001:10001"]
    after = [word for word, _ in last_stage(name)][[word for word, _ in last_stage(name)].index("USER") + 1 :]
    assert set(after) <= {"CMD"}


@every_image
def test_the_base_is_one_argument_pinned_by_digest(name: str) -> None:
    found = instructions(name)
    base = next(rest for word, rest in found if word == "ARG")
    assert re.fullmatch(r"BASE_IMAGE=docker\.io/library/python:3\.1\d\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert base == next(rest for word, rest in instructions("data") if word == "ARG"), "all images share a base"
    assert [rest for word, rest in found if word == "FROM"] == ["${BASE_IMAGE} AS builder", "${BASE_IMAGE}"]


@every_image
def test_nothing_comes_from_elsewhere(name: str) -> None:
    """Neither addresses, nor indexes, nor floating versions: what is not locked is not installed."""
    text = (IMAGES / f"{name}.Containerfile").read_text(encoding="utf-8")
    words = [word for word, _ in instructions(name)]
    assert "ADD" not in words and "://" not in text and ":latest" not in text
    assert not re.search(r"index-url|find-links|trusted-host|curl|wget", text)
    for word, rest in instructions(name):
        if word == "RUN" and "pip install" in rest:
            assert "--no-deps" in rest and rest.endswith(" ."), "versions come from images/install.py only"


@every_image
def test_no_secret_is_asked_for_or_set(name: str) -> None:
    for word, rest in instructions(name):
        if word in ("ARG", "ENV"):
            assert not re.search(r"secret|token|password|passwd|access_?key|credential", rest, re.I), rest


@every_image
def test_labels_say_version_and_revision(name: str) -> None:
    labels = " ".join(rest for word, rest in last_stage(name) if word == "LABEL")
    for key, value in (("version", "${VERSION}"), ("revision", "${REVISION}"), ("title", f"vlmflow-{name}")):
        assert f'org.opencontainers.image.{key}="{value}"' in labels
    assert ("ARG", f"VERSION={vlmflow.__version__}") in last_stage(name)
    assert ("ARG", "REVISION=unknown") in last_stage(name)


@every_image
def test_whatever_is_written_goes_below_tmp(name: str) -> None:
    """The chart mounts /tmp and nothing else in its pods, their root is read-only."""
    settings = dict(
        pair.split("=", 1) for word, rest in last_stage(name) if word == "ENV" for pair in shlex.split(rest)
    )
    for variable in ("HOME", "HF_HOME", "VLMFLOW_SCRATCH"):
        assert settings[variable].split("/")[1] == "tmp", variable
    assert settings["PYTHONDONTWRITEBYTECODE"] == "1"


@every_image
def test_every_requirement_is_locked(name: str, install: ModuleType) -> None:
    """Direct ones; the build looks at all that was installed."""
    locked = install.pins(install.locks("cuda"))
    for requirement in install.requirements(extras(name)):
        package = re.split(r"[\[<>=]", requirement)[0]
        assert install.normal(package) in locked, requirement


def test_the_train_image_can_do_every_step() -> None:
    """Bootstrap compiles the pipelines with this one image for all steps."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras("train")) == set(known) - {"dev", "bench"}


def test_a_package_that_no_lock_names_fails_the_build(install: ModuleType) -> None:
    locked = {"torch": "2.13.0", "typing-extensions": "4.16.0"}
    fine = {"torch": "2.13.0+cpu", "typing_extensions": "4.16.0", "pip": "23.0", "vlmflow": "0.1.0"}
    assert install.strangers(fine, locked) == []
    assert install.strangers({**fine, "torch": "2.14.0", "left-pad": "1"}, locked) == ["left-pad==1", "torch==2.14.0"]


def test_locks_agree_with_each_other(install: ModuleType) -> None:
    every: dict[str, str] = {}
    for file in install.locks("cuda"):
        for package, version in install.pins([file]).items():
            assert every.setdefault(package, version) == version, f"{file.name}: {package}"


def test_bake_targets_are_the_images_of_the_chart() -> None:
    values = yaml.safe_load((ROOT / "helm" / "vlmflow" / "values.yaml").read_text(encoding="utf-8"))
    chart = {image["repository"] for image in values["images"].values() if isinstance(image, dict)}
    targets = set(re.findall(r'^target "([\w-]+)"', BAKE, re.M)) - {"common"}
    assert targets == chart == {f"vlmflow-{name}" for name in NAMES}
    assert set(re.findall(r'"(vlmflow-\w+)"', BAKE.split("group")[1].split("}")[0])) == targets
    assert set(re.findall(r'dockerfile = "images/(\w+)\.Containerfile"', BAKE.replace("  = ", " = "))) == set(NAMES)
    assert values["images"]["train"]["tag"] == vlmflow.__version__
    assert f'variable "VERSION" {{\n  default = "{vlmflow.__version__}"' in BAKE


@every_image
def test_the_context_holds_what_is_copied_and_nothing_private(name: str) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "everything is left out that is not named"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    tracked = subprocess.run(["git", "ls-files", *allowed], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for private in (".git", ".venv", ".vlmflow", "tests", "helm"):
        assert private not in allowed
        assert not any(line.split("/")[0] == private for line in tracked.splitlines())
    for word, rest in instructions(name):
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert source.split("/")[0] in allowed and (ROOT / source).exists(), source


@pytest.mark.parametrize("script", ["build.sh", "test.sh", "stand_in.sh"])
def test_scripts_say_what_is_not_installed(script: str) -> None:
    environment = {"PATH": "/nonexistent", "BASE_IMAGE": "stand-in"}
    done = subprocess.run(["/bin/bash", IMAGES / script], env=environment, capture_output=True, text=True)
    assert done.returncode == 3 and "apt-get install" in done.stderr
