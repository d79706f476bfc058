"""Export: loads without vlmflow, says and computes the same, same bytes every time, and shows where it came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import models_tiny
import pytest
import registry_samples as samples
import yaml

from vlmflow.errors import DataError, ModelError
from vlmflow.evaluation.tsv import encode_image, write_table
from vlmflow.export import folder, smoke
from vlmflow.export import run as export
from vlmflow.models import store
from vlmflow.models.initial import save
from vlmflow.soup.choose import TraceStep
from vlmflow.soup.result import SoupEntry, SoupResult


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny published model with a question table, in a context of its own."""
    tmp_path = tmp_path_factory.mktemp("export")
    table = tmp_path / "digits.tsv"
    rows = [
        {"index": i, "image": encode_image(models_tiny.picture(i, 60 + 20 * i)), "question": f"read number {i}", "answer": "7",
         "split": "report" if i % 2 else "selection"}
        for i in range(6)
    ]  # fmt: skip
    write_table(table, rows)
    evaluation = {"benchmarks": {"digits": {"table": table.as_uri(), "kind": "reading"}}, "max_new_tokens": 6}
    ctx = samples.context(tmp_path, evaluation=evaluation, export={"licence": "apache-2.0", "examples": 2})
    source = tmp_path / "model"
    save(models_tiny.build(), models_tiny.tokenizer(), source)
    lineage = store.ModelLineage(step="soup", parents=["c" * 64], ancestor="d" * 64, data=[samples.manifest().digest])
    return ctx, store.publish(ctx, source, "points-test", lineage, "k")


def soup_of(model):
    entry = SoupEntry(ref=model, ingredients=["base"], selection=samples.scores(model.weights_sha256, 32))
    trace = [TraceStep(step=1, candidate="base", before=None, after=0.8, accepted=True)]
    return SoupResult(soups={"greedy": entry}, candidates={"base": entry}, chosen="greedy", trace=trace)


@pytest.fixture(scope="module")
def exported(trained):
    ctx, model = trained
    return export.run(ctx, model, samples.score_table(model), soup_of(model), {"sft": samples.manifest()})


def local(ref) -> Path:
    return Path(ref.uri.removeprefix("file://"))


def test_the_export_says_and_computes_what_the_model_does(exported):
    outcome = exported.smoke
    assert (outcome.questions, outcome.same_text) == (2, 2)
    assert outcome.max_logit_difference <= 1e-5 and outcome.logits > 0
    assert [prompt.split("\n")[0] for prompt in outcome.prompts] == ["read number 1", "read number 3"], "held out"


def test_all_files_are_there_and_hashed(exported):
    names = {file.path for file in exported.files}
    assert names >= {
        "config.json", "model.safetensors", "generation_config.json", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "README.md", "SHA256SUMS", "configuration_points.py",
        "modeling_points.py", "processing_points.py", "catty.py", "rgb.py",
    }  # fmt: skip
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=local(exported), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(names) - 1
    config = json.loads((local(exported) / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_points.PointsConfig",
        "AutoModelForImageTextToText": "modeling_points.PointsForConditionalGeneration",
    }


def test_nothing_in_it_knows_vlmflow_or_this_machine(exported, trained):
    for path in local(exported).glob("*.py"):
        assert "import vlmflow" not in path.read_text() and "from vlmflow" not in path.read_text()
    for path in local(exported).iterdir():
        if path.name not in ("model.safetensors", "ref.json"):
            assert str(trained[0].scratch.parent) not in path.read_text()


def test_the_card_shows_scores_data_and_lineage(exported, trained):
    text = (local(exported) / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert "on the report split (the soup was chosen on other questions)" in text
    assert "| chance | 10.0 |" in text and "| untrained | 10.0 [" in text
    assert "| **greedy soup (this model)** | 80.0 [" in text
    assert samples.manifest().digest in text and "| sft | 7 | base |" in text
    assert trained[1].weights_sha256 in text and "c" * 64 in text
    assert "| sft | language (0.001) | sft: conversations x 1 |" in text
    assert "| 1 | base |  | 80.0 | yes |" in text
    assert "A demonstration, not a product" in text


def test_a_second_run_finds_the_export_without_a_smoke_test(exported, trained, monkeypatch):
    ctx, model = trained
    monkeypatch.setattr(smoke, "compare", lambda *_: pytest.fail("tested again"))
    assert export.run(ctx, model, samples.score_table(model), soup_of(model), {"sft": samples.manifest()}) == exported


def test_a_commit_makes_no_new_export(exported, trained, monkeypatch):
    """The address follows the model and its card, not the checkout that exported it."""
    ctx, model = trained
    monkeypatch.setenv("VLMFLOW_CODE_VERSION", "0.1.0+another-commit")
    monkeypatch.setattr(smoke, "compare", lambda *_: pytest.fail("tested again"))
    assert export.run(ctx, model, samples.score_table(model), soup_of(model), {"sft": samples.manifest()}) == exported


def test_an_export_that_was_cut_off_is_made_again_with_the_same_bytes(exported, trained, monkeypatch):
    ctx, model = trained
    before = {p.name: p.read_bytes() for p in local(exported).iterdir()}
    (local(exported) / "ref.json").unlink()
    (local(exported) / "catty.py").unlink()
    monkeypatch.setattr(smoke, "compare", lambda *_: exported.smoke)
    export.run(ctx, model, samples.score_table(model), soup_of(model), {"sft": samples.manifest()})
    assert {p.name: p.read_bytes() for p in local(exported).iterdir()} == before


def test_a_changed_weight_fails_the_smoke_test(trained, exported, tmp_path):
    """The comparison can fail: one bias of the export is moved."""
    import torch
    from safetensors.torch import load_file, save_file

    ctx, model = trained
    bad = tmp_path / "bad"
    folder.build(local(model), bad, "card", 10**9)
    tensors = load_file(bad / "model.safetensors")
    name = next(name for name in tensors if name.endswith("linear_2.bias"))
    tensors[name] = tensors[name] + torch.linspace(0, 1, tensors[name].numel())
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="largest logit difference"):
        smoke.compare(local(model), bad, export.questions(ctx)[:1], 2, tmp_path)


def test_large_weights_are_split_and_load(trained, tmp_path):
    _, model = trained
    folder.build(local(model), tmp_path / "split", "card", 200_000)
    names = sorted(p.name for p in (tmp_path / "split").glob("*.safetensors*"))
    assert len(names) > 2 and names[-1] == "model.safetensors.index.json"
    assert export.parameters(tmp_path / "split") == export.parameters(local(model))
    from vlmflow.models import load_model

    both = [load_model(path)[0].state_dict() for path in (tmp_path / "split", local(model))]
    assert all(both[0][name].equal(both[1][name]) for name in both[1])


def test_blocked_packages_are_blocked(tmp_path):
    """The child interpreter of the smoke test cannot import what a user would not have."""
    code = f"""
import sys, importlib.util, runpy
child = runpy.run_path({smoke.__file__.replace("smoke.py", "smoke_child.py")!r})
child["block"]()
for name in child["BLOCKED"]:
    try: __import__(name)
    except ModuleNotFoundError: continue
    raise SystemExit(name)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(export.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)


def test_code_that_imports_vlmflow_or_an_unexported_file_is_refused(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("from vlmflow.vision.catty import x\nfrom vlmflow.errors import DataError\n")
    with pytest.raises(ModelError, match=r"imports vlmflow .line 2"):
        folder.remote_code(source, {"a.py", "catty.py"})
    source.write_text("def f():\n    from vlmflow.vision.catty import x\n")
    assert folder.remote_code(source, {"a.py", "catty.py"}) == "def f():\n    from .catty import x\n"
    source.write_text("from .other import x\n")
    with pytest.raises(ModelError, match="which is not exported"):
        folder.remote_code(source, {"a.py"})


def test_incomplete_models_and_foreign_scores_are_refused(trained, tmp_path):
    ctx, model = trained
    with pytest.raises(DataError, match="evaluate it first"):
        export.run(ctx, model, {"untrained": samples.scores("0" * 64, 4)})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"lacks generation_config\.json"):
        folder.build(tmp_path, tmp_path / "out", "card", 10**9)
