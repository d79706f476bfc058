"""Runs in a separate interpreter (`python -I`) that must not see vlmflow: load the export as a stranger would, answer.

Usage: python -I smoke_child.py JOB.json. The job names the folder, the questions (image file + prompt), threads and the
output folder, which receives `answers.json` and `logits.safetensors` (one tensor a question: its prompt's logits).
"""

import json
import sys
from pathlib import Path

BLOCKED = {"vlmflow", "kfp", "mlflow", "deepspeed", "torchvision"}


def block() -> None:
    """Make packages that a user of the export does not have absent, for import and for find_spec."""
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]


def main() -> None:
    block()
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(job["threads"])
    processor = AutoProcessor.from_pretrained(job["folder"], trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(job["folder"], trust_remote_code=True).eval()
    answers, logits = [], {}
    for number, question in enumerate(job["questions"]):
        content = [*({"type": "image"} for _ in question["images"]), {"type": "text", "text": question["prompt"]}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [Image.open(path) for path in question["images"]]
        inputs = processor(images=images, text=text, return_tensors="pt")
        with torch.inference_mode():
            logits[str(number)] = model(**inputs).logits[0].float().contiguous()
            out = model.generate(**inputs, max_new_tokens=job["max_new_tokens"], do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    seen = sorted(name for name, module in sys.modules.items() if module and name.split(".")[0] in BLOCKED)
    save_file(logits, Path(job["out"]) / "logits.safetensors")
    code = type(model).__module__.split(".")[0]
    (Path(job["out"]) / "answers.json").write_text(json.dumps({"answers": answers, "blocked": seen, "code": code}))


if __name__ == "__main__":
    main()
