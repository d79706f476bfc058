"""Where a user's installation is: flag, then environment, then file.

The file is `~/.config/vlmflow/config.yaml` (or VLMFLOW_CONFIG) and holds names and addresses. A token may lie there only
if nobody else can read the file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlmflow.errors import RecipeError

VARIABLES = {
    "endpoint": "VLMFLOW_KFP_ENDPOINT",
    "token": "VLMFLOW_KFP_TOKEN",
    "namespace": "VLMFLOW_NAMESPACE",
    "experiment": "VLMFLOW_EXPERIMENT",
    "service_account": "VLMFLOW_SERVICE_ACCOUNT",
    "root": "VLMFLOW_ROOT",
    "mlflow": "MLFLOW_TRACKING_URI",
}
DEFAULTS = {"namespace": "kubeflow", "experiment": "vlmflow"}


@dataclass(frozen=True)
class Settings:
    """One installation.

    Attributes:
        endpoint: URL of Kubeflow Pipelines; token: bearer token or "".
        service_account: account that runs get; "" = the backend's default.
        root: URI under which all objects lie.
        sources: setting -> flag | environment | file | default, for `vlmflow doctor`.
    """

    endpoint: str = ""
    token: str = ""
    namespace: str = ""
    experiment: str = ""
    service_account: str = ""
    root: str = ""
    mlflow: str = ""
    sources: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("token", "sources")}
        return f"Settings({shown}, token={'set' if self.token else 'not set'})"


def config_file() -> Path:
    """The file of settings, whether it exists or not."""
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get("VLMFLOW_CONFIG") or base / "vlmflow" / "config.yaml")


def load(**flags: str | None) -> Settings:
    """Settings by precedence flag > environment > file > default.

    Raises:
        RecipeError: the file is not YAML, names an unknown setting, or holds a token that others can read.
    """
    path = config_file()
    stored = _read(path)
    found: dict[str, str] = {}
    sources = []
    for name, variable in VARIABLES.items():
        for source, value in (
            ("flag", flags.get(name)),
            ("environment", os.environ.get(variable)),
            ("file", stored.get(name)),
            ("default", DEFAULTS.get(name, "")),
        ):
            if value:
                found[name] = str(value)
                sources.append((name, source))
                break
    return Settings(**found, sources=tuple(sources))


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as settings: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or (set(content) - set(VARIABLES)):
        unknown = sorted(set(content) - set(VARIABLES)) if isinstance(content, dict) else [type(content).__name__]
        raise RecipeError(f"{path}: unknown settings {unknown}; there are {sorted(VARIABLES)}")
    if content.get("token") and path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        raise RecipeError(f"{path} holds a token and others can read it: chmod 600 {path}")
    return content
