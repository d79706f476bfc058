"""Which version was registered, what the gates say, and whether the exported directory gives what was trained."""

from __future__ import annotations

from typing import Any

from vlmflow.report.html import Safe, absent, code, el, facts, join, table, tag
from vlmflow.report.numbers import short, size
from vlmflow.report.page import Page

SMOKE_SHOWN = 8


def section(page: Page) -> Safe:
    return join(
        [el("h3", "Registry"), _registered(page.inputs.registered), el("h3", "Export"), _exported(page.inputs.exported)]
    )


def _registered(found: dict[str, Any] | None) -> Safe:
    if not found:
        return absent("No version was registered.")
    keys = [key for key in ("name", "version", "run_id", "url", "source") if found.get(key)]
    rows = [(key.replace("_", " "), el("code", found[key])) for key in keys]
    gates = found.get("gates") or {}
    details = found.get("gate_details") or {}
    verdicts = [[name.replace("_", " "), _mark(value), details.get(name, "")] for name, value in gates.items()]
    split = found.get("gate_split")
    asked = f"found and asked for ({split} split)" if split else "found and asked for"
    return join([
        facts(rows),
        table(["gate", "verdict", asked], verdicts) if verdicts else absent("No gate was evaluated."),
    ])  # fmt: skip


def _mark(value: Any) -> Safe:
    good = value in (True, "pass", "passed", "ok")
    return tag("pass" if good else "fail", "good" if good else "bad")


def _exported(found: dict[str, Any] | None) -> Safe:
    if not found:
        return absent("No directory was exported.")
    parts = [el("p", "Directory ", el("code", found.get("uri", "")))]
    smoke = found.get("smoke")
    if smoke is None:
        parts.append(absent("The smoke test of the export did not run."))
    elif isinstance(smoke, dict):
        parts += [el("p", "Smoke test of the directory as a stranger would load it:"), _smoke(smoke)]
    else:
        parts.append(el("p", "Smoke test: ", el("code", smoke)))
    files = [file if isinstance(file, dict) else {"path": file} for file in found.get("files") or []]
    if files:
        rows = [[file.get("path"), size(file.get("bytes") or 0), code(file.get("sha256"))] for file in files]
        body = table(["file", "size", "sha256"], rows, numeric=(1,))
        parts.append(
            el("details", el("summary", f"Files: {len(files)}, {size(sum(f.get('bytes') or 0 for f in files))}"), body)
        )
    return join(parts)


def _smoke(smoke: dict[str, Any]) -> Safe:
    """Figures as facts; lists of equal length (prompts, answers of both) as the columns of one table."""
    lists = {key: value for key, value in smoke.items() if isinstance(value, list) and value}
    rows = [(key.replace("_", " "), _value(value)) for key, value in smoke.items() if key not in lists]
    parts = [facts(rows)] if rows else []
    for length in sorted({len(value) for value in lists.values()}):
        columns = {key: value for key, value in lists.items() if len(value) == length}
        body = [[_value(value[k]) for value in columns.values()] for k in range(min(length, SMOKE_SHOWN))]
        parts.append(table([key.replace("_", " ") for key in columns], body))
    return join(parts)


def _value(value: Any) -> Any:
    if isinstance(value, bool):
        return tag("yes", "good") if value else tag("no", "bad")
    if isinstance(value, dict):
        return ", ".join(f"{k} {short(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return code(value) if isinstance(value, str) and len(value) == 64 else short(value)
