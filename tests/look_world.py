"""Datasets to look at: a small one with pictures, layers, failures and texts of strangers; a large one of layers alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

from curation_world import seal_layer
from PIL import Image, ImageDraw

from vlmflow import storage
from vlmflow.curation.pull_shard import _sidecar, failures_parquet
from vlmflow.dataset.manifest import LayerPart, LayerRef, Lineage, Manifest, ShardRef, save
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import describe_shard, write_shard
from vlmflow.digest import sha256_bytes, sha256_file
from vlmflow.step import Context

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
HOSTILE_URL = "javascript:alert(document.domain)"


def context(folder: Path) -> Context:
    return Context(SimpleNamespace(seed=17), str(folder / "root"), folder / "scratch")


def picture(i: int, size=(96, 64)) -> bytes:
    image = Image.new("RGB", size, (40 + i * 7 % 200, 90, 255 - i * 11 % 200))
    ImageDraw.Draw(image).text((8, 8), str(i), fill="white")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def small(folder: Path, shift: float = 0.0, hostile: bool = True) -> Manifest:
    """24 samples in 3 shards of 2 sources, with layers fused, ppl, clean and keep; 2 failed rows beside the first shard.

    Sample i has perplexity 10 + i % 8 + shift (ties), none where i % 12 == 5; kept are those up to 13.
    """
    ctx = context(folder)
    shards = []
    for number in range(3):
        samples = []
        source = "web" if number < 2 else "docs"
        for i in range(number * 8, number * 8 + 8):
            data = picture(i, (96, 64) if i % 2 else (64, 128))
            about = {
                "sha256": sha256_bytes(data),
                "width": 96 if i % 2 else 64,
                "height": 64 if i % 2 else 128,
                "format": "png",
            }
            strange = hostile and i == 3
            meta = {
                "id": f"id{i}", "url": HOSTILE_URL if strange else f"http://pictures.example/{i}.png", "source": source,
                "text": HOSTILE if strange else f"alt text {i}", "images": [about],
            }  # fmt: skip
            samples.append(Sample(f"{source}-{i:08d}", meta, (data,)))
        path = folder / "root" / "shards" / f"{source}-{'ab'[number % 2] * 24}-{number:05d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        count = write_shard(path, samples)
        failed = []
        if number == 0:
            failed = [
                {
                    "row": 100,
                    "key": "web-00000100",
                    "source": "web",
                    "url": "http://gone.example/100.png",
                    "host": "gone.example",
                    "reason": "http_404",
                    "detail": "404 Not Found",
                },
                {
                    "row": 101,
                    "key": "web-00000101",
                    "source": "web",
                    "url": HOSTILE_URL,
                    "host": "",
                    "reason": "bad_url",
                    "detail": HOSTILE,
                },
            ]
        ref = describe_shard(path, str(path), count, source)
        about = {"rows": count + len(failed), "converted": {}, "duplicates": 0, "ref": ref.model_dump(exclude={"uri"})}
        storage.write_bytes(_sidecar(str(path)), failures_parquet(failed, about))
        shards.append(ref)
    pull = Lineage(
        step="pull",
        params={"samples_per_shard": 8, "dataset": "web", "timeout": 10},
        summary={"rows": 26, "samples": 24, "failed": 2, "failed_by_reason": {"http_404": 1, "bad_url": 1}},
    )
    made = Manifest(name="web", shards=shards, lineage=[pull])
    save(made, ctx.root)
    keys = [f"{'web' if i < 16 else 'docs'}-{i:08d}" for i in range(24)]
    fused = {
        key: {"key": key, "text": HOSTILE if hostile and i == 3 else f"a fused text {i}", "engine": "rules" if i % 2 else "model"}
        if i % 12 != 5 else {"key": key, "error": f"the reply has {i} words"}
        for i, key in enumerate(keys)
    }  # fmt: skip
    made = seal_layer(
        ctx, made, "fused", params={"max": 80}, version=1, schema={"text": "str", "engine": "str"}, rows=fused
    )
    ppl = {
        key: {"key": key, "ppl": 10.0 + i % 8 + shift, "tokens": 3 + i} if i % 12 != 5
        else {"key": key, "error": f"upstream: the reply has {i} words"}
        for i, key in enumerate(keys)
    }  # fmt: skip
    made = seal_layer(
        ctx,
        made,
        "ppl",
        params={"model": f"m{shift:g}"},
        version=1,
        schema={"ppl": "float", "tokens": "int"},
        rows=ppl,
        reads=["fused"],
    )
    problems = {
        key: {"key": key, "problems": [f"aspect {i}.5 > 3"] if i % 6 == 1 else []} for i, key in enumerate(keys)
    }
    made = seal_layer(ctx, made, "clean", params={}, version=1, schema={"problems": "list<str>"}, rows=problems)
    keep = {}
    for i, key in enumerate(keys):
        value = ppl[key].get("ppl")
        kept = value is not None and value <= 13
        reason = (
            "not scored"
            if value is None
            else f"perplexity {value:g} is {'in' if kept else 'beyond'} the lowest 50 % (to 13)"
        )
        keep[key] = {"key": key, "keep": kept, "reason": reason, "rank": i}
    return seal_layer(ctx, made, "keep", params={"threshold": 13 + shift}, version=1, schema={"keep": "bool", "reason": "str", "rank": "int"},
                      rows=keep, reads=["ppl"], summary={"kept": 12})  # fmt: skip


def large(folder: Path, rows: int, per_shard: int = 10_000, seed: int = 0) -> Manifest:
    """Layers ppl, fused and keep of so many samples as Parquet parts; the shards themselves do not exist."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    shards, parts = [], {"fused": [], "ppl": [], "keep": []}
    for number, start in enumerate(range(0, rows, per_shard)):
        count = min(per_shard, rows - start)
        keys = [f"web-{i:08d}" for i in range(start, start + count)]
        ppl = np.exp(random.normal(3, 1, count)).round(3)
        cut = 10.0
        none = pa.nulls(count, pa.string())
        tables = {
            "fused": {
                "text": [f"a photograph of thing {v:.0f} beside item {i}, taken on a day" for i, v in enumerate(ppl)],
                "engine": ["rules", "model"] * (count // 2) + ["rules"] * (count % 2),
                "error": none,
            },
            "ppl": {"ppl": ppl, "nll": ppl * 3, "tokens": random.integers(5, 60, count), "error": none},
            "keep": {
                "keep": ppl <= cut,
                "reason": [
                    f"perplexity {v:g} is {'in' if v <= cut else 'beyond'} the lowest 20 % (to 10)" for v in ppl
                ],
                "rank": np.arange(count),
                "error": none,
            },
        }
        sha = sha256_bytes(f"{seed}-{number}".encode())
        source = ("web", "docs", "books")[number % 3]
        shards.append(
            ShardRef(
                uri=f"s3://nowhere/shards/{source}-{number:05d}.tar",
                sha256=sha,
                bytes=10**10,
                samples=count,
                source=source,
            )
        )
        for name, columns in tables.items():
            path = folder / f"{name}-{number:05d}.parquet"
            schema = {"vlmflow.kinds": "{}"}
            pq.write_table(pa.table({"key": keys, **columns}).replace_schema_metadata(schema), path, compression="zstd")
            parts[name].append(LayerPart(uri=str(path), sha256=sha256_file(path), rows=count))
    layers = {
        name: LayerRef(step=name, digest=sha256_bytes(f"{name}{seed}".encode()), params={"seed": seed}, parts=made)
        for name, made in parts.items()
    }
    return Manifest(name="large", shards=shards, layers=layers)


def write(manifest: Manifest, path: Path) -> str:
    path.write_text(json.dumps(manifest.model_dump(mode="json")))
    return str(path)
