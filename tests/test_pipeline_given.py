"""What a form of the smaller pipelines names (models, manifests, stages), and how every run ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlmflow import finish, pipeline_needs, ports, preflight, result_ports, storage
from vlmflow.dataset.manifest import LayerRef, Lineage, Manifest, ShardRef, save
from vlmflow.errors import DataError, ModelError, RecipeError, RegistryError, ServiceError
from vlmflow.models.store import MARKER, FileRef, ModelLineage, ModelRef, dump_ref
from vlmflow.recipe import load
from vlmflow.registry import address
from vlmflow.step import Context, frame

TINY = Path(__file__).resolve().parents[1] / "recipes/points-tiny.yaml"


@pytest.fixture
def ctx(tmp_path, monkeypatch) -> Context:
    root = (tmp_path / "store").as_uri()
    monkeypatch.setenv("VLMFLOW_ROOT", root)
    monkeypatch.setenv("VLMFLOW_RUN_ID", "r1")
    return Context(load(TINY), root, tmp_path / "scratch", "r1", "test")


def published(ctx: Context, name: str, weights: str, data: tuple[str, ...] = ()) -> ModelRef:
    uri = f"{ctx.root}/models/{name}-{weights[:4]}"
    files = [FileRef(path="model.safetensors", sha256="a" * 64, bytes=8)]
    lineage = ModelLineage(step="train", data=list(data))
    ref = ModelRef(name=name, uri=uri, files=files, weights_sha256=weights, lineage=lineage)
    dump_ref(ref, f"{uri}/{MARKER}")
    return ref


def manifest(name: str, *layers: str) -> Manifest:
    shards = [ShardRef(uri="file:///s.tar", sha256="b" * 64, bytes=1, samples=3, source="web")]
    made = {layer: LayerRef(step=layer, digest="d", params={}, parts=[]) for layer in layers}
    return Manifest(name=name, shards=shards, layers=made, lineage=[Lineage(step="pull")])


# --- models and datasets by address ----------------------------------------------------------------------------------


def test_a_model_is_found_by_its_folder_or_its_marker(ctx):
    ref = published(ctx, "m", "1" * 64)
    assert address.find(ref.uri) == address.find(ref.uri + "/") == address.find(f"{ref.uri}/{MARKER}") == ref


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ("file:///nowhere/m", ModelError, r"there is no model at file:///nowhere/m: it has no model\.json"),
        ("points", ModelError, "'points' is no address of a model"),
        ("models:/points", RegistryError, "names no version; write models:/NAME/3"),
    ],
)
def test_a_wrong_address_says_how_to_write_one(given, kind, said):
    with pytest.raises(kind, match=said):
        address.find(given)


def test_models_are_dealt_by_weights_and_named_apart(ctx):
    first, second = published(ctx, "m", "1" * 64), published(ctx, "m", "2" * 64)
    other = published(ctx, "n", "1" * 64)
    dealt = result_ports.contestants(ctx, [first.uri, second.uri, other.uri, first.uri], 8)
    assert [group["models"] for group in dealt] == [
        {"m-11111111": first.uri, "n": other.uri},
        {"m-22222222": second.uri},
    ]
    assert [group["name"] for group in dealt] == ["1", "2"]
    with pytest.raises(RecipeError, match="models: the list is empty"):
        result_ports.contestants(ctx, [], 8)


def test_an_open_model_is_a_contestant(ctx, tmp_path):
    ref = published(ctx, "m", "1" * 64)
    path = tmp_path / "model.json"
    dump_ref(ref, path)
    (group,) = result_ports.contestants(ctx, [], 1, SimpleNamespace(path=str(path), metadata={}))
    assert group["models"] == {"m": ref.uri}


def test_the_datasets_of_a_model_are_found_by_its_lineage(ctx):
    early, late = manifest("web", "ocr"), manifest("web", "ocr", "fused", "keep")
    sft = manifest("sft")
    for each in (early, late, sft):
        save(each, ctx.root)
    ref = published(ctx, "m", "1" * 64, (late.digest, sft.digest, early.digest, "0" * 64))
    assert ports.manifests_of(ctx, ref) == {"sft": sft, "web": late}


def test_a_given_manifest_is_used_as_it_is_and_an_unused_dataset_is_not_pulled(ctx):
    web = manifest("web", "fused", "keep")
    assert ports.pull(ctx, "web", save(web, ctx.root)) == web
    assert ports.pull(ctx, "seed", stage="align") == Manifest(name="seed", shards=[])
    assert ports.pull(ctx, "nothing") == Manifest(name="nothing", shards=[])
    with pytest.raises(RecipeError, match="stage 'aligm' is not in the recipe"):
        ports.pull(ctx, "seed", stage="aligm")


# --- preflight -------------------------------------------------------------------------------------------------------


def test_a_stage_needs_the_layers_that_it_learns_from(ctx):
    whole, bare = save(manifest("web", "fused", "keep"), ctx.root), save(manifest("web", "ocr"), ctx.root)
    ref = published(ctx, "m", "1" * 64)
    rows = preflight.check_given(ctx, ["", ref.uri], {"web": whole}, [("align", "")])
    assert [row["found"] for row in rows] == [ref.weights_sha256, f"3 samples, {Path(whole).stem}", "align"]
    with pytest.raises(DataError, match=r"layers \['fused', 'keep'\] of dataset 'web'; the manifest .* has \['ocr'\]"):
        preflight.check_given(ctx, manifests={"web": bare}, trainings=[("align", "")])
    with pytest.raises(DataError, match=r"has none\. Run the pipeline curate"):
        preflight.check_given(ctx, trainings=[("align", "")])
    with pytest.raises(RecipeError, match="candidate 'x' is not in the recipe"):
        preflight.check_given(ctx, trainings=[("sft", "x")])


def test_what_a_pipeline_trains_of_given_datasets(ctx):
    assert preflight.trainings_of(ctx.recipe, "train", "align") == [("align", "")]
    assert preflight.trainings_of(ctx.recipe, "soup") == [("sft", n) for n in ("charts", "pairs", "describe")]
    assert preflight.trainings_of(ctx.recipe, "points") == []


def test_a_given_scorer_takes_the_place_of_the_bootstrap(ctx):
    assert preflight.resolve(str(TINY), [], pipeline="curate").bootstrap is not None
    ref = published(ctx, "m", "1" * 64)
    recipe = preflight.resolve(str(TINY), ["curation.scorer=s3://old"], pipeline="curate", scorer=f"{ref.uri}/")
    assert recipe.bootstrap is None and recipe.curation.scorer == ref.uri


def test_a_recipe_may_hold_more_than_a_pipeline_runs_but_not_less():
    recipe = load(TINY)
    turned = recipe.model_copy(update={"stages": {n: recipe.stages[n] for n in ("align", "ocr", "sft")}})
    for name in pipeline_needs.PIPELINES:
        pipeline_needs.suits(recipe, name)
        if name != "points":
            pipeline_needs.suits(turned, name)
    plain = recipe.model_copy(
        update={"soup": None, "evaluation": recipe.evaluation.model_copy(update={"benchmarks": {}})}
    )
    pipeline_needs.suits(plain, "train")
    with pytest.raises(
        RecipeError, match=r"(?s)the pipeline 'soup':.*soup: the soup.*evaluation\.benchmarks: the soup"
    ):
        pipeline_needs.suits(plain, "soup")
    nothing = recipe.model_copy(update={"curation": recipe.curation.model_copy(update={"dataset": None})})
    with pytest.raises(RecipeError, match="nothing to curate"):
        pipeline_needs.suits(nothing, "curate")
    with pytest.raises(RecipeError, match="no pipeline 'promote' works by a recipe"):
        pipeline_needs.needs_of("promote")


def test_only_what_the_pipeline_needs_is_probed(ctx, monkeypatch):
    """An evaluation needs neither the tables of the training data nor MLflow; here none of them answers."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    seen = []
    monkeypatch.setattr(preflight, "_tables", lambda ctx, **asked: seen.append(asked) or [])
    preflight.check(ctx, "evaluate")
    assert seen[0]["needs"] == pipeline_needs.Needs(benchmarks=True)
    with pytest.raises(ServiceError, match="MLFLOW_TRACKING_URI"):
        preflight.check(ctx, "soup")


def test_curation_looks_for_the_benchmarks_that_it_compares_with(ctx, monkeypatch):
    looked = []
    monkeypatch.setattr(
        preflight, "_size", lambda field, uri, allow: looked.append(field) or preflight.OPENED_BYTES + 1
    )
    needs, given = pipeline_needs.needs_of("curate"), ("seed", "web", "sft")
    preflight._tables(ctx, needs, given, "", "")
    assert "evaluation.benchmarks.digits.table" in looked
    looked.clear()
    plain = ctx.recipe.model_copy(update={"curation": ctx.recipe.curation.model_copy(update={"contamination": None})})
    preflight._tables(replace(ctx, recipe=plain), needs, given, "", "")
    assert not looked


def test_ocr_is_checked_where_its_step_will_run(ctx, monkeypatch):
    from vlmflow.curation import ocr_engine

    monkeypatch.delenv("VLMFLOW_PROGRESS", raising=False)
    asked = ctx.recipe.curation.ocr.model_copy(update={"provider": "cuda"})
    assert preflight._ocr(asked) == []  # on a cluster: another image, another node
    monkeypatch.setenv("VLMFLOW_PROGRESS", "/nowhere")
    monkeypatch.setattr(ocr_engine, "choose_provider", lambda provider: f"what {provider} gives")
    ((what, found),) = preflight._ocr(asked)
    assert "OCR" in what and "rapidocr" in found and found.endswith("on what cuda gives")


# --- the end of a run ------------------------------------------------------------------------------------------------


def test_the_summary_says_how_a_run_ended_and_what_took_how_long(ctx):
    with frame("preflight"):
        pass
    with frame("ocr-1"):
        pass
    with pytest.raises(RuntimeError), frame("caption-1"):
        raise RuntimeError("broken")
    made = finish.run("FAILED", "caption", "broken")
    assert [step["step"] for step in made["steps"]] == ["preflight", "ocr-1"] and made["deleted"] == []
    assert storage.read_json(f"{ctx.root}/runs/r1/end.json") == made
    assert (made["state"], made["failed"], made["message"]) == ("FAILED", "caption", "broken")
    assert all(0 <= step["seconds"] < 60 for step in made["steps"])


def test_a_run_without_a_single_finished_step_has_a_summary(ctx):
    assert finish.run("FAILED")["steps"] == []


def test_trainjobs_of_the_run_are_deleted_and_a_refusal_is_not_hidden(ctx, monkeypatch):
    from vlmflow.training.trainjob import clean, config

    asked = []
    monkeypatch.setenv("VLMFLOW_TRAIN_LAUNCHER", "trainjob")
    monkeypatch.setattr(config, "from_environment", lambda: "config")
    monkeypatch.setattr(clean, "clean", lambda run_id, given: asked.append((run_id, given)) or ["job-1"])
    assert finish.run("FAILED")["deleted"] == ["job-1"] and asked == [("r1", "config")]

    def refuse(run_id, given):
        raise ServiceError("may not delete trainjobs")

    monkeypatch.setattr(clean, "clean", refuse)
    with pytest.raises(ServiceError, match=r"may still be there: may not delete trainjobs"):
        finish.run("SUCCEEDED")
    written = json.loads(storage.read_bytes(f"{ctx.root}/runs/r1/end.json"))
    assert written["state"] == "SUCCEEDED" and "may not delete" in written["problem"]
