"""MLflow's tracking server as the chart runs it: migrated first, with logins, settings from the environment only.

`migrate` brings both databases to the current schema and is safe to repeat; `serve` replaces itself by the server. The
administrator's password is written to a file that only this process can read, because MLflow takes it from its
configuration file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from vlmflow.errors import ServiceError, VlmflowError

NEEDED = (
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_AUTH_DATABASE_URI",
    "MLFLOW_AUTH_ADMIN_USERNAME",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
)


def checked() -> dict[str, str]:
    """The settings. Raises ServiceError naming all that are missing (never their values)."""
    found = {name: os.environ.get(name, "") for name in NEEDED}
    if missing := [name for name, value in found.items() if not value]:
        raise ServiceError(f"the MLflow server needs {', '.join(missing)} in its environment")
    return found


def auth_config(settings: dict[str, str], folder: Path) -> Path:
    """MLflow's basic-auth configuration, readable by this user only. Everybody with a login may read; writing is given."""
    path = folder / "basic_auth.ini"
    text = (
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = {settings['MLFLOW_AUTH_DATABASE_URI'].replace('%', '%%')}\n"
        f"admin_username = {settings['MLFLOW_AUTH_ADMIN_USERNAME']}\n"
        f"admin_password = {settings['MLFLOW_AUTH_ADMIN_PASSWORD'].replace('%', '%%')}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    return path


def migrate(settings: dict[str, str]) -> None:
    """Both databases to the current schema; new ones are made. Raises ServiceError that names the database by its kind."""
    import logging

    from mlflow.server.auth.db import utils as users
    from mlflow.store.db import utils as tracking
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("alembic").setLevel(logging.WARNING)
    what = "tracking"
    try:
        engine = tracking.create_sqlalchemy_engine_with_retry(settings["MLFLOW_BACKEND_STORE_URI"])
        tracking._safe_initialize_tables(engine)
        tracking._upgrade_db(engine)
        what = "users'"
        users.migrate(create_engine(settings["MLFLOW_AUTH_DATABASE_URI"]), "head")
    except (SQLAlchemyError, OSError) as error:
        kind = settings["MLFLOW_BACKEND_STORE_URI"].partition(":")[0]
        # the error's text may hold the connection's password
        raise ServiceError(
            f"the {what} database ({kind}) cannot be migrated: {type(error).__name__}. Is it there, and may this user change it?"
        ) from None


def serve(settings: dict[str, str], host: str = "0.0.0.0", port: int = 5000) -> None:
    """Become the server; does not return."""
    folder = Path(tempfile.mkdtemp(prefix="mlflow-"))
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(auth_config(settings, folder))
    arguments = ["-m", "mlflow", "server", "--app-name", "basic-auth", "--host", host, "--port", str(port)]
    destination = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION", "")
    if destination:
        arguments += ["--serve-artifacts", "--artifacts-destination", destination]
    arguments += ["--workers", os.environ.get("MLFLOW_WORKERS", "2")]  # the databases' addresses stay out of `ps`
    os.execv(sys.executable, [sys.executable, *arguments])


def main(argv: list[str]) -> int:
    """`migrate` or `serve [HOST [PORT]]`."""
    try:
        settings = checked()
        if argv[:1] == ["migrate"]:
            migrate(settings)
            return 0
        if argv[:1] == ["serve"]:
            serve(settings, argv[1] if len(argv) > 1 else "0.0.0.0", int(argv[2]) if len(argv) > 2 else 5000)
        raise ServiceError(f"expected `migrate` or `serve`, got {argv}")
    except VlmflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
