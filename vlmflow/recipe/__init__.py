"""The recipe: one YAML that says which model, from which data, by which stages.

Everything a user types is checked here, before anything starts: unknown fields, wrong types and units, and
combinations that cannot work. Sections live in the modules beside; this file joins them.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from vlmflow.errors import RecipeError
from vlmflow.recipe.base import Name, Section
from vlmflow.recipe.curation import CurationSpec
from vlmflow.recipe.data import DatasetSpec, PullSpec
from vlmflow.recipe.mixture import CURATED_TEXTS, DataUse
from vlmflow.recipe.model import ModelSpec
from vlmflow.recipe.results import EvaluationSpec, ExportSpec, RegistrySpec, SoupSpec
from vlmflow.recipe.stage import StageSpec
from vlmflow.recipe.written import apply_overrides, expand_presets, read_yaml


class Recipe(Section):
    """A whole training run, from tables of URLs to an exported model."""

    version: Literal[1] = Field(1, description="version of the recipe format")
    name: Name = Field(description="name of the run and of the model it makes")
    description: str = Field("", description="one line for people")
    presets: dict[Name, list[str]] = Field(
        default_factory=dict, description="named lists of overrides, used as preset=NAME"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of every random choice")
    model: ModelSpec = Field(description="the parts of the model")
    data: dict[Name, DatasetSpec] = Field(min_length=1, description="datasets by name")
    pull: PullSpec = Field(default_factory=PullSpec, description="fetching images")
    curation: CurationSpec = Field(default_factory=CurationSpec, description="steps over one dataset")
    bootstrap: StageSpec | None = Field(
        None, description="first training of the model that captions and scores (POINTS' P)"
    )
    stages: dict[Name, StageSpec] = Field(min_length=1, description="training stages, in order")
    soup: SoupSpec | None = Field(None, description="candidates and how they are combined")
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec, description="benchmarks and splits")
    registry: RegistrySpec = Field(description="names in MLflow, and gates")
    export: ExportSpec = Field(default_factory=ExportSpec, description="the Hugging Face folder")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = [*self._dataset_problems(), *self._soup_problems(), *self._stage_problems(), *self._gate_problems()]
        problems += [*self._curation_problems(), *self._role_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def uses(self) -> list[tuple[str, StageSpec | None, DataUse]]:
        """Every place that names a dataset for training: (field path, stage, use)."""
        found: list[tuple[str, StageSpec | None, DataUse]] = []
        if self.bootstrap:
            found += [(f"bootstrap.data[{i}]", self.bootstrap, use) for i, use in enumerate(self.bootstrap.data)]
        for name, stage in self.stages.items():
            found += [(f"stages.{name}.data[{i}]", stage, use) for i, use in enumerate(stage.data)]
        if self.soup:
            stage_of = self.stages.get(self.soup.stage)
            for name, uses in self.soup.candidates.items():
                found += [(f"soup.candidates.{name}[{i}]", stage_of, use) for i, use in enumerate(uses)]
        return found

    def _dataset_problems(self) -> list[str]:
        problems = []
        named = [(field, use.dataset, use.sources) for field, _, use in self.uses()]
        named += (
            [(f"curation.{step}.dataset", self.curation.dataset, None) for step in ("*",)]
            if self.curation.dataset
            else []
        )
        named += [(f"model.tokenizer.train_on[{i}]", d, None) for i, d in enumerate(self.model.tokenizer.train_on)]
        for field, dataset, sources in named:
            if dataset not in self.data:
                problems.append(f"{field}: dataset '{dataset}' is not in data; defined are {sorted(self.data)}")
                continue
            known = self.data[dataset].sources
            for source in sources or []:
                if source not in known:
                    problems.append(f"{field}: dataset '{dataset}' has no source '{source}'; it has {sorted(known)}")
        for field, stage, use in self.uses():
            if field.startswith("soup.") and stage and (problem := stage.misfit(use)):
                problems.append(f"{field}.{problem}")
            if use.text in CURATED_TEXTS and use.dataset in self.data and use.dataset != self.curation.dataset:
                problems.append(
                    f"{field}: text '{use.text}' is made by curation, which works on dataset '{self.curation.dataset}', not on "
                    f"'{use.dataset}'"
                )
            if section := self.curation.missing_section(use.text):
                problems.append(
                    f"{field}: text '{use.text}' is made by the step of section {section}, which this recipe lacks"
                )
            if use.keep and use.dataset != self.curation.dataset:
                problems.append(
                    f"{field}: keep needs the perplexity filter, which runs on dataset '{self.curation.dataset}' only"
                )
        return problems

    def _curation_problems(self) -> list[str]:
        problems = []
        if self.curation.contamination and not self.evaluation.benchmarks:
            problems.append(
                "curation.contamination: compares with evaluation.benchmarks, but the recipe has none; name some or leave it out"
            )
        for i, name in enumerate(self.curation.dedup.against if self.curation.dedup else []):
            field = f"curation.dedup.against[{i}]"
            if name == self.curation.dataset:
                problems.append(
                    f"{field}: '{name}' is the dataset that is curated; its sources are always compared with each other, and against "
                    "itself every sample would be dropped. Remove it"
                )
            elif name not in self.data:
                problems.append(f"{field}: dataset '{name}' is not in data; defined are {sorted(self.data)}")
        known = sorted(self.data[self.curation.dataset].sources) if self.curation.dataset in self.data else []
        if strangers := sorted(set(self.curation.keep.quota) - set(known)):
            problems.append(
                f"curation.keep.quota: {strangers} are no sources of dataset '{self.curation.dataset}'; it has {known}"
            )
        return problems

    def _soup_problems(self) -> list[str]:
        if not self.soup:
            return []
        problems = []
        if self.soup.stage not in self.stages:
            problems.append(f"soup.stage: '{self.soup.stage}' is not a stage; stages are {list(self.stages)}")
        elif self.soup.stage != list(self.stages)[-1]:
            problems.append(f"soup.stage: '{self.soup.stage}' must be the last stage; the order is {list(self.stages)}")
        soups = {"greedy", "average", "maximum"} | {n for n in self.soup.candidates if n.startswith("soup-")}
        if taken := sorted(soups & set(self.soup.candidates)):
            problems.append(f"soup.candidates: {taken} name soups and cannot name candidates; choose other names")
        others = {"untrained", "bootstrap", "chance", "final", *self.stages}
        if taken := sorted(others & set(self.soup.candidates)):
            problems.append(
                f"soup.candidates: {taken} name other rows of the score table or stages, which they would replace; choose "
                "other names"
            )
        if self.soup.maximum > len(self.soup.candidates):
            problems.append(
                f"soup.maximum: {self.soup.maximum} models are asked for, but there are {len(self.soup.candidates)} candidates"
            )
        if not self.evaluation.benchmarks:
            problems.append("soup: greedy and maximum need scores, but evaluation.benchmarks is empty")
        return problems

    def _stage_problems(self) -> list[str]:
        problems = []
        for name, stage in [("bootstrap", self.bootstrap), *((f"stages.{n}", s) for n, s in self.stages.items())]:
            if stage and stage.packs % stage.processes:
                problems.append(
                    f"{name}.packs: {stage.packs} packs a step cannot be dealt to {stage.processes} processes evenly; "
                    f"use a multiple of {stage.processes}"
                )
        if self.curation.dataset and not (self.bootstrap or self.curation.scorer):
            problems.append(
                "curation.scorer: perplexity needs a model that has learned to see (a new projector is random), and the recipe has no "
                "bootstrap; name a model folder of the store, or add a bootstrap section"
            )
        if "bootstrap" in self.stages:
            problems.append("stages.bootstrap: this name is reserved for the section 'bootstrap'")
        return problems

    def _role_problems(self) -> list[str]:
        """A misspelt role would be noticed only when its stage begins, after everything before it."""
        from vlmflow.models import family

        known = family(self.model.family)
        roles, layered = sorted(known.roles), sorted(known.numbered)
        problems = []
        for name, stage in [("bootstrap", self.bootstrap), *((f"stages.{n}", s) for n, s in self.stages.items())]:
            for number, rule in enumerate(stage.train if stage else []):
                field = f"{name}.train[{number}]"
                if rule.modules.startswith("re:"):
                    continue
                if rule.modules not in roles:
                    problems.append(
                        f"{field}.modules: '{rule.modules}' is no role of family '{known.name}'{_close(rule.modules, roles)} Its roles "
                        f"are {roles}; 're:' and a regular expression names parameters"
                    )
                elif rule.last and rule.modules not in layered:
                    problems.append(
                        f"{field}.last: role '{rule.modules}' has no numbered layers, so its last {rule.last} mean nothing; roles "
                        f"with layers are {layered}"
                    )
            problems += [
                f"{name}.memory.recompute: '{role}' is no role with layers{_close(role, layered)} Those are {layered}"
                for role in (stage.memory.recompute if stage else [])
                if role not in layered
            ]
        return problems

    def _gate_problems(self) -> list[str]:
        """A gate on a benchmark that is not there would fail only after the whole training."""
        gates, known = self.registry.gates, sorted(self.evaluation.benchmarks)
        named = [("floors", gates.floors), ("times_chance", gates.times_chance)]
        return [
            f"registry.gates.{field}.{name}: there is no benchmark '{name}'; evaluation.benchmarks has {known}"
            for field, benchmarks in named
            for name in benchmarks
            if name not in self.evaluation.benchmarks
        ]


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Raises:
        RecipeError: listing every wrong field with what is allowed there.
    """
    import yaml

    from vlmflow import storage
    from vlmflow.errors import NotFound

    try:
        raw = read_yaml(storage.read_bytes(str(path)), str(path))
    except NotFound as error:
        raise RecipeError(
            f"there is no recipe at {path} ({error}); give the path or URI of a YAML file, e.g. recipes/points-tiny.yaml"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} {'is empty' if raw is None else f'holds a {type(raw).__name__}'}, not a recipe (a mapping with name, model, data, stages, ...)"
        )
    return parse(apply_overrides(raw, expand_presets(raw, overrides or [])), str(path))


def parse(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a plain dictionary. Raises RecipeError listing every problem at once."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(problem, raw)]
        raise RecipeError(f"{where}: {len(lines)} problem(s)\n" + "\n".join(f"  - {line}" for line in lines)) from None


def _explain(problem: Any, raw: dict[str, Any]) -> list[str]:
    location = [str(part) for part in problem["loc"]]
    field = ".".join(location) or "recipe"
    if problem["type"] == "extra_forbidden":
        siblings = list(_schema_at(location[:-1]).get("properties", {}))
        return [f"{field}: no such field{_close(location[-1], siblings)} Allowed here: {', '.join(sorted(siblings))}"]
    if problem["type"] == "missing":
        return [f"{field}: this field is required"]
    message = re.sub(r"^Value error, ", "", problem["msg"])
    if not location:
        return message.split("\n")
    value = problem.get("input")
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool | None) else ""
    meant = _schema_at(location).get("description", "").split("\n")[0]
    return [f"{field}: {message}{shown}" + (f"; the field is: {meant}" if meant else "")]


def _close(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: which known one was meant, if one is alike."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{found[0]}'?" if found else "."


def _schema_at(location: list[str]) -> dict[str, Any]:
    """What the schema says of the field or section at a path; empty where the schema has no such place."""
    schema = Recipe.model_json_schema()
    node: dict[str, Any] = schema

    def resolve(part: dict[str, Any]) -> dict[str, Any]:
        while True:
            options = [o for o in part.get("anyOf", []) if o.get("type") != "null"]
            if "$ref" in part:
                part = {**schema["$defs"][part["$ref"].rsplit("/", 1)[-1]], **_own(part)}
            elif options:
                part = {**options[0], **_own(part)}
            else:
                return part

    for name in location:
        node = resolve(node)
        keyed = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
        named = [section for section in keyed if isinstance(section, dict)]
        if name in node.get("properties", {}):
            node = node["properties"][name]
        elif name.isdigit() and "items" in node:
            node = node["items"]
        elif named:
            node = named[0]
        else:
            return {}
    return resolve(node)


def _own(part: dict[str, Any]) -> dict[str, Any]:
    """What a reference says beside the section that it refers to."""
    return {key: value for key, value in part.items() if key == "description"}


def dump(recipe: Recipe) -> str:
    """YAML of a resolved recipe, defaults included; ``load`` reads it back to an equal recipe."""
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
