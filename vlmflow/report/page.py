"""Reads what the sections show, and bounds it: a report of a billion samples must stay a page.

Samples come from whole shards, evenly spaced over the dataset, until `SAMPLE_LIMIT` is reached; the page says how many
of how many it looked at. Pictures are embedded as small thumbnails.
"""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vlmflow import storage
from vlmflow.dataset.layer import read_part
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import VlmflowError
from vlmflow.registry.rows import SOUP, UNTRAINED, soup_row
from vlmflow.report.html import Safe, el
from vlmflow.report.inputs import ReportInputs, Timing

if TYPE_CHECKING:
    from vlmflow.step import Context

SAMPLE_LIMIT = 20_000
THUMB = 300  # longest side in pixels of an embedded picture, shown at half of that
CURATED = ("ocr", "synthetic", "fused", "ppl", "keep")
MODEL_P = "bootstrap"


@dataclass
class Row:
    """One sample as the sections see it: its metadata and its row of every layer."""

    key: str
    shard: int
    meta: dict[str, Any]
    layers: dict[str, dict[str, Any]]

    @property
    def planted(self) -> bool | None:
        """Whether the table marked it as a planted rare fact; None where the table has no such column."""
        value = (self.meta.get("extra") or {}).get("planted")
        return None if value is None else str(value).lower() in ("true", "1")

    def get(self, layer: str, column: str) -> Any:
        return self.layers.get(layer, {}).get(column)


@dataclass
class Page:
    """Everything the sections read."""

    ctx: Context
    inputs: ReportInputs
    _readers: dict[str, ShardReader] = field(default_factory=dict)

    # datasets -----------------------------------------------------------------------------------------------------

    @property
    def curated(self) -> Manifest | None:
        """The dataset that went through curation."""
        wanted = getattr(getattr(self.ctx.recipe, "curation", None), "dataset", None)
        return self.inputs.datasets.get(wanted or "web")

    def reader(self, manifest: Manifest, shard: int) -> ShardReader:
        ref = manifest.shards[shard]
        if ref.uri not in self._readers:
            self._readers[ref.uri] = ShardReader(ref, self.ctx.scratch)
        return self._readers[ref.uri]

    def chosen_shards(self, manifest: Manifest) -> list[int]:
        """Evenly spaced shards that hold at most about SAMPLE_LIMIT samples."""
        if manifest.samples <= SAMPLE_LIMIT or not manifest.shards:
            return list(range(len(manifest.shards)))
        n = max(1, int(len(manifest.shards) * SAMPLE_LIMIT / manifest.samples))
        return sorted({round(k * (len(manifest.shards) - 1) / max(n - 1, 1)) for k in range(n)})

    @cached_property
    def rows(self) -> list[Row]:
        """Samples of the curated dataset with all their layers, in dataset order."""
        manifest = self.curated
        if manifest is None:
            return []
        names = [name for name in CURATED if name in manifest.layers]
        found = []
        for shard in self.chosen_shards(manifest):
            reader = self.reader(manifest, shard)
            layers = {name: read_part(manifest.layers[name].parts[shard], self.ctx.scratch) for name in names}
            for key in reader.keys():
                cells = {name: rows[key] for name, rows in layers.items() if key in rows}
                found.append(Row(key, shard, reader.meta(key), cells))
        return found

    def first_samples(self, manifest: Manifest, n: int) -> list[Sample]:
        """`n` samples, the same number from each source."""
        found = []
        share = max(1, math.ceil(n / max(1, len(manifest.sources))))
        for source in manifest.sources:
            shard = next(i for i, ref in enumerate(manifest.shards) if ref.source == source)
            reader = self.reader(manifest, shard)
            keys = list(reader.keys())
            found += [reader.read(key) for key in keys[:: max(1, len(keys) // share)][:share]]
        return found[:n]

    def picture(self, row: Row) -> Safe:
        manifest = self.curated
        assert manifest is not None
        images = self.reader(manifest, row.shard).read(row.key).images
        return thumbnail(images[0], row.key) if images else el("span", "no image", cls="small")

    # results ------------------------------------------------------------------------------------------------------

    @property
    def soup_entries(self) -> dict[str, dict[str, Any]]:
        """Candidates and soups with their selection scores, as the soup step found them."""
        soup = self.inputs.soup or {}
        both = {**(soup.get("candidates") or {}), **(soup.get("soups") or {})}
        return {name: entry for name, entry in both.items() if isinstance(entry, dict)}

    @property
    def chosen(self) -> str | None:
        """Name of the row of `scores` that the run chose."""
        name = (self.inputs.soup or {}).get("chosen")
        if name is None:
            return None
        return next((row for row in (soup_row(name), name) if row in self.inputs.scores), name)

    def order(self) -> list[str]:
        """Rows of the score table: untrained, model P, the candidates, the soups, then whatever else was scored."""
        candidates = [*((self.inputs.soup or {}).get("candidates") or {})]
        soups = [name for name in self.inputs.scores if name.startswith(SOUP)]
        wanted = [UNTRAINED, MODEL_P, *candidates, *[n for n in self.inputs.scores if n not in soups], *soups]
        return list(dict.fromkeys(wanted))

    def name(self, model: str) -> str:
        """What a person calls a row."""
        known = {
            UNTRAINED: "untrained",
            MODEL_P: "model P (bootstrap)",
            "ocr": "stage 1 (ocr)",
            "align": "stage 2 (align)",
        }
        if model in known:
            return known[model]
        if model.startswith(SOUP):
            return f"{model.removeprefix(SOUP)} soup"
        return f"candidate {model}" if model in ((self.inputs.soup or {}).get("candidates") or {}) else model

    @property
    def benchmarks(self) -> list[str]:
        """Benchmarks that were scored, in the order of the recipe."""
        scored = dict.fromkeys(b for score in self.inputs.scores.values() for b in score.get("benchmarks", {}))
        named = [b for b in self.ctx.recipe.evaluation.benchmarks if b in scored]
        return [*named, *(b for b in scored if b not in named)]

    def score(self, model: str | None, benchmark: str) -> dict[str, Any] | None:
        return (self.inputs.scores.get(model or "") or {}).get("benchmarks", {}).get(benchmark)

    @cached_property
    def timings(self) -> list[Timing]:
        """Handed-in timings, else the records that the steps of this run left in the store."""
        if self.inputs.timings is not None:
            return self.inputs.timings
        prefix = storage.join(self.ctx.root, "runs", self.ctx.run_id, "steps")
        found = [Timing.model_validate(storage.read_json(info.uri)) for info in storage.list_uris(prefix)]
        return sorted(found, key=lambda timing: timing.started or 0.0)

    def training_log(self, model: str) -> list[dict[str, Any]]:
        """Records of a model's training log; lines that are not JSON objects are left out."""
        ref = self.inputs.models.get(model)
        if ref is None or not ref.lineage.log_uri:
            return []
        records = []
        for line in storage.read_bytes(ref.lineage.log_uri).decode(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def training_table(self, model: str) -> Any:
        """The frozen/trainable table that training left beside its log, or None."""
        ref = self.inputs.models.get(model)
        if ref is None or not ref.lineage.log_uri:
            return None
        uri = storage.join(ref.lineage.log_uri.rsplit("/", 1)[0], "trainable.json")
        return storage.read_json(uri) if storage.exists(uri) else None


READ_ERRORS = (VlmflowError, OSError, LookupError, ValueError, TypeError, AttributeError, ImportError)
"""What a missing, cut or unexpected part raises; a section that meets one is replaced by the reason."""


def thumbnail(data: bytes, name: str) -> Safe:
    """A picture as an `img` with a data URI: as it is when small, else reduced. What does not decode is said so."""
    from PIL import Image

    from vlmflow.vision.rgb import to_rgb

    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        small = max(image.size) <= THUMB and len(data) <= 24_000 and image.format in ("PNG", "JPEG", "WEBP")
        kind = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}.get(image.format or "", "")
        width, height = image.size
        if small:
            image.load()
        else:
            image = to_rgb(image)
            width, height = image.size  # as displayed
            image.thumbnail((THUMB, THUMB))
            out = io.BytesIO()
            image.save(out, format="JPEG", quality=82)
            data, kind = out.getvalue(), "image/jpeg"
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return el("span", f"picture cannot be shown: {error}", cls="small")
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return el(
        "img",
        src=source,
        alt=f"{name}, {width}x{height}",
        title=f"{name}, {width}x{height} px",
        cls="thumb",
        loading="lazy",
    )
