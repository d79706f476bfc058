"""How fast curation is, against the tool that a team would otherwise pick, in one run on one machine.

    python benchmarks/curation.py PART [--quick] [--json FILE] ...
    python benchmarks/curation.py PART --help

Each part starts what it needs, runs every contender at its best settings in turn (A/B/B/A where noise matters), checks
that their results are equal before any time counts, prints one table and writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

PARTS = {
    "pull": "against img2dataset: originals and resized, endless bodies, slow drips",
    "perplexity": "against one sample at a time, padded batches and length buckets",
    "ocr": "against a plain RapidOCR loop, with character error rates",
    "shards": "reading shuffled raw bytes against webdataset's reader",
    "flips": "flipped bits in pictures: what the proofs of pull see of them",
    "decode": "JPEGs at the scale that tiling needs against whole decoding",
    "ask": "requests per second of a text model's client against openai's SDK",
    "rows": "a million rows through keep, dedup, stats and gallery",
}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cores": os.cpu_count(), "memory_gib": round(memory, 1), "python": platform.python_version()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    words = list(sys.argv[1:] if arguments is None else arguments)
    for name, about in PARTS.items():
        part = parts.add_parser(name, help=about, description=about)
        part.add_argument("--quick", action="store_true", help="small sizes: does it work, not how fast")
        part.add_argument("--json", type=Path, default=HERE / "results" / f"curation_{name}.json")
        if name in words[:1]:
            importlib.import_module(f"curation_parts.{name}").add_arguments(part)
    asked = parser.parse_args(words)
    result = importlib.import_module(f"curation_parts.{asked.part}").run(asked)
    if not asked.quick:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps({"machine": machine(), **result}, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {asked.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
