"""Writes the demo's site to disk once: pictures, tables and benchmarks.

The directory is named by a digest of everything that decides its content (code, sizes, seed, library versions), built
under a temporary name and renamed, so a killed generation leaves nothing that looks finished and a finished one is
found again. The tables hold absolute URLs, so they exist once a port; pictures and benchmarks do not depend on it.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from vlmflow.demo.plan import Plan, Row, Sizes
from vlmflow.digest import digest, sha256_file
from vlmflow.evaluation import prompts

_HERE = Path(__file__).parent
BENCHMARKS = ("digits", "words", "mcq", "yesno")
TABLES = {
    "seed": "tables/seed.parquet",
    "texts": "tables/seed-texts.parquet",
    "web": "tables/web.parquet",
    "base": "tables/sft-base.parquet",
    "charts": "tables/sft-charts.parquet",
    "pairs": "tables/sft-pairs.csv",
    "describe": "tables/sft-describe.parquet",
}
_COLUMNS = ("index", "question", "A", "B", "C", "D", "answer", "category", "split", "image")
_FOLDERS = {
    "none": "images", "moved": "moved", "slow": "slow", "missing": "missing", "error": "error", "html": "pages",
    "truncated": "truncated", "bomb": "bomb",
}  # fmt: skip


def build(folder: Path, sizes: Sizes | None = None, seed: int = 17) -> Path:
    """The site's directory under `folder`, generated if it is not there yet."""
    sizes = sizes or Sizes()
    libraries = {name: version(name) for name in ("numpy", "pillow", "matplotlib", "scikit-learn")}
    code = {path.name: sha256_file(path) for path in (*_HERE.glob("*.py"), Path(prompts.__file__))}
    name = digest({"code": code, "sizes": vars(sizes), "seed": seed, "libraries": libraries})[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return _made(folder / name, lambda draft: _write(draft, Plan(sizes, seed)))


def tables(site: Path, base_url: str) -> Path:
    """The directory of the tables whose URLs begin with `base_url`, written if it is not there yet."""

    def fill(draft: Path) -> None:
        for name, path in TABLES.items():
            rows = json.loads((site / "rows" / f"{name}.json").read_text())
            for row in rows:
                row["url"] = f"{base_url}/{row['url']}"
            target = draft / path
            target.parent.mkdir(parents=True, exist_ok=True)
            (_csv if path.endswith(".csv") else _parquet)(target, rows)

    return _made(site / ("at-" + base_url.split("//")[1].replace(":", "-")), fill)


def _made(final: Path, fill: Callable[[Path], None]) -> Path:
    """The directory `final`, filled under another name and renamed unless it is there: whole or absent."""
    if final.is_dir():
        return final
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        fill(draft)
        os.rename(draft, final)
    except OSError:
        if not final.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _write(site: Path, plan: Plan) -> None:
    (site / "images").mkdir()
    (site / "rows").mkdir()
    (site / "benchmarks").mkdir()
    for name in TABLES:
        source = plan.captions() if name == "seed" else getattr(plan, name)()
        rows = []
        for i, row in enumerate(source):
            sha = hashlib.sha256(row.image).hexdigest()[:20]
            (site / "images" / f"{sha}.png").write_bytes(row.image)
            fields = dict(row.fields)
            folder = _FOLDERS[fields.pop("fault", "none")]
            url = f"{folder}/{sha}.{'html' if folder == 'pages' else 'png'}"
            rows.append({"id": f"{name}-{i:05d}", "url": url, "kind": row.kind, **fields})
        (site / "rows" / f"{name}.json").write_text(json.dumps(rows))
    for name in BENCHMARKS:
        (site / "benchmarks" / f"{name}.tsv").write_text(_tsv(list(plan.benchmark(name))), encoding="utf-8")


def _tsv(rows: list[Row]) -> str:
    """A benchmark as VLMEvalKit writes it: tab separated, a header, pictures in base64; two of five rows select."""
    used = [c for c in _COLUMNS if c in ("index", "split", "image") or any(c in row.fields for row in rows)]
    out = io.StringIO()
    writer = csv.DictWriter(out, used, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for i, row in enumerate(rows):
        image = base64.b64encode(row.image).decode()
        split = "selection" if (i // 2) % 5 in (1, 3) else "report"
        writer.writerow({"index": i, "split": split, "image": image, **row.fields})
    return out.getvalue()


def _csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})


def _parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
