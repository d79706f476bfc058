"""What differs between two datasets: two states of one, or two that were pulled apart.

Samples are the same when their keys are; whether their pictures are too is told by sha256 where both wide tables hold it.
DuckDB joins the two tables by key with its memory bounded; only counts and a few examples come back.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vlmflow.look.build import FIXED
from vlmflow.look.sql import answering, attach, quoted
from vlmflow.look.table import Table

if TYPE_CHECKING:
    import duckdb

    from vlmflow.dataset.manifest import Manifest

EXAMPLES = 5


def diff(a: Manifest, b: Manifest, table_a: Table, table_b: Table, examples: int = EXAMPLES) -> dict[str, Any]:
    """All differences from `a` to `b`.

    Returns:
        `same` (nothing differs); `a`, `b` (name, digest, samples); `shards`, `samples`, `images` (added, removed, ...);
        `sources`; `layers` (added, removed, changed parameters); `steps` (changed parameters of lineage entries that are no
        layer); `values` by column; `decisions` by change with both reasons. Lists of examples hold at most `examples`.
    """
    made: dict[str, Any] = {
        name: {"name": m.name, "digest": m.digest, "samples": m.samples} for name, m in (("a", a), ("b", b))
    }
    made["shards"] = _shards(a, b)
    made["layers"] = _layers(a, b)
    made["steps"] = _steps(a, b)
    with attach({"ra": table_a.path, "rb": table_b.path}) as con, answering(table_a.path.parent):
        made["samples"] = _samples(con, examples)
        made["sources"] = _sources(con)
        made["images"] = _images(con, table_a, table_b, examples)
        made["values"] = _values(con, a, b, table_a, table_b, examples)
        made["decisions"] = _decisions(con, examples)
    made["same"] = a.digest == b.digest or not (
        any(made["shards"][k] for k in ("added", "removed")) or any(made["samples"][k] for k in ("added", "removed"))
        or any(made["layers"].values()) or made["steps"] or made["values"] or made["decisions"]
    )  # fmt: skip
    return made


def _shards(a: Manifest, b: Manifest) -> dict[str, Any]:
    first, second = {s.sha256: s for s in a.shards}, {s.sha256: s for s in b.shards}
    return {
        "common": len(first.keys() & second.keys()),
        "added": [second[s].uri for s in second if s not in first],
        "removed": [first[s].uri for s in first if s not in second],
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def _changes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """Parameters that differ: [before, after]; None where there is none."""
    first, second = _flat(a), _flat(b)
    return {
        name: [first.get(name), second.get(name)]
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    }


def _layers(a: Manifest, b: Manifest) -> dict[str, Any]:
    changed = {}
    for name in sorted(a.layers.keys() & b.layers.keys()):
        if a.layers[name].digest != b.layers[name].digest:
            found = _changes(a.layers[name].params, b.layers[name].params)
            changed[name] = found or {
                "(not its parameters)": ["what it was computed from", "or the version of the step"]
            }
    return {
        "added": sorted(b.layers.keys() - a.layers.keys()),
        "removed": sorted(a.layers.keys() - b.layers.keys()),
        "changed": changed,
    }


def _steps(a: Manifest, b: Manifest) -> dict[str, Any]:
    first = {e.step: e for e in a.lineage if e.step not in a.layers}
    second = {e.step: e for e in b.lineage if e.step not in b.layers}
    found = {}
    for step in sorted({*first, *second}):
        before, after = first.get(step), second.get(step)
        if changes := _changes(before.params if before else {}, after.params if after else {}):
            found[step] = changes
    return found


def _samples(con: duckdb.DuckDBPyConnection, examples: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, one, other in (("added", "rb", "ra"), ("removed", "ra", "rb")):
        source = f"FROM {one} x WHERE NOT EXISTS (SELECT 1 FROM {other} y WHERE y.key = x.key)"
        made[name] = con.execute(f"SELECT count(*) {source}").fetchall()[0][0]
        made[f"{name}_examples"] = [
            k for (k,) in con.execute(f"SELECT key {source} ORDER BY n LIMIT {examples}").fetchall()
        ]
    made["common"] = con.execute("SELECT count(*) FROM ra JOIN rb USING (key)").fetchall()[0][0]
    return made


def _sources(con: duckdb.DuckDBPyConnection) -> dict[str, list[int]]:
    rows = con.execute(
        "SELECT coalesce(x.source, y.source), coalesce(x.c, 0), coalesce(y.c, 0) FROM (SELECT source, count(*) AS c FROM ra GROUP BY source) x "
        "FULL JOIN (SELECT source, count(*) AS c FROM rb GROUP BY source) y USING (source) ORDER BY 1"
    ).fetchall()
    return {source: [before, after] for source, before, after in rows}


def _images(con: duckdb.DuckDBPyConnection, a: Table, b: Table, examples: int) -> dict[str, Any] | None:
    """Pictures by the sha256 of each sample's first; None when one of the tables does not hold it."""
    sha = quoted("sample.sha256")
    if not (a.with_samples and b.with_samples):
        return None
    made: dict[str, Any] = {}
    for name, one, other in (("added", "rb", "ra"), ("removed", "ra", "rb")):
        made[name] = con.execute(
            f"SELECT count(DISTINCT x.{sha}) FROM {one} x WHERE x.{sha} IS NOT NULL AND NOT EXISTS (SELECT 1 FROM {other} y WHERE y.{sha} = x.{sha})"
        ).fetchall()[0][0]
    pairs = f"FROM ra x JOIN rb y USING (key) WHERE x.{sha} IS DISTINCT FROM y.{sha}"
    made["changed"] = con.execute(f"SELECT count(*) {pairs}").fetchall()[0][0]
    made["changed_examples"] = [
        k for (k,) in con.execute(f"SELECT key {pairs} ORDER BY y.n LIMIT {examples}").fetchall()
    ]
    return made


def _values(
    con: duckdb.DuckDBPyConnection, a: Manifest, b: Manifest, table_a: Table, table_b: Table, examples: int
) -> dict[str, Any]:
    """Columns whose values differ for a sample of both; layers whose parts are the same bytes are not compared."""
    found: dict[str, Any] = {}
    for name, column in table_a.columns.items():
        if name in FIXED or name not in table_b.columns:
            continue
        if column.layer in a.layers and column.layer in b.layers:
            hashes = [[part.sha256 for part in m.layers[column.layer].parts] for m in (a, b)]
            if hashes[0] == hashes[1]:
                continue
        c = column.quoted
        pairs = f"FROM ra x JOIN rb y USING (key) WHERE x.{c} IS DISTINCT FROM y.{c}"
        number = con.execute(f"SELECT count(*) {pairs}").fetchall()[0][0]
        if not number:
            continue
        made: dict[str, Any] = {"changed": number}
        if column.kind == "number" and table_b.columns[name].kind == "number":
            low, middle, high = con.execute(
                f"SELECT min(d), median(d), max(d) FROM (SELECT y.{c} - x.{c} AS d {pairs})"
            ).fetchall()[0]
            made["difference"] = {"least": low, "median": middle, "most": high}
        rows = con.execute(f"SELECT key, x.{c}, y.{c} {pairs} ORDER BY y.n LIMIT {examples}").fetchall()
        made["examples"] = [{"key": key, "a": before, "b": after} for key, before, after in rows]
        found[name] = made
    return found


def _decisions(con: duckdb.DuckDBPyConnection, examples: int) -> dict[str, Any]:
    pairs = "FROM ra x JOIN rb y USING (key) WHERE x.state <> y.state"
    found: dict[str, Any] = {}
    kinds = f"SELECT x.state AS s, y.state AS t, x.reason_kind AS ra, y.reason_kind AS rb, count(*) AS n {pairs} GROUP BY ALL ORDER BY n DESC, 1, 2, 3, 4"
    for before, after, why_before, why_after, number in con.execute(kinds).fetchmany(1000):
        made = found.setdefault(f"{before} -> {after}", {"count": 0, "reasons": []})
        made["count"] += number
        made["reasons"].append({"a": why_before, "b": why_after, "count": number})
    for change, made in found.items():
        rows = con.execute(
            f"SELECT key, x.reason, y.reason {pairs} AND x.state = ? AND y.state = ? ORDER BY y.n LIMIT {examples}",
            change.split(" -> "),
        ).fetchall()
        made["examples"] = [{"key": key, "a": first, "b": second} for key, first, second in rows]
    return found


def as_text(made: dict[str, Any]) -> str:
    """The differences for a terminal."""
    a, b = made["a"], made["b"]
    lines = [
        f"a  {a['name']}  {a['samples']} samples  {a['digest']}",
        f"b  {b['name']}  {b['samples']} samples  {b['digest']}",
    ]
    if made["same"]:
        return "\n".join([*lines, "  nothing differs"])
    shards, samples, images = made["shards"], made["samples"], made["images"]
    lines.append(
        f"  shards   {shards['common']} common, {len(shards['added'])} added, {len(shards['removed'])} removed"
    )
    lines.append(f"  samples  {samples['common']} common, {samples['added']} added, {samples['removed']} removed")
    for name in ("added", "removed"):
        if samples[f"{name}_examples"]:
            lines.append(f"    {name} {', '.join(samples[f'{name}_examples'])}")
    if images:
        lines.append(
            f"  images   {images['added']} added, {images['removed']} removed; {images['changed']} samples show another"
        )
    lines += [
        f"  source {name}: {before} -> {after}" for name, (before, after) in made["sources"].items() if before != after
    ]
    lines += [f"  layer {name} added" for name in made["layers"]["added"]] + [
        f"  layer {name} removed" for name in made["layers"]["removed"]
    ]
    for what, changed in (("layer", made["layers"]["changed"]), ("step", made["steps"])):
        for name, changes in changed.items():
            lines += [
                f"  {what} {name}: {field} {_short(before)} -> {_short(after)}"
                for field, (before, after) in changes.items()
            ]
    for name, c in made["values"].items():
        spread = (
            f", by {c['difference']['least']:.4g} to {c['difference']['most']:.4g}"
            if c.get("difference", {}).get("least") is not None
            else ""
        )
        lines.append(f"  {name}: {c['changed']} samples have another value{spread}")
        lines += [f"    {e['key']}: {_short(e['a'])} -> {_short(e['b'])}" for e in c["examples"]]
    for change, c in made["decisions"].items():
        lines.append(f"  {change}: {c['count']} samples")
        lines += [f"    {r['count']} x {r['a']} -> {r['b']}" for r in c["reasons"][:5]]
        lines += [f"    {e['key']}: {_short(e['a'])} -> {_short(e['b'])}" for e in c["examples"]]
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 120 else text[:120] + "..."
