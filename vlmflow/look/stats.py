"""Distributions of every column of a dataset, counted by DuckDB over the wide table.

Numbers get moments, quantiles and a histogram; texts lengths, scripts and repetitions; short texts, flags and lists counts;
all of it again by source where that says something. Quantiles are exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmflow.look import answers, query
from vlmflow.look.build import FIXED
from vlmflow.look.sql import kind_sql, quoted
from vlmflow.look.summary import sources
from vlmflow.look.table import Column, Table
from vlmflow.report.numbers import short

if TYPE_CHECKING:
    import duckdb

    from vlmflow.dataset.manifest import Manifest

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
COMMONEST = 20
SCRIPTS = (
    "Latin",
    "Han",
    "Hiragana",
    "Katakana",
    "Hangul",
    "Cyrillic",
    "Arabic",
    "Devanagari",
    "Greek",
    "Hebrew",
    "Thai",
)
IDENTITY = ("sample.id", "sample.sha256", "sample.url", "keep.reason", "keep.rank")  # no distribution says anything


def stats(manifest: Manifest, table: Table) -> dict[str, Any]:
    """Everything that is counted.

    Returns:
        `name`, `digest`, `samples`; `state` and `reasons` counts; `sources` (shards, samples, bytes, kept, share);
        `columns` by name with `kind` and, by kind, the numbers of `number`, `text`, `values` or `items`; `duplicates`;
        `with_samples`: whether the samples' own JSON was counted.
    """
    with table.open() as con:
        columns = {c.name: _column(con, table, c) for c in table.columns.values() if c.name not in FIXED}
        return {
            "name": manifest.name,
            "digest": manifest.digest,
            "samples": table.rows,
            "with_samples": table.with_samples,
            "state": _counts(con, "state"),
            "reasons": _counts(con, "reason_kind"),
            "failed": _counts(con, "f", "(SELECT unnest(errors) AS f FROM rows)"),
            "not_pulled": {"reasons": _counts(con, "reason", "failures"), "hosts": _counts(con, "host", "failures")},
            "sources": _sources(con, manifest),
            "columns": {name: made for name, made in columns.items() if made["filled"]},
            "duplicates": _duplicates(con, manifest, table),
        }


def _column(con: duckdb.DuckDBPyConnection, table: Table, column: Column) -> dict[str, Any]:
    filled = con.execute(f"SELECT count({column.quoted}) FROM rows").fetchall()[0][0]
    made: dict[str, Any] = {"kind": column.kind, "filled": filled, "missing": table.rows - filled}
    if not filled:
        return made
    if column.name in IDENTITY:
        return made
    if column.kind == "number":
        return made | number(con, table, column)
    if column.name.endswith(".error"):
        return made | {"values": _counts(con, kind_sql(column.quoted))}
    if column.kind in ("category", "flag"):
        return made | {"values": _counts(con, f"{column.quoted}::VARCHAR"), "by_source": _by_source(con, column)}
    if column.kind == "list":
        items = f"(SELECT unnest(list_transform({column.quoted}, lambda x: {kind_sql('x')})) AS f FROM rows)"
        lengths = con.execute(f"SELECT avg(len({column.quoted})), max(len({column.quoted})) FROM rows").fetchall()[0]
        return made | {"items": _counts(con, "f", items), "mean_items": lengths[0], "most_items": lengths[1]}
    return made | text(con, column)


def number(con: duckdb.DuckDBPyConnection, table: Table, column: Column) -> dict[str, Any]:
    """Mean, standard deviation, extremes, quantiles, histogram; mean and median by source. Infinite values and NaN count as
    missing."""
    value = f"CASE WHEN isfinite({column.quoted}::DOUBLE) THEN {column.quoted}::DOUBLE END"
    select = f"avg(v), stddev_pop(v), min(v), max(v), quantile_cont(v, {list(QUANTILES)})"
    mean, deviation, low, high, quantiles = con.execute(
        f"SELECT {select} FROM (SELECT {value} AS v FROM rows)"
    ).fetchall()[0]
    if mean is None:
        return {}
    by = con.execute(
        f"SELECT source, count(v), avg(v), median(v) FROM (SELECT source, {value} AS v FROM rows) GROUP BY source ORDER BY source"
    ).fetchall()
    return {
        "mean": mean, "deviation": deviation, "min": low, "max": high,
        "quantiles": {f"{q:g}": v for q, v in zip(QUANTILES, quantiles, strict=True)},
        "histogram": answers.histogram(con, table, query.Query(), column.name),
        "by_source": {source: {"count": n, "mean": m, "median": half} for source, n, m, half in by},
    }  # fmt: skip


def text(con: duckdb.DuckDBPyConnection, column: Column) -> dict[str, Any]:
    """Characters and words (white space between them), scripts that occur, and how many texts repeat another."""
    c = column.quoted
    scripts = ", ".join(f"count(*) FILTER (regexp_matches({c}, '\\p{{{script}}}'))" for script in SCRIPTS)
    row = con.execute(
        f"SELECT avg(length({c})), max(length({c})), quantile_cont(length({c}), {list(QUANTILES)}), "
        f"avg(len(regexp_split_to_array(trim({c}), '\\s+'))), count(nullif(trim({c}), '')) - count(DISTINCT CASE WHEN trim({c}) <> '' THEN hash(lower(trim({c}))) END), "
        f"count(*) FILTER (trim({c}) = ''), {scripts} FROM rows"
    ).fetchall()[0]
    by = con.execute(
        f"SELECT source, count({c}), avg(length({c})) FROM rows GROUP BY source ORDER BY source"
    ).fetchall()
    return {
        "characters": {
            "mean": row[0],
            "max": row[1],
            "quantiles": {f"{q:g}": v for q, v in zip(QUANTILES, row[2], strict=True)},
        },
        "words": {"mean": row[3]},
        "repeated": row[4],
        "empty": row[5],
        "scripts": {script: n for script, n in zip(SCRIPTS, row[6:], strict=True) if n},
        "by_source": {source: {"count": n, "mean": mean} for source, n, mean in by},
    }


def _counts(con: duckdb.DuckDBPyConnection, expression: str, source: str = "rows") -> dict[str, int]:
    """The commonest values; the last entry, named "", sums up all others."""
    rows = con.execute(
        f"SELECT {expression} AS v, count(*) AS n FROM {source} WHERE v IS NOT NULL GROUP BY v ORDER BY n DESC, v"
    ).fetchmany(100_000)
    found = dict(rows[:COMMONEST])
    if rest := sum(n for _, n in rows[COMMONEST:]):
        found[""] = found.get("", 0) + rest
    return found


def _by_source(con: duckdb.DuckDBPyConnection, column: Column) -> dict[str, dict[str, int]]:
    rows = con.execute(
        f"SELECT source, {column.quoted}::VARCHAR AS v, count(*) AS n FROM rows WHERE v IS NOT NULL GROUP BY ALL ORDER BY source, n DESC, v"
    ).fetchall()
    found: dict[str, dict[str, int]] = {}
    for source, value, n in rows:
        if len(found.setdefault(source, {})) < COMMONEST:
            found[source][value] = n
    return found


def _sources(con: duckdb.DuckDBPyConnection, manifest: Manifest) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = dict(sources(manifest))
    rows = con.execute(
        "SELECT source, count(*) FILTER (state = 'kept'), count(*) FILTER (len(errors) > 0), count(*) FROM rows GROUP BY source ORDER BY source"
    ).fetchall()
    for source, kept, failed, total in rows:
        found[source]["failed"] = failed
        if "keep" in manifest.layers:
            found[source] |= {"kept": kept, "share": kept / total}
    return dict(sorted(found.items()))


def _duplicates(con: duckdb.DuckDBPyConnection, manifest: Manifest, table: Table) -> dict[str, int]:
    found = {}
    for entry in manifest.lineage:
        if entry.step == "pull" and "duplicate_rows" in entry.summary:
            found["rows of the tables"] = entry.summary["duplicate_rows"]
    if "sample.sha256" in table.columns:
        column = quoted("sample.sha256")
        found["first images with identical bytes"] = con.execute(
            f"SELECT count({column}) - count(DISTINCT {column}) FROM rows"
        ).fetchall()[0][0]
    if "dedup.of" in table.columns:
        found["found by layer dedup"] = con.execute(f"SELECT count({quoted('dedup.of')}) FROM rows").fetchall()[0][0]
    return found


def as_text(made: dict[str, Any]) -> str:
    """The counts for a terminal: one line a column."""
    lines = [f"{made['name']}  {made['samples']} samples  {made['digest'][:12]}"]
    for name, s in made["sources"].items():
        kept = f" {s['kept']:>9} kept ({s['share']:.1%})" if "kept" in s else ""
        lines.append(
            f"  source {name:<24}{s['samples']:>9} samples{kept}  {s['bytes'] / 2**20:.1f} MiB, {s['failed']} with a failure"
        )
    lines += [
        f"  {'reason' if state is made['reasons'] else 'failed'} {n:>9} x {value or 'others'}"
        for state in (made["reasons"], made["failed"])
        for value, n in state.items()
    ]
    lines += [f"  no sample {n:>6} x {reason}" for reason, n in made["not_pulled"]["reasons"].items()]
    lines += [f"  duplicate {what}: {n}" for what, n in made["duplicates"].items()]
    for name, c in made["columns"].items():
        lines.append(f"  {name:<26}{_line(c)}")
    if not made["with_samples"]:
        lines.append("  alt texts, URLs and image sizes were not read (--samples does)")
    return "\n".join(lines)


def _line(c: dict[str, Any]) -> str:
    missing = f"  ({c['missing']} without)" if c["missing"] else ""
    if "quantiles" in c:
        q = c["quantiles"]
        return f"mean {short(c['mean'])}, 5 % {short(q['0.05'])}, median {short(q['0.5'])}, 95 % {short(q['0.95'])}, {short(c['min'])} to {short(c['max'])}{missing}"
    if "characters" in c:
        q = c["characters"]["quantiles"]
        scripts = ", ".join(f"{script} {n}" for script, n in c["scripts"].items())
        return f"{c['filled']} texts, {c['characters']['mean']:.1f} characters (median {short(q['0.5'])}, longest {c['characters']['max']}), {c['words']['mean']:.1f} words, {c['repeated']} repeat another; {scripts}{missing}"
    values = c.get("values") or c.get("items")
    if values is None:
        return f"{c['filled']} filled{missing}"
    shown = ", ".join(f"{' '.join(str(v).split())[:60] or 'others'} {n}" for v, n in list(values.items())[:6])
    return (shown or "nothing") + missing
