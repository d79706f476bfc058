"""The POINTS recipe as one pipeline: from tables of URLs to a registered and exported model.

Order of POINTS sections 2 and 3: pull; a model P that can caption and score (`bootstrap`); OCR, caption, fuse,
perplexity and keep on the web data; stage 1 (OCR encoder), stage 2 (alignment), stage 3 once a soup candidate; soups;
evaluation of every model on the report split; registry, export, report. The same pipeline runs on a laptop
(`vlmflow run`) and on a cluster. Machine sizes and accelerators are the platform's configuration, not the pipeline's.
"""

from functools import partial

from kfp import dsl

from components.caption import caption
from components.evaluate import evaluate
from components.export import export
from components.fuse import fuse
from components.initial import initial
from components.keep import keep
from components.lineup import lineup
from components.ocr import ocr
from components.perplexity import perplexity
from components.plan import plan
from components.preflight import preflight
from components.pull import pull
from components.register import register
from components.report import report
from components.soup import soup
from components.train import train
from pipelines.platform import once, repeatable

# Allowed values of pipeline parameters: the Kubeflow UI shows them as menus (the compiler writes them into the package).
LITERALS = {"soup_choice": ["recipe", "greedy", "maximum", "average", "best"]}


@dsl.pipeline(name="points", display_name="POINTS: from URLs to a registered vision-language model")
def points(recipe: str, overrides: list = [], soup_choice: str = "recipe", evaluators: int = 8):  # noqa: B006
    """Train a vision-language model by the POINTS recipe.

    Args:
        recipe: Recipe (YAML or JSON), as a path in the image or a URI in the object store, such as s3://bucket/recipe.yaml.
        overrides: Changes to the recipe, each `section.key=value`, such as ["seed=7", "curation.keep.fraction=0.3"].
        soup_choice: Which soup is registered and exported; `recipe` keeps what the recipe says.
        evaluators: Number of tasks that the models are dealt to for evaluation.
    """
    checked = once(preflight(source=recipe, overrides=overrides, soup_choice=soup_choice))
    resolved = checked.outputs["recipe"]

    seed = repeatable(pull(recipe=resolved, dataset="seed")).set_display_name("pull seed")
    web = repeatable(pull(recipe=resolved, dataset="web")).set_display_name("pull web")
    sft = repeatable(pull(recipe=resolved, dataset="sft")).set_display_name("pull sft")
    raw = {"seed": seed.outputs["data"], "web": web.outputs["data"], "sft": sft.outputs["data"]}

    untrained = repeatable(initial(recipe=resolved, **raw))
    model_p = repeatable(train(recipe=resolved, init=untrained.outputs["model"], stage="bootstrap", **raw))
    model_p.set_display_name("train bootstrap")

    read = repeatable(ocr(recipe=resolved, dataset=raw["web"]))
    captioned = repeatable(caption(recipe=resolved, dataset=read.outputs["data"], model=model_p.outputs["model"]))
    fused = repeatable(fuse(recipe=resolved, dataset=captioned.outputs["data"]))
    scored = repeatable(perplexity(recipe=resolved, dataset=fused.outputs["data"], model=model_p.outputs["model"]))
    kept = repeatable(keep(recipe=resolved, dataset=scored.outputs["data"]))
    data = {**raw, "web": kept.outputs["data"]}

    stage1 = repeatable(train(recipe=resolved, init=model_p.outputs["model"], stage="ocr", **data))
    stage1.set_display_name("train ocr")
    stage2 = repeatable(train(recipe=resolved, init=stage1.outputs["model"], stage="align", **data))
    stage2.set_display_name("train align")

    candidates = repeatable(plan(recipe=resolved))
    with dsl.ParallelFor(candidates.output) as name:
        stage3 = repeatable(train(recipe=resolved, init=stage2.outputs["model"], stage="sft", candidate=name, **data))
        stage3.set_display_name("train sft")
    # One dsl.Collected a consumer: the kfp compiler rewrites the object when it resolves it, so it cannot be shared.
    trained = partial(dsl.Collected, stage3.outputs["model"])
    soups = repeatable(soup(recipe=resolved, candidates=trained()))

    groups = repeatable(
        lineup(
            recipe=resolved,
            untrained=untrained.outputs["model"],
            bootstrap=model_p.outputs["model"],
            candidates=trained(),
            soup=soups.outputs["result"],
            evaluators=evaluators,
        )
    )
    with dsl.ParallelFor(groups.output) as group:
        scores = once(evaluate(recipe=resolved, group=group))
    table = partial(dsl.Collected, scores.outputs["scores"])

    final = {"soup": soups.outputs["result"], **data}
    chosen = soups.outputs["model"]
    version = once(
        register(recipe=resolved, model=chosen, untrained=untrained.outputs["model"], scores=table(), **final)
    )
    directory = once(export(recipe=resolved, model=chosen, scores=table(), **final))
    once(
        report(
            recipe=resolved,
            untrained=untrained.outputs["model"],
            bootstrap=model_p.outputs["model"],
            ocr=stage1.outputs["model"],
            align=stage2.outputs["model"],
            candidates=trained(),
            registered=version.outputs["registered"],
            exported=directory.outputs["exported"],
            scores=table(),
            **final,
        )
    )
