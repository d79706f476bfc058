"""The POINTS recipe as one pipeline: from tables of URLs to a registered and exported model.

Order of POINTS sections 2 and 3: pull; a model P that can caption and score (`bootstrap`); OCR, caption, fuse,
build, clean, perplexity, dedup and keep on the web data; stage 1 (OCR encoder), stage 2 (alignment), stage 3 once a soup candidate; soups;
evaluation of every model on the report split; registry, export, report. The same pipeline runs on a laptop
(`vlmflow run`) and on a cluster. Machine sizes and accelerators are the platform's configuration, not the pipeline's.
"""

from kfp import dsl

from components.export import export
from components.initial import initial
from components.preflight import preflight
from components.register import register
from components.report import report
from pipelines import parts
from pipelines.platform import once, repeatable

# Allowed values of pipeline parameters: the Kubeflow UI shows them as menus (the compiler writes them into the package).
LITERALS = {"soup_choice": ["recipe", "greedy", "maximum", "average", "best"]}


@dsl.pipeline(name="vlmflow-points", display_name="POINTS: from URLs to a registered vision-language model")
def points(recipe: str, overrides: list = [], soup_choice: str = "recipe", evaluators: int = 8, shard_groups: int = 8):  # noqa: B006
    """Train a vision-language model by the POINTS recipe.

    Args:
        recipe: Recipe (YAML or JSON), as a path in the image or a URI in the object store, such as s3://bucket/recipe.yaml.
        overrides: Changes to the recipe, each `section.key=value`, such as ["seed=7", "curation.keep.fraction=0.3"].
        soup_choice: Which soup is registered and exported; `recipe` keeps what the recipe says.
        evaluators: Number of tasks that the models are dealt to for evaluation.
        shard_groups: Number of groups that the shards of the web data are dealt to; each is pulled and curated by tasks of its own.
    """
    with parts.finished():
        checked = once(preflight(source=recipe, overrides=overrides, pipeline="points", soup_choice=soup_choice))
        resolved = checked.outputs["recipe"]
        raw = parts.datasets(resolved, shard_groups=shard_groups)

        untrained = repeatable(initial(recipe=resolved, **raw)).outputs["model"]
        model_p = parts.stage(resolved, "bootstrap", untrained, raw)
        data = {**raw, "web": parts.curated(resolved, raw, model_p, shard_groups)}

        stage1 = parts.stage(resolved, "ocr", model_p, data)
        stage2 = parts.stage(resolved, "align", stage1, data)
        trained = parts.candidates(resolved, stage2, data, "sft")
        soups, table = parts.souped(resolved, trained, untrained, evaluators, bootstrap=model_p)

        final = {"recipe": resolved, "soup": soups.outputs["result"], **data}
        chosen = soups.outputs["model"]
        version = once(register(model=chosen, untrained=untrained, scores=table(), **final))
        directory = once(export(model=chosen, scores=table(), **final))
        once(
            report(
                untrained=untrained,
                bootstrap=model_p,
                ocr=stage1,
                align=stage2,
                candidates=trained(),
                registered=version.outputs["registered"],
                exported=directory.outputs["exported"],
                scores=table(),
                **final,
            )
        )
