"""The smaller pipelines in a row, as a team uses them: curate, train two stages, soup, promote; with secrets planted.

Each is really run by kfp.local with an object store and an MLflow server; what one leaves behind the next is given by its
address. Trainings are a few steps: what counts is that the pieces fit, and that no secret is left anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from test_secrets import PLANTED, leaks

from vlmflow import compiler, demo, local, local_stack, recipe, storage
from vlmflow.dataset import manifest
from vlmflow.estimate import Estimate
from vlmflow.models.store import load_ref
from vlmflow.registry import address, dossier, tracking

RECIPE = "recipes/points-tiny.yaml"
SIZES = demo.Sizes(
    seed=48, texts=16, web=60, base=48, charts=12, pairs=12, describe=12, digits=16, words=12, mcq=8, yesno=8
)
SMALL = [
    "bootstrap.max_steps=6",
    *(f"stages.{stage}.max_steps=2" for stage in ("ocr", "align", "sft")),
    *(f"stages.{stage}.processes=1" for stage in ("ocr", "align")),
    "bootstrap.processes=1",
    "pull.samples_per_shard=30",
    # so short a training describes badly and learns nothing; here it only must arrive
    *(f"curation.{step}.failure_limit=1" for step in ("caption", "fuse", "perplexity")),
    "curation.fuse.fallback=alt",
    "curation.dedup.against=[sft]",
    "soup.candidates={charts: [{dataset: sft, sources: [charts], text: conversations}], pairs: [{dataset: sft, sources: [pairs], text: conversations}]}",
    "registry.gates={beats_untrained: false}",
]


class Runs:
    """Pipelines run one after the other in one state folder."""

    def __init__(self, state: Path, root: str, overrides: list[str]) -> None:
        self.state, self.root = state, root
        self.recipe = state / "recipe.yaml"
        self.recipe.write_text(recipe.dump(recipe.load(RECIPE, overrides)), encoding="utf-8")

    def run(self, pipeline: str, **arguments: Any) -> Path:
        """Folder of a finished run; its artifacts lie in `artifacts`."""
        folder = self.state / "runs" / f"{len(list((self.state / 'runs').glob('*')))}-{pipeline}"
        given = arguments if pipeline == "promote" else {"recipe": str(self.recipe), **arguments}
        local.execute(compiler.compile_pipeline(pipeline).text, given, folder, Estimate([]))
        ended = storage.read_json(f"{self.root}/runs/{folder.name}/end.json")
        assert ended["state"] == "SUCCEEDED"
        return folder

    def manifest(self, folder: Path, step: str) -> str:
        """URI of the dataset that a step sealed last."""
        made = [manifest.load(str(path)) for path in (folder / "artifacts").rglob(f"{step}/data")]
        whole = max(made, key=lambda each: len(each.layers))
        return f"{self.root}/manifests/{whole.digest}.json"

    def model(self, folder: Path, stage: str) -> str:
        """URI of the model that a stage trained."""
        made = [load_ref(str(path)) for path in (folder / "artifacts").rglob("model") if path.is_file()]
        (uri,) = {ref.uri for ref in made if ref.lineage.stage == stage}
        return uri


@pytest.mark.slow
def test_from_tables_to_a_champion_without_a_trace_of_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    for name, value in PLANTED.items():
        if name != "MLFLOW_TRACKING_PASSWORD":  # this server asks for none, and would refuse one
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    state = tmp_path / "state"
    with demo.serve(tmp_path / "site", SIZES, port=0) as site, local.stack(state, None) as root:
        try:
            monkeypatch.setenv("VLMFLOW_SCRATCH", str(state / "scratch"))
            (state / "runs").mkdir(exist_ok=True)
            plain = recipe.load(RECIPE).model_dump(mode="json")
            runs = Runs(state, root, [*site.overrides(demo.fields(plain)), *SMALL])

            curated = runs.run("curate", shard_groups=2)
            web = runs.manifest(curated, "keep")
            assert {"ocr", "synthetic", "fused", "ppl", "keep"} <= set(manifest.load(web).layers)
            assert set(manifest.load(web).layer("dedup").params["against"]) == {"sft"}
            start = runs.model(curated, "bootstrap")
            ocr = runs.run("train", stage="ocr", model=start, web=web)
            align = runs.run("train", stage="align", model=runs.model(ocr, "ocr"), web=web)
            checkpoint = runs.model(align, "align")
            assert load_ref(f"{checkpoint}/model.json").lineage.parents == [
                load_ref(f"{runs.model(ocr, 'ocr')}/model.json").weights_sha256
            ]
            runs.run("soup", checkpoint=checkpoint, web=web, soup_choice="average", evaluators=1)
            runs.run("promote", model="points-tiny")

            champion = address.find("models:/points-tiny@champion")
            mlflow = tracking.client()
            version = mlflow.get_model_version_by_alias("points-tiny", "champion")
            brings = dossier.read(mlflow, mlflow.get_model_version("points-tiny-candidates", "1").run_id, "1")
            assert brings.contamination.keys() == {"digits", "words", "choice", "yesno"}, "all data was compared"
            assert champion.lineage.step == "soup" and version.version == "1"
            secrets = [value.encode() for value in [*PLANTED.values(), os.environ["AWS_SECRET_ACCESS_KEY"]]]
        finally:
            local_stack.down(state)
    said = capfd.readouterr()
    assert not any(secret.decode() in said.out + said.err for secret in secrets)
    assert leaks(tmp_path, secrets) == [], "runs, logs, artifacts, the store, MLflow's database, scratch"
