"""MLflow's share: two registered models a product, identities that may write one each, and the webhook.

Creating a version and moving an alias need the same right, so training gets EDIT on NAME-candidates and READ on NAME,
the promoter the other way round (platform.md 4.3).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from vlmflow.errors import RegistryError
from vlmflow.registry.promote import candidates_of

EVENTS = (("model_version", "created"), ("model_version_tag", "set"))
RESOURCE = "registered_model"


@dataclass(frozen=True)
class Identity:
    """A user of MLflow and what it may do: (model name pattern) -> READ | EDIT."""

    username: str
    password: str
    candidates: str
    production: str


def models(mlflow: Any, names: list[str]) -> list[str]:
    """Both registered models of every name; returns those that were made."""
    from mlflow.exceptions import MlflowException

    made = []
    for name in names:
        for each, text in (
            (candidates_of(name), "Candidates of training; the promoter copies one to the name without suffix."),
            (name, "Production versions; only the promoter writes here. Aliases: champion, previous."),
        ):
            try:
                mlflow.create_registered_model(each, description=text)
                made.append(each)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
    return made


def webhook(mlflow: Any, url: str, secret: str) -> str:
    """One active webhook of that URL for the events that wake the promoter; returns made | updated | kept.

    The secret cannot be read back, so an existing webhook gets it again.
    """
    from mlflow.entities.webhook import WebhookEvent, WebhookStatus

    events = [WebhookEvent(entity, action) for entity, action in EVENTS]
    same = [hook for hook in _webhooks(mlflow) if hook.url == url]
    for extra in same[1:]:
        mlflow.delete_webhook(extra.webhook_id)
    if not same:
        mlflow.create_webhook(
            name="vlmflow-promoter", url=url, events=events, secret=secret, description="Wakes vlmflow's promoter."
        )
        return "made"
    mlflow.update_webhook(same[0].webhook_id, events=events, secret=secret, status=WebhookStatus.ACTIVE)
    return "updated"


def _webhooks(mlflow: Any) -> list[Any]:
    found, token = [], None
    while True:
        page = mlflow.list_webhooks(page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found


def identities(admin: Any, names: list[str], users: list[Identity]) -> list[str]:
    """Users with rights on the models; returns what was changed.

    Args:
        admin: `mlflow.server.auth.client.AuthServiceClient` of an administrator.

    Raises:
        RegistryError: the server has no authentication, or refuses the administrator.
    """
    from mlflow.exceptions import MlflowException

    changed = []
    for user in users:
        try:
            admin.get_user(user.username)
            admin.update_user_password(user.username, user.password)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise RegistryError(f"MLflow refuses to show user '{user.username}': {error.error_code}") from error
            admin.create_user(user.username, user.password)
            changed.append(f"user {user.username}")
        for name in names:
            for model, right in ((candidates_of(name), user.candidates), (name, user.production)):
                if _grant(admin, model, user.username, right):
                    changed.append(f"{user.username}: {right} on {model}")
    return changed


def _grant(admin: Any, model: str, username: str, right: str) -> bool:
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):
        if admin.get_user_permission(username, RESOURCE, model).permission == right:
            return False
    admin.grant_user_permission(username, RESOURCE, model, right)
    return True
