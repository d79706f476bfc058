"""Part `ocr`: the ocr step's reader against a plain RapidOCR loop at each of its best settings, on pages of mixed size.

Every contender runs in processes of its own on two cores, A B C .. C B A, its best pass counts. First the gate: our text
must be that of RapidOCR with the same settings of detection but for single characters (lines that are not identical are
counted), with a character error rate that is not higher. The same rules of reading order, confidence and length turn
everyone's boxes into a text.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CORES = 2
LINES_EQUAL = 0.98  # share of lines that must be identical, to the letter
ALLOWED = 0.0002  # of character error rate that ours may be above RapidOCR's: two characters in ten thousand

OURS, DEFAULTS, BEST, TUNED = "ours", "defaults", "best", "tuned"
BEST_SETTINGS = {"Global.use_cls": False, "Det.limit_type": "max", "Det.limit_side_len": 960}
THREADS = {
    "EngineConfig.onnxruntime.intra_op_num_threads": CORES,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
}
PLAIN: dict[str, dict[str, Any]] = {
    DEFAULTS: {},
    BEST: {**BEST_SETTINGS, **THREADS},
    TUNED: {
        **BEST_SETTINGS,
        **THREADS,
        "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,
        "Rec.rec_batch_num": 1,
    },
}
TITLES = {
    OURS: f"ours: {CORES} processes of one thread",
    DEFAULTS: "RapidOCR() in a loop, all cores",
    BEST: f"RapidOCR, no classifier, at most 960 px, {CORES} threads",
    TUNED: "the same, memory kept and lines one by one, as ours",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="32 pages each; default 2, with --quick 1")
    parser.add_argument("--passes", type=int, help="passes of each contender; default 2, with --quick 1")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the pages, check that texts are equal, time everyone, print the table."""
    from curation_parts.ocr_pages import KINDS, fonts, pages

    if arguments.child:
        child(arguments.child, arguments.folder)
        sys.exit(0)
    rounds = arguments.rounds or (1 if arguments.quick else 2)
    passes = arguments.passes or (1 if arguments.quick else 2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = pages(rounds)
        truth = [{"kind": page.kind, "text": page.text} for page in made]
        (folder / "truth.json").write_text(json.dumps(truth))
        _write_shard(folder, made)
        names = [OURS, DEFAULTS, BEST, TUNED]
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(passes):
            for name in names if number % 2 == 0 else reversed(names):
                results[name].append(_measure(name, folder, arguments.quick))
                print(f"  {TITLES[name]}: {results[name][-1]['wall']:.1f} s", flush=True)
    best = {name: min(results[name], key=lambda result: result["wall"]) for name in names}
    gate = _gate(best[OURS], best[BEST], [page["text"] for page in truth])
    report = {
        "pages": {kind.name: sum(page.kind == kind.name for page in made) for kind in KINDS},
        "fonts": [Path(font).name if font else "Pillow's" for font in fonts()],
        "gate": gate,
        "versions": {name: importlib.metadata.version(name) for name in ("rapidocr", "onnxruntime", "numpy")},
        "contenders": {
            name: {
                "title": TITLES[name],
                "wall_s": round(best[name]["wall"], 2),
                "cpu_s": round(best[name]["cpu"], 2),
                "pages_per_s": round(len(made) / best[name]["wall"], 3),
                "peak_mib": best[name]["peak_mib"],
                "cer": round(_cer(best[name], truth), 5),
                "ratio_wall": round(best[name]["wall"] / best[OURS]["wall"], 2),
                "ratio_cpu": round(best[name]["cpu"] / best[OURS]["cpu"], 2),
            }
            for name in names
        },
    }
    _print(report, len(made))
    return report


def _write_shard(folder: Path, made: list[Any]) -> None:
    from vlmflow.dataset.sample import Sample
    from vlmflow.dataset.shard import write_shard
    from vlmflow.digest import sha256_bytes

    samples = []
    for number, page in enumerate(made):
        about = {"sha256": sha256_bytes(page.jpeg), "width": 1, "height": 1, "format": "jpeg"}
        samples.append(Sample(f"p{number:04}", {"id": str(number), "source": "pages", "images": [about]}, (page.jpeg,)))
    write_shard(folder / "pages.tar", samples)


def _measure(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    command = [sys.executable, str(HERE.parent / "curation.py"), "ocr", "--child", name, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), *sys.path])}
    environment.pop("OMP_NUM_THREADS", None)
    subprocess.run(command + (["--quick"] if quick else []), check=True, env=environment)
    return json.loads((folder / f"{name}.json").read_text())


def child(name: str, folder: Path) -> None:
    """One pass of one contender; loading the models is not counted, everything after it is."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    texts, wall, cpu, peak = _ours(folder) if name == OURS else _plain(PLAIN[name], folder)
    result = {"texts": texts, "wall": wall, "cpu": cpu, "peak_mib": peak}
    (folder / f"{name}.json").write_text(json.dumps(result))


def _ours(folder: Path) -> tuple[list[str], float, float, int]:
    from vlmflow.curation.ocr_engine import Settings
    from vlmflow.curation.ocr_workers import Workers
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.recipe.curation import OcrSpec

    shard = ShardReader(folder / "pages.tar")
    with Workers(CORES, Settings(), 50_000_000, OcrSpec().timeout) as workers:
        pids = [os.getpid(), *workers.start()]
        before, started = _cpu_seconds(pids), time.perf_counter()
        texts = [row["text"] for row in workers.read(shard)]
        wall, cpu = time.perf_counter() - started, _cpu_seconds(pids) - before
        return texts, wall, cpu, sum(map(_peak_mib, pids[1:]))


def _plain(settings: dict[str, Any], folder: Path) -> tuple[list[str], float, float, int]:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    from rapidocr import RapidOCR

    from vlmflow.dataset.shard import ShardReader
    from vlmflow.vision.image import decode

    engine = RapidOCR(params={"Global.log_level": "critical", **settings})
    word = Image.new("RGB", (160, 64), "white")
    ImageDraw.Draw(word).text((20, 16), "warm up", fill="black", font=ImageFont.load_default(28))
    engine(np.asarray(word))  # loads its models, which is not counted
    shard, texts = ShardReader(folder / "pages.tar"), []
    pids = [os.getpid()]
    before, started = _cpu_seconds(pids), time.perf_counter()
    for sample in shard:
        found = engine(np.asarray(decode(sample.images[0], 50_000_000))[:, :, ::-1])
        texts.append(_text(found))
    return texts, time.perf_counter() - started, _cpu_seconds(pids) - before, _peak_mib(pids[0])


def _text(found: Any) -> str:
    """The document's text by our rules of confidence, length and reading order."""
    from vlmflow.curation.reading_order import lines_in_order

    if getattr(found, "boxes", None) is None or not found.txts:
        return ""
    kept = [
        (box, text.strip())
        for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True)
        if score >= 0.5 and len("".join(text.split())) >= 2
    ]
    return "\n".join(" ".join(kept[i][1] for i in line) for line in lines_in_order([box for box, _ in kept]))


def _cpu_seconds(pids: list[int]) -> float:
    """User and system seconds of processes (Linux; elsewhere of this one)."""
    try:
        ticks = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13] for pid in pids]
    except OSError:
        return time.process_time()
    return sum(int(user) + int(system) for user, system in ticks) / os.sysconf("SC_CLK_TCK")


def _peak_mib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024


def _gate(ours: dict[str, Any], theirs: dict[str, Any], truth: list[str]) -> dict[str, Any]:
    """Raise SystemExit when our text is not RapidOCR's; differences that remain are counted and shown."""
    from curation_parts.ocr_pages import character_error_rate

    pairs = list(zip(ours["texts"], theirs["texts"], strict=True))
    lines = [(mine, other.split("\n")) for mine, other in pairs]
    total = sum(len(other) for _, other in lines)
    equal = sum(line in set(mine.split("\n")) for mine, other in lines for line in other)
    error, peer = (character_error_rate(list(zip(truth, who["texts"], strict=True))) for who in (ours, theirs))
    gate = {"lines": total, "identical": equal, "cer": round(error, 5), "cer_rapidocr": round(peer, 5)}
    if equal < LINES_EQUAL * total or error > peer + ALLOWED:
        raise SystemExit(
            f"equality gate: {equal} of {total} lines identical ({LINES_EQUAL:.0%} needed), character error rate "
            f"{error:.5f} against {peer:.5f} (at most {ALLOWED} above). No time counts."
        )
    return gate


def _cer(result: dict[str, Any], truth: list[dict[str, str]]) -> float:
    from curation_parts.ocr_pages import character_error_rate

    return character_error_rate([(page["text"], text) for page, text in zip(truth, result["texts"], strict=True)])


def _print(report: dict[str, Any], count: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{count} pages, {', '.join(f'{n} {kind}' for kind, n in report['pages'].items())}")
    for head in ("contender", "wall s", "CPU s", "pages/s", "peak MiB", "CER", "ours is (wall)", "ours is (CPU)"):
        table.add_column(head, justify="left" if head == "contender" else "right")
    for row in report["contenders"].values():
        figures = [f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}", f"{row['pages_per_s']:.2f}", str(row["peak_mib"])]
        ratios = [f"{row['ratio_wall']:.2f} x", f"{row['ratio_cpu']:.2f} x"]
        table.add_row(row["title"], *figures, f"{row['cer']:.5f}", *ratios)
    console = Console(width=160)
    console.print(table)
    gate = report["gate"]
    console.print(
        f"text: {gate['identical']} of {gate['lines']} lines identical to RapidOCR's; CER = character edits to the rendered "
        f"English text over its characters, all read by the same order; fonts {', '.join(report['fonts'])}"
    )
