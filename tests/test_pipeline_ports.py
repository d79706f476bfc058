"""Between Kubeflow artifacts and vlmflow's objects; and the checks before a run."""

import io
import json
import types
from pathlib import Path

import pytest
from PIL import Image

from vlmflow import pages, pipeline_needs, ports, preflight, result_ports
from vlmflow.dataset.layer import add_layer
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import describe_shard, write_shard
from vlmflow.digest import sha256_bytes
from vlmflow.errors import DataError, ModelError, RecipeError, ServiceError, StorageError
from vlmflow.evaluation.scores import BenchmarkScore, Scores
from vlmflow.evaluation.tsv import write_table
from vlmflow.models.store import FileRef, ModelLineage, ModelRef, dump_ref
from vlmflow.recipe import load
from vlmflow.soup.result import SoupEntry, SoupResult
from vlmflow.step import Context

TINY = Path(__file__).resolve().parents[1] / "recipes/points-tiny.yaml"
CANDIDATES = ("charts", "pairs", "describe")


class Port:
    """An artifact as kfp gives it."""

    def __init__(self, path: Path, **metadata: object) -> None:
        self.path, self.metadata = str(path), dict(metadata)


@pytest.fixture
def ctx(tmp_path) -> Context:
    return Context(load(TINY), (tmp_path / "store").as_uri(), tmp_path / "scratch", "r1", "test")


def model(name: str, weights: str = "") -> ModelRef:
    files = [FileRef(path="model.safetensors", sha256="a" * 64, bytes=8)]
    return ModelRef(
        name=name,
        uri=f"file:///models/{name}",
        files=files,
        weights_sha256=weights or name,
        lineage=ModelLineage(step="train"),
    )


def scores(name: str, accuracy: float = 0.5) -> Scores:
    one = BenchmarkScore(
        accuracy=accuracy, n=10, chance=0.1, parsed=1.0, errors=0, interval=(0.2, 0.8), kind="reading",
        table_sha256="t", split_by="hash", predictions="file:///p",
    )  # fmt: skip
    return Scores(model_sha=name, split="report", benchmarks={"digits": one}, mean=accuracy)


def stored(tmp_path: Path, ref: ModelRef, **metadata: object) -> Port:
    port = Port(tmp_path / f"{ref.name}.json", **metadata)
    dump_ref(ref, port.path)
    return port


def soup_port(tmp_path: Path, greedy_weights: str = "") -> Port:
    def entry(ref: ModelRef) -> SoupEntry:
        return SoupEntry(ref=ref, ingredients=["charts"], selection=scores(ref.name))

    soups = {name: entry(model(name)) for name in ("maximum", "average")}
    soups["greedy"] = entry(model("greedy", greedy_weights))
    made = SoupResult(soups=soups, candidates={n: entry(model(n)) for n in CANDIDATES}, chosen="greedy", trace=[])
    port = Port(tmp_path / "soup.json")
    ports.put_soup(made, port, Port(tmp_path / "chosen"), Port(tmp_path / "page"), Port(tmp_path / "metrics"))
    return port


def trained(tmp_path: Path) -> list[Port]:
    return [stored(tmp_path, model(name), candidate=name) for name in reversed(CANDIDATES)]


def test_only_numbers_become_metrics(tmp_path):
    page, metrics = Port(tmp_path / "a/page.html"), Port(tmp_path / "metrics")
    ports.show("T", {"rows": 3, "ok": True, "why": "text", "nan": float("nan"), "by": {"ms": 1.5}}, page, metrics)
    assert metrics.metadata == {"rows": 3, "ok": 1, "by.ms": 1.5}
    assert json.loads(Path(metrics.path).read_text()) == metrics.metadata
    assert "text" in Path(page.path).read_text()


def test_pages_show_hostile_text_as_text():
    shown = pages.page("<b>", {"k": "<script>"}, [{"<i>": "a&b", "image": pages.Picture("data:x'onerror='y")}])
    assert "<script>" not in shown and "<b>" not in shown and "<i>" not in shown
    assert "a&amp;b" in shown and "'onerror" not in shown


def test_the_resolved_recipe_keeps_the_order_of_stages_and_candidates(tmp_path):
    recipe, port = load(TINY, ["seed=4"]), Port(tmp_path / "recipe")
    ports.put_recipe(recipe, port)
    again = load(port.path)
    assert again == recipe and list(again.stages) == ["ocr", "align", "sft"]
    assert list(again.soup.candidates) == list(CANDIDATES)
    assert port.metadata["name"] == "points-tiny"


def test_candidates_come_back_in_the_order_of_the_recipe(ctx, tmp_path):
    found = ports.get_candidates(ctx, trained(tmp_path))
    assert list(found) == list(CANDIDATES) == ports.candidate_names(ctx)
    with pytest.raises(DataError, match=r"\['pairs'\] were not trained: 2 of 3"):
        ports.get_candidates(ctx, [p for p in trained(tmp_path) if p.metadata["candidate"] != "pairs"])


def test_every_model_is_evaluated_once_in_groups(ctx, tmp_path):
    first, model_p = stored(tmp_path, model("untrained")), stored(tmp_path, model("bootstrap"))
    for evaluators in (1, 2, 3.0, 100):
        groups = result_ports.lineup(ctx, first, model_p, trained(tmp_path), soup_port(tmp_path), evaluators)
        assert [group["name"] for group in groups] == [str(i + 1) for i in range(min(int(evaluators), 8))]
        names = [name for group in groups for name in group["models"]]
        assert sorted(names) == sorted(["untrained", "bootstrap", *CANDIDATES, *result_ports.SOUPS])
        assert all(group["models"] for group in groups)


def test_gates_get_the_selection_scores_of_the_choice_and_of_the_untrained_model(ctx, tmp_path, monkeypatch):
    from vlmflow.evaluation import run

    asked = []
    monkeypatch.setattr(run, "run", lambda _, ref, split: asked.append((ref.name, split)) or scores(ref.name, 0.1))
    judged = result_ports.judged_scores(ctx, model("untrained"), ports.get_soup(soup_port(tmp_path)))
    assert asked == [("untrained", "selection")], "the soup step has scored the others"
    assert {name: score.mean for name, score in judged.items()} == {"untrained": 0.1, "soup-greedy": 0.5}
    assert judged["soup-greedy"].model_sha == "greedy"


def test_a_soup_with_a_candidates_weights_shares_its_group(ctx, tmp_path):
    first, model_p = stored(tmp_path, model("untrained")), stored(tmp_path, model("bootstrap"))
    groups = result_ports.lineup(ctx, first, model_p, trained(tmp_path), soup_port(tmp_path, "charts"), 100)
    assert len(groups) == 7
    assert [set(group["models"]) for group in groups if "charts" in group["models"]] == [{"charts", "soup-greedy"}]


def test_scores_of_all_groups_come_in_one_order(ctx, tmp_path):
    groups = [("soup-greedy", "charts"), ("untrained", "soup-maximum"), ("pairs", "bootstrap")]
    made = []
    for i, names in enumerate(groups):
        made.append(Port(tmp_path / f"s{i}"))
        page, metrics = Port(tmp_path / "page"), Port(tmp_path / "metrics")
        result_ports.put_scores({name: scores(name) for name in names}, made[-1], page, metrics)
        assert metrics.metadata[f"{names[0]}.digits"] == 0.5
    found = result_ports.get_scores(ctx, made)
    assert list(found) == ["untrained", "bootstrap", "charts", "pairs", "soup-maximum", "soup-greedy"]
    assert found["pairs"] == scores("pairs")


def test_the_chosen_soup_is_the_model_that_goes_on(tmp_path):
    port = soup_port(tmp_path)
    assert ports.get_model(Port(tmp_path / "chosen")).name == "greedy"
    assert ports.get_soup(port).chosen == "greedy"


def dataset(ctx: Context, tmp_path: Path) -> Manifest:
    out = io.BytesIO()
    Image.new("RGB", (300, 200), "red").save(out, "PNG")
    found = {"sha256": sha256_bytes(out.getvalue()), "width": 300, "height": 200, "format": "png"}
    samples = [
        Sample(f"k{i}", {"id": str(i), "text": f"text {i}", "images": [found]}, (out.getvalue(),)) for i in range(2)
    ]
    samples.append(Sample("k2", {"id": "2", "conversations": [{"from": "human", "value": "why?"}], "images": []}))
    path = tmp_path / "s.tar"
    write_shard(path, samples)
    manifest = Manifest(name="web", shards=[describe_shard(path, path.as_uri(), 3, "web")])

    def compute(reader, upstream):
        return [{"key": key, "text": f"READ {key}", "error": None} for key in reader.keys()]

    return add_layer(ctx, manifest, "ocr", params={}, version=1, schema={"text": "str"}, compute=compute)


def test_a_dataset_travels_and_its_page_shows_samples_and_the_new_layer(ctx, tmp_path):
    manifest = dataset(ctx, tmp_path)
    data, page, metrics = Port(tmp_path / "data"), Port(tmp_path / "page"), Port(tmp_path / "metrics")
    ports.put_manifest(ctx, manifest, data, page, metrics, title="OCR", layer="ocr")
    assert ports.get_manifest(data) == manifest
    assert data.metadata["digest"] == manifest.digest and metrics.metadata["samples"] == 3
    shown = Path(page.path).read_text()
    assert "data:image/jpeg;base64," in shown and "READ k1" in shown and "text 0" in shown and "why?" in shown


def test_datasets_that_the_recipe_lacks_are_empty_and_left_out(ctx, tmp_path):
    ctx.recipe = ctx.recipe.model_copy(update={"data": {}})
    empty = Port(tmp_path / "seed")
    ports.write_object(ports.pull(ctx, "seed"), empty.path)
    assert ports.get_manifests(seed=empty) == {}


def test_steps_that_the_recipe_leaves_out_hand_their_input_through(ctx, tmp_path):
    manifest = Manifest(name="web", shards=[])
    curation = ctx.recipe.curation.model_copy(update={"dataset": None})
    ctx.recipe = ctx.recipe.model_copy(update={"curation": curation, "bootstrap": None, "stages": {}})
    assert ports.curate(ctx, None, manifest) is manifest
    first = model("first")
    assert ports.train(ctx, "bootstrap", first, {}) is first
    assert ports.train(ctx, "align", first, {}) is first


def test_an_artifact_with_something_else_in_it_is_named(tmp_path):
    path = tmp_path / "x"
    path.write_text("{}")
    with pytest.raises(DataError, match="holds no ModelRef"):
        ports.read_object(ModelRef, path)


def test_report_and_summary_reach_the_store(ctx, tmp_path, monkeypatch):
    from vlmflow.report import run

    monkeypatch.setattr(run, "run", lambda ctx, inputs: f"<p>{inputs.soup['chosen']} {list(inputs.scores)}")
    registered, exported = Port(tmp_path / "r"), Port(tmp_path / "e")
    ports.write_object({"name": "n-candidates", "version": "3", "url": "http://x", "gates": {}}, registered.path)
    ports.write_object({"uri": "file:///e", "files": []}, exported.path)
    page = Port(tmp_path / "page")
    result_ports.put_report(
        ctx, {}, {}, {"untrained": scores("u", 0.1)}, soup_port(tmp_path), registered, exported, page
    )
    folder = tmp_path / "store/runs/r1"
    assert (folder / "report.html").read_text() == Path(page.path).read_text() == "<p>greedy ['untrained']"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["scores"] == {"untrained": {"digits": 0.1, "mean": 0.1}} and summary["chance"] == {"digits": 0.1}
    assert summary["registered"] == {"name": "n-candidates", "version": "3", "url": "http://x"}
    assert summary["chosen"] == "greedy" and summary["exported"] == {"uri": "file:///e"}


# --- preflight -------------------------------------------------------------------------------------------------------


def test_the_soup_choice_of_the_form_overrides_the_recipe():
    assert preflight.resolve(str(TINY), [], "average").soup.choose == "average"
    assert preflight.resolve(str(TINY), ["soup.choose=best"], "recipe").soup.choose == "best"
    with pytest.raises(RecipeError, match=r"soup\.choose"):
        preflight.resolve(str(TINY), [], "worst")


def test_stages_in_another_order_are_refused():
    recipe = load(TINY)
    turned = {name: recipe.stages[name] for name in ("align", "ocr", "sft")}
    with pytest.raises(RecipeError, match=r"order \['ocr', 'align', 'sft'\]"):
        pipeline_needs.suits(recipe.model_copy(update={"stages": turned}), "points")
    more = {**recipe.stages, "rlhf": recipe.stages["sft"]}
    with pytest.raises(RecipeError, match=r"also has .*rlhf"):
        pipeline_needs.suits(recipe.model_copy(update={"stages": more}), "points")
    curation = recipe.curation.model_copy(update={"dataset": "seed"})
    with pytest.raises(RecipeError, match=r"curation\.dataset.*'web'.*'seed'"):
        pipeline_needs.suits(recipe.model_copy(update={"curation": curation}), "points")


def local_tables(ctx: Context, tmp_path: Path) -> None:
    """Tables of one row each, where the recipe names them."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    row = pa.table({"url": ["http://127.0.0.1/a.png"], "text": ["a"], "conversations": ["[]"]})
    for spec in ctx.recipe.data.values():
        for source in spec.sources.values():
            path = tmp_path / source.table.rsplit("/", 1)[1]
            (pa.csv.write_csv if path.suffix == ".csv" else pa.parquet.write_table)(row, path)
    for benchmark in ctx.recipe.evaluation.benchmarks.values():
        answer = {"reading": "7", "multiple_choice": "A", "yes_no": "Yes"}[benchmark.kind]
        question = {"index": 1, "question": "What?", "A": "a", "B": "b", "answer": answer}
        write_table(tmp_path / benchmark.table.rsplit("/", 1)[1], [question])
    text = TINY.read_text().replace("http://127.0.0.1:8765/tables", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(text.replace("http://127.0.0.1:8765/benchmarks", str(tmp_path)))
    ctx.recipe = load(tmp_path / "recipe.yaml")


def test_preflight_passes_and_names_what_is_missing(ctx, tmp_path, monkeypatch):
    local_tables(ctx, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    assert len(preflight.check(ctx)) >= 4
    (tmp_path / "web.parquet").unlink()
    with pytest.raises(DataError, match=r"data\.web\.sources\.web\.table: there is no table at .*web\.parquet"):
        preflight.check(ctx)


def test_preflight_reads_columns_and_benchmark_rows(ctx, tmp_path, monkeypatch):
    """What would fail after hours of training is said in the first seconds."""
    local_tables(ctx, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    good = (tmp_path / "digits.tsv").read_bytes()
    (tmp_path / "digits.tsv").write_bytes(good + b"2\tWhat?\t\t\t\n")
    with pytest.raises(
        DataError, match=r"evaluation\.benchmarks\.digits\.table: .*digits\.tsv: row 2, column answer: empty"
    ):
        preflight.check(ctx)
    (tmp_path / "digits.tsv").write_bytes(good)
    (tmp_path / "sft-pairs.csv").write_text("url,turns\na,b\n")
    expected = r"table .*sft-pairs\.csv has no column 'conversations'; it has \['url', 'turns'\]. Set data\.sft\.sources\.pairs\."
    with pytest.raises(DataError, match=expected):
        preflight.check(ctx)


def test_preflight_refuses_a_source_without_rows(ctx, tmp_path, monkeypatch):
    """Beside other sources it would add nothing, and nobody would notice."""
    local_tables(ctx, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    for text in ("url,conversations\n", ""):
        (tmp_path / "sft-pairs.csv").write_text(text)
        with pytest.raises(
            DataError, match=r"data\.sft\.sources\.pairs\.table: .*sft-pairs\.csv has 0 rows.*take 'pairs' out"
        ):
            preflight.check(ctx)


def test_preflight_names_the_field_of_an_address_that_no_store_stands_behind(ctx, tmp_path, monkeypatch):
    local_tables(ctx, tmp_path)
    for name in ("VLMFLOW_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    source = ctx.recipe.data["sft"].sources["pairs"]
    ctx.recipe.data["sft"].sources["pairs"] = source.model_copy(update={"table": "s3://bucket/mine.csv"})
    with pytest.raises(
        StorageError, match=r"data\.sft\.sources\.pairs\.table: s3://bucket/mine\.csv: s3:// needs the env"
    ):
        preflight.check(ctx)


def test_preflight_refuses_a_misspelt_size_of_the_model(ctx, tmp_path, monkeypatch):
    local_tables(ctx, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    ctx.recipe.model.vision.config["num_hidden_layer"] = 9
    with pytest.raises(
        ModelError, match=r"model\.vision\.config\.num_hidden_layer: .* did you mean 'num_hidden_layers'"
    ):
        preflight.check(ctx)


def test_preflight_without_mlflow(ctx, tmp_path, monkeypatch):
    local_tables(ctx, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ServiceError, match="MLFLOW_TRACKING_URI is not set"):
        preflight.check(ctx)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(ServiceError, match=r"does not answer at http://127.0.0.1:1/health"):
        preflight.check(ctx)


def test_preflight_with_a_dead_table_server(ctx, monkeypatch):
    with pytest.raises(
        ServiceError, match=r"data\.seed\.sources\.captions\.table: no server answers at http://127.0.0.1:1/x"
    ):
        preflight._size("data.seed.sources.captions.table", "http://127.0.0.1:1/x", frozenset({"127.0.0.1"}))


def test_preflight_does_not_reach_into_the_network_it_runs_in(ctx):
    """A recipe names addresses; the metadata service of a cloud is not one of them."""
    allow = frozenset({"127.0.0.1"})
    with pytest.raises(DataError, match=r"169\.254\.169\.254.*private network.*pull\.allow_hosts"):
        preflight._size("evaluation.benchmarks.x.table", "http://169.254.169.254/latest/x.tsv", allow)
    with pytest.raises(DataError, match=r"host 'example\.com' is not in pull\.allow_hosts"):  # as the pull would say
        preflight._size("data.web.sources.web.table", "http://example.com/x.csv", allow)


def test_preflight_shows_no_credentials(ctx, monkeypatch):
    monkeypatch.setattr(preflight, "_answers", lambda url, _: None)
    monkeypatch.setattr(preflight, "_alive", lambda url, _: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@mlflow:5000")
    monkeypatch.setenv("VLMFLOW_CAPTION_URL", "http://host/v1?key=secret")
    caption = ctx.recipe.curation.caption.model_copy(update={"engine": "openai", "model_name": "m"})
    curation = ctx.recipe.curation.model_copy(update={"caption": caption})
    ctx.recipe = ctx.recipe.model_copy(update={"curation": curation})
    rows = [*preflight._mlflow(ctx), *preflight._services(ctx)]
    assert len(rows) == 2 and "secret" not in str(rows) and "http://mlflow:5000" in str(rows)


def test_preflight_with_a_full_scratch_disk(ctx, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**20))
    with pytest.raises(ServiceError, match=r"1 MiB free.*256 MiB"):
        preflight._scratch(ctx)


def test_preflight_with_an_endpoint_that_is_not_configured(ctx, monkeypatch):
    caption = ctx.recipe.curation.caption.model_copy(update={"engine": "openai"})
    curation = ctx.recipe.curation.model_copy(update={"caption": caption})
    ctx.recipe = ctx.recipe.model_copy(update={"curation": curation})
    monkeypatch.delenv("VLMFLOW_CAPTION_URL", raising=False)
    with pytest.raises(ServiceError, match="VLMFLOW_CAPTION_URL is not set"):
        preflight._services(ctx)
    monkeypatch.setenv("VLMFLOW_CAPTION_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(
        ServiceError, match=r"curation\.caption: the server that VLMFLOW_CAPTION_URL names does not answer"
    ) as error:
        preflight._services(ctx)
    assert "127.0.0.1" not in str(error.value)
    monkeypatch.setenv("VLMFLOW_CAPTION_URL", "http://me:hunter2@127.0.0.1:1/v1")
    with pytest.raises(ServiceError, match="does not answer") as error:
        preflight._services(ctx)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("missing", ["QA_URL", "MEND_URL", "JUDGE_URL"])
def test_preflight_knows_the_servers_of_every_step(ctx, monkeypatch, missing):
    from vlmflow.recipe.curation import CurationSpec

    sections = {
        "docqa": {"model_name": "m", "endpoint_env": "QA_URL"},
        "describe": {"engine": "model", "repair_model_name": "m", "repair_endpoint_env": "MEND_URL"},
        "judge": {"model_name": "m", "endpoint_env": "JUDGE_URL"},
    }
    curation = CurationSpec.model_validate(ctx.recipe.curation.model_dump() | sections)
    ctx.recipe = ctx.recipe.model_copy(update={"curation": curation})
    monkeypatch.setattr(preflight, "_alive", lambda url, _: None)
    for name in ("QA_URL", "MEND_URL", "JUDGE_URL"):
        monkeypatch.setenv(name, "http://host/v1")
    assert len(preflight._services(ctx)) == 3
    monkeypatch.delenv(missing)
    with pytest.raises(ServiceError, match=f"{missing} is not set"):
        preflight._services(ctx)
