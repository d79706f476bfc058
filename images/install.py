"""Make an image's environment from the locks; runs in the builder stage of every image.

    python3 images/install.py [--torch cpu|cuda] EXTRA...

Installs what pyproject.toml asks for with these extras into /opt/venv, with requirements/*.txt as constraints. A package
that no lock names would be of the version that pip happened to find on that day, so it fails the build.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = Path("/opt/venv")
OWN = {"pip", "vlmflow"}  # of the base image; this project


def locks(torch: str) -> list[Path]:
    """Lock files that apply; the CUDA libraries have a file of their own."""
    names = ["build.txt", "cpu.txt", *(["cuda.txt"] if torch == "cuda" else [])]
    return [ROOT / "requirements" / name for name in names]


def normal(name: str) -> str:
    """A package's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(files: list[Path]) -> dict[str, str]:
    """Normalised name -> version of every line `name==version`."""
    lines = [line.split("#")[0].strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if line}


def requirements(extras: list[str]) -> list[str]:
    """What the project asks for with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]


def strangers(installed: dict[str, str], locked: dict[str, str]) -> list[str]:
    """Installed packages that the locks do not name in this version; a local part such as +cpu does not count."""
    return sorted(
        f"{name}=={version}"
        for name, version in installed.items()
        if normal(name) not in OWN and locked.get(normal(name)) != version.split("+")[0]
    )


def pip(*arguments: str) -> None:
    """pip of the new environment; its own settings (index, certificates) come from the machine that builds."""
    subprocess.run([VENV / "bin/python", "-m", "pip", *arguments], check=True)


def main() -> int:
    """Install, then look at what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="+")
    parser.add_argument("--torch", choices=["none", "cpu", "cuda"], default="none")
    arguments = parser.parse_args()
    files = locks(arguments.torch)
    install = ["install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    for file in files:
        install += ["--constraint", str(file)]
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    # deepspeed's build looks for torch, so torch comes before it and builds are not isolated
    tools = ["setuptools", "wheel", *(["torch", "ninja", "numpy"] if arguments.torch != "none" else [])]
    pip(*install, *tools)
    pip(*install, "--no-build-isolation", *requirements(arguments.extras))

    listing = subprocess.run(
        [VENV / "bin/python", "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        check=True,
        capture_output=True,
        text=True,
    )
    installed = {each["name"]: each["version"] for each in json.loads(listing.stdout)}
    if wrong := strangers(installed, pins(files)):
        print(f"not in {', '.join(file.name for file in files)}: {', '.join(wrong)}", file=sys.stderr)
        return 1
    if arguments.torch != "none":
        found = subprocess.run(
            [VENV / "bin/python", "-c", "import torch; print('cuda' if torch.version.cuda else 'cpu')"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        if found != arguments.torch:
            print(f"TORCH={arguments.torch} was asked for, pip found a build for {found}", file=sys.stderr)
            return 1
    print(f"{len(installed)} packages, all of them locked")
    return 0


if __name__ == "__main__":
    sys.exit(main())
