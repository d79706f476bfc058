"""`python -m services.bootstrap --bucket B --pipeline P --model M --image I`; endpoints and secrets from the environment."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from vlmflow.errors import RegistryError, VlmflowError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="bootstrap", description="Prepare store, Kubeflow Pipelines and MLflow; may be repeated."
    )
    made.add_argument("--bucket", action="append", default=[], help="bucket that must exist")
    made.add_argument("--pipeline", action="append", default=[], help="pipeline registered in Kubeflow Pipelines")
    made.add_argument(
        "--model", action="append", default=[], help="model NAME: NAME and NAME-candidates, with rights and webhook"
    )
    made.add_argument("--image", default="", help="image that the pipelines' steps run in")
    made.add_argument("--data-image", default="", help="image of the steps that need no torch")
    made.add_argument("--ocr-image", default="", help="image of the step ocr")
    return made


def buckets(names: list[str]) -> str:
    """Every bucket exists and takes an object. Raises StorageError."""
    from vlmflow import storage
    from vlmflow.storage_s3 import s3_store

    for name in names:
        s3_store().make_bucket(name)
        storage.check(f"s3://{name}")
    return f"{', '.join(names) or 'none'} writable"


def pipelines(names: list[str], image: str, data: str = "", ocr: str = "") -> str:
    """Every pipeline is registered in its current version, its steps in these images. Raises ServiceError."""
    from vlmflow import compiler, installation, kfp_api

    asked = installation.with_images(installation.from_environment(), image, data, ocr)
    kfp = kfp_api.connect(os.environ.get("VLMFLOW_KFP_ENDPOINT", ""), os.environ.get("VLMFLOW_KFP_TOKEN", ""))
    said = []
    with tempfile.TemporaryDirectory(prefix="vlmflow-packages-") as folder:
        for name in names:
            package = compiler.compile_pipeline(name, installation=asked)
            _, _, new = kfp_api.register(kfp, name, package.text, Path(folder))
            said.append(f"{name} ({'new version' if new else 'unchanged'})")
    return ", ".join(said) or "none"


def registry(names: list[str]) -> str:
    """Registered models, the two identities' rights, and the promoter's webhook. Raises RegistryError."""
    from services.bootstrap import mlflow_setup
    from vlmflow.registry import tracking

    mlflow = tracking.client()
    with tracking.translated("preparing the registry"):
        said = [f"models made: {', '.join(mlflow_setup.models(mlflow, names)) or 'none'}"]
        if users := _identities():
            from mlflow.server.auth.client import AuthServiceClient

            changed = mlflow_setup.identities(AuthServiceClient(tracking.tracking_uri()), names, users)
            said.append(f"rights changed: {', '.join(changed) or 'none'}")
        url, secret = os.environ.get("VLMFLOW_WEBHOOK_URL", ""), os.environ.get("VLMFLOW_WEBHOOK_SECRET", "")
        if url and secret:
            said.append(f"webhook {mlflow_setup.webhook(mlflow, url, secret)}")
    return "; ".join(said)


def _identities() -> list:
    """The training and the promoting identity, where their secrets are mounted. Raises RegistryError for half a pair."""
    from services.bootstrap.mlflow_setup import Identity

    found = []
    for who, candidates, production in (("TRAINER", "EDIT", "READ"), ("PROMOTER", "EDIT", "MANAGE")):
        name, password = (os.environ.get(f"VLMFLOW_{who}_{part}", "") for part in ("USERNAME", "PASSWORD"))
        if bool(name) != bool(password):
            raise RegistryError(f"VLMFLOW_{who}_USERNAME and VLMFLOW_{who}_PASSWORD must both be set, or neither")
        if name:
            found.append(Identity(name, password, candidates, production))
    return found


def main(argv: list[str] | None = None) -> int:
    """Try every part, print one line each, return the exit code of the first that failed."""
    args = parser().parse_args(argv)
    parts: list[tuple[str, Callable[[], str]]] = [
        ("store", lambda: buckets(args.bucket)),
        ("pipelines", lambda: pipelines(args.pipeline, args.image, args.data_image, args.ocr_image)),
    ]
    if args.model:
        parts.append(("registry", lambda: registry(args.model)))
    code = 0
    for name, part in parts:
        try:
            print(f"{name:<10} {part()}", flush=True)
        except VlmflowError as error:
            print(f"{name:<10} failed: {error}", file=sys.stderr, flush=True)
            code = code or error.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
