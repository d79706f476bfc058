"""Candidate to champion, and back: the only code that writes the production model NAME.

Each change is found again by what it left: a copy by its source, a move by the alias, the record by its tag. So a
promoter killed between any two calls, a second replica, or a repeated command completes the same promotion instead of
making another. The alias `champion` moves last but one; `previous` was set to the old champion before, and the record
follows (DESIGN 8, platform.md 4.3, 4.5).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from vlmflow.digest import digest
from vlmflow.errors import RegistryError
from vlmflow.registry import dossier, policy, tracking
from vlmflow.registry.gates import GateResult

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, PREVIOUS = "champion", "previous"
VERDICT, RECORD, WITHDRAWN = "promotion.verdict", "promotion.record", "promotion.withdrawn"
TAG_CHARACTERS = 4500  # MLflow cuts tag values of model versions at 5000


@dataclass(frozen=True)
class Outcome:
    """What one look at a model found and did.

    Attributes:
        action: promoted | unchanged | waiting (an approval is missing).
        version: of NAME after it, "" when there is none.
        candidate: version of NAME-candidates that the champion came from, or that waits.
    """

    model: str
    action: str
    version: str
    candidate: str
    detail: str


def candidates_of(name: str) -> str:
    """Registered model that training writes."""
    return f"{name}-candidates"


def reconcile(
    mlflow: MlflowClient, name: str, asked: policy.Policy, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> Outcome:
    """Promote the newest candidate that passes, if it is newer than the champion; otherwise change nothing.

    Verdicts are kept as a tag of the candidate with a digest of what they were made from, so that weights are hashed
    again only when something changed; a promotion always hashes them again.

    Raises:
        RegistryError: MLflow does not answer or refuses.
    """
    with tracking.translated(f"reconciling {name}"):
        current = _champion(mlflow, name)
        _complete(mlflow, name, current, now)
        holder = int(_origin(name, current)) if current is not None else 0
        champion = _dossier(mlflow, current) if current is not None else None
        waiting: Outcome | None = None
        for candidate in _newest_first(mlflow, candidates_of(name)):
            if int(candidate.version) <= holder:
                break
            if WITHDRAWN in candidate.tags:
                continue
            results = _verdict(mlflow, candidate, champion, asked)
            if all(result.passed for result in results):
                version = apply(mlflow, name, candidate, results, "promoter", now)
                return Outcome(name, "promoted", version, str(candidate.version), _said(results))
            if waiting is None and policy.waits_for_approval(results):
                waiting = Outcome(name, "waiting", _number(current), str(candidate.version), _said(results))
        return waiting or Outcome(name, "unchanged", _number(current), str(holder or ""), "no newer candidate passes")


def _candidate(mlflow: MlflowClient, name: str, version: str) -> Any:
    """A version of NAME-candidates. Raises RegistryError naming those that there are."""
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.get_model_version(candidates_of(name), version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [str(found.version) for found in _newest_first(mlflow, candidates_of(name))]
        there = (
            f"it has {', '.join(known[:10])}" if known else f"no recipe with registry.model '{name}' registered any yet"
        )
        raise RegistryError(f"{candidates_of(name)} has no version {version}: {there}") from error


def verdict(mlflow: MlflowClient, name: str, version: str, asked: policy.Policy) -> list[GateResult]:
    """Judge one candidate now, hashes included. Raises RegistryError when it does not exist."""
    with tracking.translated(f"reading candidate {version} of {name}"):
        candidate = _candidate(mlflow, name, version)
        current = _champion(mlflow, name)
        champion = _dossier(mlflow, current) if current is not None else None
        return policy.judge(_dossier(mlflow, candidate), champion, asked, candidate.tags)


def promote(mlflow: MlflowClient, name: str, version: str, asked: policy.Policy, by: str) -> Outcome:
    """Promote one candidate by hand, through the same gates.

    Raises:
        RegistryError: a gate fails (all are listed), or the candidate was withdrawn.
    """
    results = verdict(mlflow, name, version, asked)
    with tracking.translated(f"promoting candidate {version} of {name}"):
        candidate = _candidate(mlflow, name, version)
        if why := candidate.tags.get(WITHDRAWN):
            raise RegistryError(
                f"candidate {version} of {name} was withdrawn ({why}); delete its tag {WITHDRAWN} to offer it again"
            )
        if failed := [result for result in results if not result.passed]:
            lines = "\n".join(f"  {result.name}: {result.detail}" for result in failed)
            raise RegistryError(f"candidate {version} of {name} fails {len(failed)} of {len(results)} gates:\n{lines}")
        number = apply(mlflow, name, candidate, results, by)
        return Outcome(name, "promoted", number, version, _said(results))


def apply(
    mlflow: MlflowClient,
    name: str,
    candidate: Any,
    results: list[GateResult],
    by: str,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> str:
    """Copy a judged candidate to NAME and move the aliases; returns the version of NAME. Repeating it changes nothing."""
    copy = _copy_of(mlflow, name, candidate)
    current = _champion(mlflow, name)
    record = {
        "action": "promote",
        "candidate": str(candidate.version),
        "replaces": _number(current),
        "by": by,
        "gates": {result.name: "pass" if result.passed else "fail" for result in results},
        "at": now().isoformat(timespec="seconds"),
    }
    if current is None or str(current.version) != str(copy.version):
        mlflow.set_model_version_tag(name, copy.version, RECORD, json.dumps(record, sort_keys=True)[:TAG_CHARACTERS])
        if current is not None:
            mlflow.set_registered_model_alias(name, PREVIOUS, current.version)
        mlflow.set_registered_model_alias(name, CHAMPION, copy.version)
    return str(copy.version)


def rollback(mlflow: MlflowClient, name: str, why: str, by: str) -> Outcome:
    """`champion` back to `previous`; the candidate it came from is withdrawn, so the promoter does not take it again.

    Raises:
        RegistryError: there is nothing to go back to.
    """
    with tracking.translated(f"rolling back {name}"):
        current, before = _champion(mlflow, name), _alias(mlflow, name, PREVIOUS)
        if current is None or before is None or before.version == current.version:
            raise RegistryError(
                f"{name} cannot be rolled back: champion is {_number(current) or 'not set'}, previous is "
                f"{_number(before) or 'not set'}. Promote an older candidate by hand instead: vlmflow promote {name} --candidate N"
            )
        at = datetime.now(UTC).isoformat(timespec="seconds")
        origin = _origin(name, current)
        mlflow.set_model_version_tag(candidates_of(name), origin, WITHDRAWN, f"{at} by {by}: {why}"[:TAG_CHARACTERS])
        record = {"action": "rollback", "from": _number(current), "why": why, "by": by, "at": at}
        mlflow.set_model_version_tag(name, before.version, RECORD, json.dumps(record, sort_keys=True)[:TAG_CHARACTERS])
        mlflow.set_registered_model_alias(name, CHAMPION, before.version)
        return Outcome(
            name, "rolled back", _number(before), _origin(name, before), f"version {current.version} withdrawn: {why}"
        )


def history(mlflow: MlflowClient, name: str) -> list[dict[str, Any]]:
    """The audit log: one record for each version of NAME that ever was champion, oldest first."""
    with tracking.translated(f"reading the history of {name}"):
        found = []
        for version in reversed(_newest_first(mlflow, name)):
            with contextlib.suppress(ValueError):
                found.append(
                    {"version": str(version.version), **json.loads(version.tags.get(RECORD, "null") or "null")}
                )
        return found


def _complete(mlflow: MlflowClient, name: str, current: Any, now: Callable[[], datetime]) -> None:
    """A champion whose alias someone moved by hand gets a record that says so."""
    if current is not None and RECORD not in current.tags:
        record = {"action": "alias moved outside the promoter", "at": now().isoformat(timespec="seconds")}
        mlflow.set_model_version_tag(name, current.version, RECORD, json.dumps(record, sort_keys=True))


def _verdict(mlflow: MlflowClient, candidate: Any, champion: Any, asked: policy.Policy) -> list[GateResult]:
    """The verdict kept with the candidate, if it was made from the same things and said no; else a fresh one."""
    basis = digest(
        {
            "policy": asked.model_dump(mode="json"),
            "champion": champion.model.weights_sha256 if champion else "",
            "approval": candidate.tags.get(asked.approval_tag, "") if asked.approval_tag else "",
            "run": candidate.run_id,
        }
    )
    with contextlib.suppress(ValueError, KeyError, TypeError):
        kept = json.loads(candidate.tags[VERDICT])
        if kept["basis"] == basis and kept["failed"]:
            return [GateResult(each["name"], False, each["detail"]) for each in kept["failed"]]
    try:
        results = policy.judge(_dossier(mlflow, candidate), champion, asked, candidate.tags)
    except RegistryError as error:
        results = [GateResult("dossier", False, str(error))]
    failed = [{"name": r.name, "detail": r.detail[:400]} for r in results if not r.passed]
    kept = json.dumps({"basis": basis, "failed": failed}, sort_keys=True)
    if len(kept) <= TAG_CHARACTERS and candidate.tags.get(VERDICT) != kept:
        mlflow.set_model_version_tag(candidate.name, candidate.version, VERDICT, kept)
    return results


def _copy_of(mlflow: MlflowClient, name: str, candidate: Any) -> Any:
    """The version of NAME that is a copy of this candidate; made when absent, the oldest when there are several."""
    source = f"models:/{candidate.name}/{candidate.version}"
    same = [version for version in reversed(_newest_first(mlflow, name)) if version.source == source]
    return same[0] if same else mlflow.copy_model_version(source, name)


def _origin(name: str, version: Any) -> str:
    """Number of the candidate that a version of NAME is a copy of; "0" for a version made by hand."""
    prefix = f"models:/{candidates_of(name)}/"
    return version.source.removeprefix(prefix) if str(version.source).startswith(prefix) else "0"


def _dossier(mlflow: MlflowClient, version: Any) -> dossier.Dossier:
    return dossier.read(mlflow, version.run_id, f"{version.name}/{version.version}")


def _newest_first(mlflow: MlflowClient, name: str) -> list[Any]:
    found, token = [], None
    while True:
        page = mlflow.search_model_versions(f"name = '{name}'", page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return sorted(found, key=lambda version: -int(version.version))


def _champion(mlflow: MlflowClient, name: str) -> Any | None:
    return _alias(mlflow, name, CHAMPION)


def _alias(mlflow: MlflowClient, name: str, alias: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _number(version: Any | None) -> str:
    return "" if version is None else str(version.version)


def _said(results: list[GateResult]) -> str:
    return "; ".join(f"{result.name}: {'pass' if result.passed else 'fail'}" for result in results)
