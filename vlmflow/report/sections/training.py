"""Frozen and trainable parts, loss and learning rate of every stage and candidate."""

from __future__ import annotations

from typing import Any

from vlmflow.report import charts
from vlmflow.report.html import Safe, absent, code, el, join, note, table, tag
from vlmflow.report.numbers import number, short
from vlmflow.report.page import READ_ERRORS, UNTRAINED, Page

_STAGES = {"bootstrap": "Model P: first training on the seed set", "ocr": "Stage 1: OCR encoder and projector",
           "align": "Stage 2: alignment"}  # fmt: skip
_COLUMNS = ("module", "parameters", "tensors", "trainable", "lr")
WINDOW = 0.05  # half width of the running mean, as a share of the curve
_LAST = {"tokens_per_second": "tokens/s", "images_per_second": "images/s", "grad_norm": "gradient norm",
         "data_wait": "share of time waiting for data", "memory_mb": "memory MB", "mfu": "MFU"}  # fmt: skip


def section(page: Page) -> Safe:
    trained = {name: ref for name, ref in page.inputs.models.items() if ref.lineage.log_uri and name != UNTRAINED}
    # The chosen model may be handed in a second time under another name; its log would be the same.
    seen: set[str] = set()
    parts: list[Safe] = []
    candidates: dict[str, list[tuple[float, float]]] = {}
    for name, ref in trained.items():
        if ref.lineage.log_uri in seen:
            continue
        seen.add(ref.lineage.log_uri or "")
        try:
            log = page.training_log(name)
            parts.append(_stage(page, name, ref.lineage.stage, log))
            if name not in _STAGES:
                candidates[name] = _curve(log, "loss")
        except READ_ERRORS as error:
            parts.append(join([el("h3", name), absent(f"The training log cannot be read: {error}")]))
    if not parts:
        return absent("No model with a training log was handed in.")
    if len(candidates) > 1:
        parts.append(el("h3", "All candidates"))
        parts.append(
            charts.lines({n: smooth(c) for n, c in candidates.items()}, "loss, running mean", width=720, height=230)
        )
        parts.append(charts.legend(list(candidates)))
    return join(parts)


def _unit(page: Page, stage: str) -> str:
    """What the loss of a stage counts by: its objective says."""
    recipe = page.ctx.recipe
    spec = recipe.bootstrap if stage == "bootstrap" else recipe.stages.get(stage)
    dpo = spec is not None and spec.objective.kind == "dpo"
    return "loss per pair of answers" if dpo else "loss per target token, nats"


def _stage(page: Page, name: str, stage: str, log: list[dict[str, Any]]) -> Safe:
    title = _STAGES.get(name) or (f"Stage 3, candidate {name}" if stage == "sft" else f"{stage} {name}".strip())
    parts: list[Safe] = [el("h3", title)]
    try:
        frozen = page.training_table(name)
    except READ_ERRORS as error:
        frozen = None
        parts.append(note(f"The frozen/trainable table cannot be read: {error}"))
    parts.append(_frozen(frozen) if frozen else note("No frozen/trainable table lies beside this log."))
    parts.append(_plan(frozen))
    loss = _curve(log, "loss")
    if not loss:
        return join([*parts, absent("The log holds no loss.")])
    rates = _rates(log)
    parts.append(
        el(
            "div",
            el("div", charts.lines({"each step": loss, "mean": smooth(loss)}, _unit(page, stage), faint="each step"),
               charts.legend(["each step", "running mean"], ["s0 faint", "s0"])),
            el("div", charts.lines(rates, "learning rate"), charts.legend(list(rates))) if rates else "",
            cls="pair",
        )
    )  # fmt: skip
    last = log[-1]
    end = ", ".join(
        f"{name} {short(last[key])}" for key, name in _LAST.items() if isinstance(last.get(key), int | float)
    )
    tail = loss[-max(1, len(loss) // 10) :]
    parts.append(note(f"{len(loss)} logged steps; loss {short(loss[0][1])} at first, {short(sum(y for _, y in tail) / len(tail))} "
                      f"over the last tenth{'; last record: ' + end if end else ''}."))  # fmt: skip
    return join(parts)


def _plan(data: Any) -> Safe:
    """What the pack plan says: steps, tokens, fill, and examples that were left out, with the reasons."""
    plan = data.get("plan") if isinstance(data, dict) else None
    examples = data.get("examples") if isinstance(data, dict) else None
    texts = []
    if isinstance(plan, dict):
        plain = {k: v for k, v in plan.items() if not isinstance(v, list | dict)}
        texts.append("Pack plan: " + ", ".join(f"{k.replace('_', ' ')} {short(v)}" for k, v in plain.items()))
    if isinstance(examples, dict):
        texts.append(
            "Examples: " + ", ".join(f"{k} {short(v)}" for k, v in examples.items() if isinstance(v, int | float))
        )
        for reason in examples.get("reasons") or []:
            if isinstance(reason, dict):
                texts.append(f"{reason.get('count')} × {reason.get('reason')} (e.g. {reason.get('example')})")
    return note("; ".join(texts) + ".") if texts else Safe("")


def _curve(log: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    points = []
    for i, record in enumerate(log):
        step, value = number(record.get("step")), number(record.get(key))
        if value is not None:
            points.append((float(i + 1) if step is None else step, value))
    return points


def _rates(log: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Learning rates by group: records hold `lr` as a number, a list, or group -> number, or `lr/GROUP` keys."""
    found: dict[str, list[tuple[float, float]]] = {}
    for i, record in enumerate(log):
        step = number(record.get("step"))
        step = float(i + 1) if step is None else step
        pairs: list[tuple[str, Any]] = [(k[3:], v) for k, v in record.items() if k.startswith(("lr/", "lr.", "lr_"))]
        rate = record.get("lr")
        if isinstance(rate, dict):
            pairs += list(rate.items())
        elif isinstance(rate, list):
            pairs += [(f"group {k + 1}", value) for k, value in enumerate(rate)]
        elif rate is not None:
            pairs.append(("lr", rate))
        for name, value in pairs:
            if (known := number(value)) is not None:
                found.setdefault(str(name), []).append((step, known))
    together: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, points in found.items():  # equal curves would hide each other
        together.setdefault(tuple(points), []).append(name.removesuffix(" (no decay)"))
    return {", ".join(dict.fromkeys(names)): list(points) for points, names in together.items()}


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred running mean, which does not lag; narrower at both ends so that it stays centred."""
    wide = max(1, round(len(points) * WINDOW))
    out = []
    for i, (x, _) in enumerate(points):
        half = min(wide, i, len(points) - 1 - i)
        part = points[i - half : i + half + 1]
        out.append((x, sum(y for _, y in part) / len(part)))
    return out


def _frozen(data: Any) -> Safe:
    """The table as training wrote it: a list of rows, possibly under a key; hashes shortened, numbers grouped."""
    rows = data if isinstance(data, list) else next((v for v in data.values() if isinstance(v, list)), [])
    rows = [row for row in rows if isinstance(row, dict)]
    if not rows:
        return note("The frozen/trainable table is empty.")
    present = dict.fromkeys(key for row in rows for key in row if row[key] not in (None, ""))
    columns = [c for c in _COLUMNS if c in present] + [c for c in present if c not in _COLUMNS]
    numeric = {
        i for i, c in enumerate(columns) if all(number(row.get(c)) is not None or row.get(c) is None for row in rows)
    }
    body = [[_cell(column, row.get(column)) for column in columns] for row in rows]
    return table([column.replace("_", " ") for column in columns], body, numeric=numeric)


def _cell(column: str, value: Any) -> Any:
    if column == "trainable" and isinstance(value, bool):
        return tag("trains", "good") if value else tag("frozen")
    if isinstance(value, str) and value in ("frozen", "trainable", "trained"):
        return tag(value, "" if value == "frozen" else "good")
    if isinstance(value, str) and len(value) == 64:
        return code(value)
    if isinstance(value, list | dict):
        return str(value)
    return short(value)
