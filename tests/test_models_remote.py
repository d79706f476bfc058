"""The model's files work as remote code: in a folder of their own, in a process that has no vlmflow."""

import subprocess
import sys

import pytest
import torch
from models_tiny import build, picture, tokenizer

from vlmflow.export.folder import build as build_export
from vlmflow.models.initial import save

SCRIPT = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, pixels, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.fromarray(np.load(pixels))
message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}
inputs = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
with torch.no_grad():
    logits = model(**inputs).logits
    text = model.generate(**inputs, max_new_tokens=4)
assert not any(name.split(".")[0] == "vlmflow" for name in sys.modules)
torch.save({"ids": inputs["input_ids"], "logits": logits, "text": text}, out)
"""


@pytest.mark.slow
def test_files_work_alone(tmp_path):
    import numpy as np

    model = build(attention="sdpa")
    save(model, tokenizer(), tmp_path / "model")
    folder = tmp_path / "export"
    build_export(tmp_path / "model", folder, "card", 10**9)
    for path in folder.glob("*.py"):
        assert "import vlmflow" not in path.read_text() and "from vlmflow" not in path.read_text()
    np.save(tmp_path / "pixels.npy", np.asarray(picture(1)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "pixels.npy"), str(tmp_path / "out.pt")],
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    from vlmflow.models.chat import render_prompt
    from vlmflow.models.points.family import POINTS

    tiles = POINTS.tile(picture(1), model.config)
    ids, _ = POINTS.expand(render_prompt("What?", 1), tokenizer(), [len(tiles)], model.config)
    assert found["ids"][0].tolist() == ids
    ours = model(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(tiles)).logits
    assert (ours - found["logits"]).abs().max().item() < 1e-5
    assert found["text"].shape[1] == len(ids) + 4
