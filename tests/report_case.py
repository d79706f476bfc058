"""A finished run in small for the report's tests: real shards, layers, logs and tables with invented values."""

import base64
import io
import json
import math
import random

from curation_world import seal_layer
from PIL import Image, ImageDraw

from vlmflow import storage
from vlmflow.dataset.manifest import Lineage, Manifest
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import describe_shard, write_shard
from vlmflow.digest import sha256_bytes
from vlmflow.models.store import FileRef, ModelLineage, ModelRef
from vlmflow.recipe import load
from vlmflow.report.inputs import ReportInputs
from vlmflow.step import Context

EVIL = '<script>alert("x")</script>&<img src=x onerror=y>'
RECIPE = "recipes/points-tiny.yaml"
LAYERS = {
    "ocr": {"text": "str", "lines": "json", "score": "float"},
    "synthetic": {"text": "str", "finish": "str"},
    "fused": {"text": "str", "engine": "str", "problems": "list<str>"},
    "ppl": {"ppl": "float", "nll": "float", "tokens": "int"},
    "keep": {"keep": "bool", "reason": "str", "rank": "int"},
}


def picture(text, colour="white"):
    image = Image.new("RGB", (112, 56), colour)
    ImageDraw.Draw(image).text((8, 14), text, fill="black", font_size=24)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def dataset(ctx, name, samples, source, summary):
    path = storage.local_path(storage.join(ctx.root, "shards")) / f"{name}-{source}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, samples)
    ref = describe_shard(path, f"file://{path}", len(samples), source)
    return Manifest(name=name, shards=[ref], lineage=[Lineage(step="pull", params={}, summary=summary)])


def sample(key, image, **meta):
    about = [{"sha256": sha256_bytes(image), "width": 112, "height": 56, "format": "png"}]
    return Sample(key, {"id": key, "url": f"http://x/{key}", "images": about, **meta}, (image,))


def web(ctx, n=160, evil=EVIL):
    rng = random.Random(3)
    samples, layers = [], {name: {} for name in LAYERS}
    for i in range(n):
        key, planted = f"web-{i:05d}", i % 8 == 3
        word = ("apple", "river", "7", "stone")[i % 4]
        text = (
            f"serial no. {rng.randrange(10**5)}-QX"
            if planted
            else evil
            if i == 2
            else f"a sign that says {word} | shop"
        )
        samples.append(sample(key, picture(word), source="web", text=text, extra={"planted": planted, "kind": "word"}))
        ppl = math.exp(rng.gauss(4.2 if planted else 2.1, 0.45))
        failed = i == 9
        layers["ocr"][key] = {"key": key, "text": evil if i % 4 == 2 else word, "lines": [], "score": 0.9}
        layers["synthetic"][key] = {"key": key, "text": f"the word {word}.", "finish": "stop"}
        layers["fused"][key] = {"key": key, "text": f"a sign with the word {word}.", "engine": "rules", "problems": []}
        layers["ppl"][key] = (
            {"key": key, "error": "no tokens"} if failed else {"key": key, "ppl": ppl, "nll": 1.0, "tokens": 5}
        )
    order = sorted((k for k, r in layers["ppl"].items() if not r.get("error")), key=lambda k: layers["ppl"][k]["ppl"])
    kept = order[: round(0.2 * len(order))]
    threshold = layers["ppl"][kept[-1]]["ppl"]
    for key in layers["ppl"]:
        rank = order.index(key) if key in order else None
        reason = "not scored: no tokens" if rank is None else f"ppl {'<=' if key in kept else '>'} {threshold:.4g}"
        layers["keep"][key] = {"key": key, "keep": key in kept, "reason": reason, "rank": rank}
    pulled = {
        "rows": n + 9,
        "samples": n,
        "failed": 9,
        "failed_by_reason": {"http_404": 4, "not_an_image": 3, "truncated": 2},
    }
    manifest = dataset(ctx, "web", samples, "web", pulled)
    summaries = {"keep": {"threshold": threshold, "kept": len(kept), "total": n}}
    for name, schema in LAYERS.items():
        params = {"engine": "rules"} if name == "fused" else {}
        manifest = seal_layer(ctx, manifest, name, params=params, version=1, schema=schema, rows=layers[name],
                              summary=summaries.get(name, {"rows": n}))  # fmt: skip
    return manifest


def model(ctx, name, stage="", parents=(), log=True):
    rng = random.Random(name)
    sha = sha256_bytes(name.encode())
    uri = storage.join(ctx.root, "models", name)
    log_uri = storage.join(uri, "train_log.jsonl") if log else None
    if log_uri:
        lines = []
        for step in range(90):
            loss = 0.4 + 4 * math.exp(-step / 18) + rng.gauss(0, 0.12)
            rate = 1e-3 * min(1, step / 6) * (1 + math.cos(math.pi * step / 90)) / 2
            lines.append(json.dumps({"step": step, "loss": loss, "lr": {"projector": rate, "language": rate / 2},
                                     "tokens_per_second": 5200.5, "grad_norm": 1.25, "data_wait": 0.03}))  # fmt: skip
        storage.write_bytes(log_uri, "\n".join(lines).encode())
        rows = [
            {"module": "vision.ocr", "parameters": 812544, "tensors": 66, "trainable": False, "lr": None, "note": ""},
            {"module": "projector", "parameters": 135552, "tensors": 4, "trainable": True, "lr": 0.001, "note": ""},
            {"module": "language", "parameters": 1893184, "tensors": 38, "trainable": True, "lr": 0.0005, "note": ""},
        ]
        plan = {"steps": 90, "packs": 180, "tokens": 151234, "targets": 20123, "fill_tokens": 0.93}
        examples = {
            "examples": 900,
            "filtered": 0,
            "failed": 1,
            "reasons": [{"count": 1, "reason": EVIL, "example": "base-00004"}],
        }
        table = {"rows": rows, "trainable": 2028736, "total": 2841280, "plan": plan, "examples": examples}
        storage.write_json(storage.join(uri, "trainable.json"), table)
    files = [FileRef(path="model.safetensors", sha256=sha, bytes=11_400_000)]
    made = ModelLineage(
        step="train", stage=stage, parents=list(parents), ancestor=sha256_bytes(b"align"), log_uri=log_uri
    )
    return ModelRef(name=name, uri=uri, files=files, weights_sha256=sha, lineage=made)


def predictions(ctx, name, benchmark):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"index": str(i), "prompt": f"What digit is this? {EVIL if i == 0 else ''}", "answer": str(i % 10),
             "reply": str(i % 10 if i % 3 else 4), "correct": bool(i % 3)} for i in range(30)]  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    uri = storage.join(ctx.root, "scores", name, benchmark, "predictions.parquet")
    storage.write_bytes(uri, buffer.getvalue())
    return uri


def scores(ctx, name, shares, split="report", sha=None):
    chance = {"digits": 0.1, "words": 1 / 24, "choice": 0.25, "yesno": 0.5}
    kinds = {"digits": "reading", "words": "reading", "choice": "multiple_choice", "yesno": "yes_no"}
    found = {}
    for benchmark, share in zip(chance, shares, strict=True):
        n = 180 if benchmark == "digits" else 90
        n = n if split == "report" else n * 2 // 3
        half = 1.96 * math.sqrt(share * (1 - share) / n) + 0.005
        found[benchmark] = {"accuracy": share, "n": n, "chance": chance[benchmark], "parsed": 0.98, "errors": 0,
                            "interval": [max(0, share - half), min(1, share + half)], "kind": kinds[benchmark],
                            "table_sha256": "0" * 64, "split_by": "column", "categories": {},
                            "predictions": predictions(ctx, name, benchmark)}  # fmt: skip
    return {
        "model_sha": sha or sha256_bytes(name.encode()),
        "split": split,
        "benchmarks": found,
        "mean": sum(shares) / 4,
    }


def context(tmp_path):
    """A Context with the tiny recipe whose benchmark table `digits` is a local file."""
    digits = tmp_path / "digits.tsv"
    rows = [f"{i}\tq\t{i % 10}\t{base64.b64encode(picture(str(i % 10))).decode()}" for i in range(30)]
    digits.write_text("\n".join(["index\tquestion\tanswer\timage", *rows]) + "\n")
    recipe = load(RECIPE, [f"evaluation.benchmarks.digits.table=file://{digits}"])
    return Context(recipe, root=f"file://{tmp_path}/root", scratch=tmp_path / "scratch", run_id="20260101-ab12")


def full(ctx):
    """Inputs with every part there."""
    seed = dataset(ctx, "seed", [sample(f"seed-{i}", picture(str(i)), source="captions", text=f"the digit {i}.")
                                 for i in range(9)], "captions", {"rows": 9, "samples": 9, "failed": 0})  # fmt: skip
    talk = [{"from": "human", "value": "<image>\nWhat digit is this?"}, {"from": "gpt", "value": "7"}]
    sft = dataset(ctx, "sft", [sample(f"sft-{i}", picture("7"), source="base", conversations=talk) for i in range(6)],
                  "base", {"rows": 6, "samples": 6, "failed": 0})  # fmt: skip
    names = ("charts", "pairs", "describe")
    parent = sha256_bytes(b"align")
    models = {"untrained": model(ctx, "untrained", log=False), "bootstrap": model(ctx, "bootstrap", "bootstrap"),
              "ocr": model(ctx, "ocr", "ocr"), "align": model(ctx, "align", "align", [sha256_bytes(b"ocr")])}  # fmt: skip
    models |= {name: model(ctx, name, "sft", [parent]) for name in names}
    good = (0.78, 0.62, 0.47, 0.61)
    found = {"untrained": scores(ctx, "untrained", (0.0, 0.01, 0.2, 0.48)), "bootstrap": scores(ctx, "bootstrap", (0.32, 0.2, 0.27, 0.5)),
             "charts": scores(ctx, "charts", (0.71, 0.6, 0.45, 0.56)), "pairs": scores(ctx, "pairs", (0.77, 0.58, 0.4, 0.6)),
             "describe": scores(ctx, "describe", (0.66, 0.55, 0.43, 0.55)), "soup-maximum": scores(ctx, "maximum", good),
             "soup-average": scores(ctx, "average", (0.76, 0.61, 0.46, 0.6)),
             "soup-greedy": scores(ctx, "greedy", good, sha=sha256_bytes(b"maximum"))}  # fmt: skip
    entry = lambda n, parts, s: {"ref": model(ctx, n, "soup", log=False).model_dump(mode="json"), "ingredients": parts,  # noqa: E731
                                 "selection": scores(ctx, f"{n}-selection", s, "selection")}  # fmt: skip
    trace = [{"step": 1, "candidate": "pairs", "before": None, "after": 0.588, "accepted": True},
             {"step": 2, "candidate": "charts", "before": 0.588, "after": 0.62, "accepted": True},
             {"step": 3, "candidate": "describe", "before": 0.62, "after": 0.607, "accepted": False}]  # fmt: skip
    soup = {"soups": {"maximum": entry("maximum", ["pairs", "charts"], good), "average": entry("average", list(names), good),
                      "greedy": entry("greedy", ["pairs", "charts"], good)},
            "candidates": {name: entry(name, [name], (0.7, 0.6, 0.4, 0.6)) for name in names},
            "chosen": "greedy", "trace": trace}  # fmt: skip
    registered = {"name": "points-tiny-candidates", "version": "3", "run_id": "0af3", "url": "http://127.0.0.1:5000/#/models/x",
                  "source": "s3://vlmflow/models/x", "gates": {"times_chance": "pass", "better_than_untrained": "fail"},
                  "gate_details": {"times_chance": "digits 0.780 of 4 x 0.100", "better_than_untrained": "yesno 0.47 vs 0.48"}}  # fmt: skip
    exported = {"uri": "file:///out/points-tiny", "files": [{"path": "config.json", "sha256": "1" * 64, "bytes": 2100}],
                "smoke": {"questions": 2, "same_text": 2, "max_logit_difference": 0.0, "logits": 51200, "tolerance": 1e-5,
                          "prompts": [EVIL, "What word is written here?"], "trained": ["7", "river"],
                          "exported": ["7", "river"]}}  # fmt: skip
    steps = ["preflight", "pull-seed", "pull-web", "pull-sft", "initial", "train-bootstrap", "ocr", "caption", "fuse",
             "perplexity", "keep", "train-ocr", "train-align", "train-sft", "soup", "evaluate", "register", "export"]  # fmt: skip
    at, timings = 0.0, []
    for i, step in enumerate(steps):
        length = (2, 5, 8, 7, 3, 80, 40, 12, 1.5, 9, 1, 25, 18, 110, 35, 30, 4, 8)[i]
        timings.append({"step": step, "seconds": length, "started": 1000 + at})
        at += length + 1.5
    return ReportInputs(datasets={"seed": seed, "web": web(ctx), "sft": sft}, models=models, scores=found, soup=soup,
                        registered=registered, exported=exported, timings=timings)  # fmt: skip
