"""Start the promoter: `python -m services.promoter --model NAME ...`; secrets and endpoints come from the environment."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from vlmflow.errors import RecipeError, VlmflowError
from vlmflow.registry.promote import Outcome


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="promoter", description="Move candidates that pass their gates to production.")
    made.add_argument(
        "--model", action="append", required=True, help="registered model NAME; candidates are NAME-candidates"
    )
    made.add_argument(
        "--policies", help="JSON file: model -> policy (floors, times_chance, regression, contamination, approval_tag)"
    )
    made.add_argument(
        "--approval-tag", default="", help="tag that a person sets on a candidate, for models without a policy"
    )
    made.add_argument("--period", type=float, default=300.0, help="seconds between rounds (default 300)")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    made.add_argument("--port", type=int, default=8080, help="port to listen on (default 8080)")
    made.add_argument("--export-pipeline", default="", help="Kubeflow pipeline started with each promoted model")
    made.add_argument("--deployment", default="", help="NAMESPACE/NAME of a Deployment moved to each promoted model")
    made.add_argument("--deployment-container", default="", help="its container")
    made.add_argument("--deployment-env", default="MODEL_URI", help="variable that gets the model's URI")
    return made


def policies(path: str | None, models: list[str], approval_tag: str) -> dict:
    """Policy of every model. Raises RecipeError for a file that is not one or names an unknown model."""
    from pydantic import ValidationError

    from vlmflow.registry.policy import Policy

    try:
        given = json.loads(Path(path).read_text()) if path else {}
        if unknown := sorted(set(given) - set(models)):
            raise RecipeError(f"{path} has policies for {unknown}, this promoter looks after {models}")
        return {
            model: Policy.model_validate({"approval_tag": approval_tag, **given.get(model, {})}) for model in models
        }
    except (OSError, ValueError, ValidationError, TypeError) as error:
        raise RecipeError(f"{path} is not a file of policies: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM; returns the exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asked = policies(args.policies, args.model, args.approval_tag)
        after = _after(args)
    except VlmflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    import uvicorn

    from services.promoter.app import create
    from services.promoter.loop import Loop
    from services.promoter.webhook import Verifier
    from vlmflow.registry import desk, promote, tracking

    def look(model: str) -> Outcome:
        mlflow = tracking.client()
        desk.publish(mlflow, model, asked[model])
        return promote.reconcile(mlflow, model, asked[model])

    secret = os.environ.get("VLMFLOW_WEBHOOK_SECRET", "")
    loop = Loop(args.model, look, after, args.period)
    loop.start()
    try:
        uvicorn.run(
            create(loop, Verifier(secret) if secret else None),
            host=args.host,
            port=args.port,
            log_level="warning",
            access_log=False,
            server_header=False,
        )
    finally:
        loop.stop()
    return 0


def _after(args: argparse.Namespace) -> Callable[[Outcome], None]:
    from services.promoter.after import Serving, followers, point_deployment

    export = serve = None
    if args.export_pipeline:
        from vlmflow.client import Client

        def export(outcome: Outcome) -> None:
            Client().start_once(
                args.export_pipeline,
                f"export-{outcome.model}-{outcome.version}",
                {"model": f"models:/{outcome.model}/{outcome.version}"},
            )

    if args.deployment:
        namespace, _, name = args.deployment.partition("/")
        if not name or not args.deployment_container:
            raise RecipeError("--deployment needs NAMESPACE/NAME and --deployment-container")
        serving = Serving(namespace, name, args.deployment_container, args.deployment_env)

        def serve(outcome: Outcome) -> None:
            from kubernetes import client, config

            from vlmflow.registry import tracking

            config.load_incluster_config()
            uri = tracking.client().get_model_version_download_uri(outcome.model, outcome.version)
            point_deployment(client.AppsV1Api(), serving, uri)

    return followers(export, serve)


if __name__ == "__main__":
    sys.exit(main())
