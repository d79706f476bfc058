"""Smoke test of an export: what a stranger gets from it equals what the trained model says, in text and in logits.

The export is loaded by a separate interpreter without vlmflow, without network and with an empty module cache; the
trained model is loaded here. Same pictures, same questions, same number of threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from vlmflow.errors import ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

# Largest allowed difference of a logit: rounding of the weights' type, not another computation.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}
TIMEOUT = 900.0  # seconds for the other interpreter
TAIL = 2000  # characters of its error output that are shown


@dataclass(frozen=True)
class Question:
    """A picture question for the smoke test: RGB images and the user's words."""

    images: list[Image]
    prompt: str


class SmokeResult(BaseModel):
    """Outcome: `questions` asked, answers of both, the largest difference of any logit and how many were compared."""

    model_config = ConfigDict(extra="forbid")
    questions: int
    same_text: int
    max_logit_difference: float
    logits: int
    tolerance: float
    prompts: list[str]
    trained: list[str]
    exported: list[str]


def compare(
    trained: Path, exported: Path, questions: list[Question], max_new_tokens: int, scratch: Path
) -> SmokeResult:
    """Ask both and compare. Raises ModelError when the export does not load alone or says something else."""
    if not questions:
        raise ModelError("the smoke test of an export needs at least one question")
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        told, theirs = _ask_export(exported, questions, max_new_tokens, Path(folder))
    said, ours, dtype = _ask_trained(trained, questions, max_new_tokens)
    worst, count = 0.0, 0
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape:
            raise ModelError(
                f"export and trained model read question {number} as {tuple(b.shape)} and {tuple(a.shape)} logits: "
                "processor and training code tile or tokenise differently"
            )
        worst, count = max(worst, float((a - b).abs().max())), count + a.numel()
    result = SmokeResult(
        questions=len(questions), same_text=sum(a == b for a, b in zip(said, told, strict=True)),
        max_logit_difference=worst, logits=count, tolerance=TOLERANCE.get(dtype, 1e-5),
        prompts=[question.prompt for question in questions], trained=said, exported=told,
    )  # fmt: skip
    if not worst <= result.tolerance:
        raise ModelError(
            f"the export differs from the trained model: largest logit difference {worst:g}, allowed {result.tolerance:g} "
            f"({dtype}); it must not be published"
        )
    if result.same_text != result.questions:
        number = next(i for i, (a, b) in enumerate(zip(said, told, strict=True)) if a != b)
        raise ModelError(
            f"the export says '{told[number]}' to question {number}, the trained model '{said[number]}' "
            f"({result.same_text} of {result.questions} answers agree); it must not be published"
        )
    return result


def _ask_export(
    folder: Path, questions: list[Question], max_new_tokens: int, work: Path
) -> tuple[list[str], list[Any]]:
    import torch
    from safetensors.torch import load_file

    asked = []
    for number, question in enumerate(questions):
        paths = []
        for place, image in enumerate(question.images):
            path = work / f"{number}-{place}.png"
            image.convert("RGB").save(path)
            paths.append(str(path))
        asked.append({"images": paths, "prompt": question.prompt})
    job = {
        "folder": str(folder), "questions": asked, "max_new_tokens": max_new_tokens, "out": str(work),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    (work / "job.json").write_text(json.dumps(job))
    keep = ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LANG", "TMPDIR")
    env = {name: os.environ[name] for name in keep if name in os.environ}
    env |= {
        "HOME": str(work), "HF_HOME": str(work / "hf"), "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-I", str(Path(__file__).with_name("smoke_child.py")), str(work / "job.json")]
    try:
        done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"the export did not answer {len(questions)} questions within {TIMEOUT:.0f} s") from error
    if done.returncode != 0:
        raise ModelError(
            f"the export does not work without vlmflow (exit {done.returncode}):\n{done.stderr.strip()[-TAIL:]}"
        )
    report = json.loads((work / "answers.json").read_text())
    if report["blocked"] or report["code"] != "transformers_modules":
        raise ModelError(
            f"the smoke test did not run on the exported code alone: {report['blocked']}, {report['code']}"
        )
    logits = load_file(work / "logits.safetensors")
    return report["answers"], [logits[str(number)] for number in range(len(questions))]


def _ask_trained(folder: Path, questions: list[Question], max_new_tokens: int) -> tuple[list[str], list[Any], str]:
    """(answers, logits, dtype) of the trained model, encoded by the training code, unpacked, on the CPU."""
    import numpy as np
    import torch

    from vlmflow.models import load_model
    from vlmflow.models.chat import render_prompt
    from vlmflow.models.inference import VLM, Request

    model, tokenizer = load_model(folder, attention="sdpa")
    vlm = VLM(model, tokenizer)
    answers, logits = [], []
    for question in questions:
        images = [image.convert("RGB") for image in question.images]
        answers.append(vlm.generate([Request(images, question.prompt)], max_new_tokens, batch=1)[0].text)
        tiles = [vlm.family.tile(image, model.config) for image in images]
        segments = render_prompt(question.prompt, len(images))
        ids, _ = vlm.family.expand(segments, tokenizer, [len(each) for each in tiles], model.config)
        pixels = torch.from_numpy(np.concatenate(tiles)) if tiles else None
        mask = torch.ones(1, len(ids), dtype=torch.long)
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([ids]), attention_mask=mask, pixel_values=pixels)
        logits.append(out.logits[0].float())
    return answers, logits, str(model.dtype).removeprefix("torch.")
