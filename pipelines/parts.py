"""Stretches of pipeline that several pipelines share: each is a function that chains tasks and returns their outputs.

Called inside a `@dsl.pipeline` function. A dataset or model in these signatures is the output of a task.
"""

from functools import partial

from kfp import dsl

from components.build import build
from components.caption import caption
from components.clean import clean
from components.deal import deal
from components.dedup import dedup
from components.evaluate import evaluate
from components.finish import finish
from components.fuse import fuse
from components.groups import groups
from components.keep import keep
from components.lineup import lineup
from components.merge import merge
from components.ocr import ocr
from components.perplexity import perplexity
from components.plan import plan
from components.pull import pull
from components.soup import soup
from components.train import train
from pipelines.platform import once, repeatable


def finished():
    """Around all tasks of a run: however it ends, what it left on the cluster is deleted and its summary written."""
    return dsl.ExitHandler(once(finish()), name="run")


def datasets(resolved, seed="", web="", sft="", shard_groups=None, **of) -> dict:
    """The recipe's datasets by name: those given as manifest URIs, the others pulled (of=stage, candidate: as they need).

    With `shard_groups` the web data, by far the largest, are pulled by as many tasks: each fetches the shards of its group,
    then one finds them all and seals the manifest."""
    made = {}
    for name, uri in {"seed": seed, "web": web, "sft": sft}.items():
        ahead = {"parts": _pulled(resolved, name, shard_groups)} if shard_groups is not None and name == "web" else {}
        task = repeatable(pull(recipe=resolved, dataset=name, manifest=uri, **ahead, **of))
        made[name] = task.set_display_name(f"pull {name}").outputs["data"]
    return made


def _pulled(resolved, name, shard_groups):
    dealt = once(deal(recipe=resolved, dataset=name, count=shard_groups))  # by the tables as they are now
    with dsl.ParallelFor(dealt.output) as group:
        part = repeatable(pull(recipe=resolved, dataset=name, group=group)).set_display_name(f"pull {name}, a group")
    return dsl.Collected(part.outputs["data"])


def stage(resolved, name: str, init, data: dict):
    """A trained stage: the model."""
    made = repeatable(train(recipe=resolved, init=init, stage=name, **data)).set_display_name(f"train {name}")
    return made.outputs["model"]


def curated(resolved, raw, model, shard_groups):
    """OCR, captions, fusion, built samples, checks, perplexity, duplicates and selection. A chain of tasks for each group of
    shards computes the layers' parts; then the same steps find them and seal the manifest, and what compares samples with each
    other, duplicates and the selection, sees all shards at once. A step that the recipe leaves out hands the dataset on.

    Returns the dataset `web` of `raw` (by name); with the others it is compared for duplicates."""
    web, others = raw["web"], {name: data for name, data in raw.items() if name != "web"}
    dealt = repeatable(groups(recipe=resolved, dataset=web, count=shard_groups))
    with dsl.ParallelFor(dealt.output) as group:
        part = _layers(resolved, web, model, group)
    whole = repeatable(merge(recipe=resolved, dataset=web, parts=dsl.Collected(part)))
    scored = _layers(resolved, whole.outputs["data"], model)
    unique = repeatable(dedup(recipe=resolved, dataset=scored, **others))
    return repeatable(keep(recipe=resolved, dataset=unique.outputs["data"])).outputs["data"]


def _layers(resolved, data, model, group=None):
    with_model = (caption, build, perplexity)
    for step in (ocr, caption, fuse, build, clean, perplexity):
        given = {} if group is None else {"group": group}
        wanted = {"model": model} if step in with_model else {}
        made = repeatable(step(recipe=resolved, dataset=data, **wanted, **given))
        data = made.set_display_name(f"{step.name} of a group" if given else step.name).outputs["data"]
    return data


def candidates(resolved, init, data: dict, stage: str = "") -> partial:
    """The soup's stage trained once a candidate. Returns a function that gathers the models, for one consumer each: the kfp
    compiler rewrites a dsl.Collected when it resolves it, so one cannot be shared."""
    names = repeatable(plan(recipe=resolved))
    with dsl.ParallelFor(names.output) as name:
        trained = repeatable(train(recipe=resolved, init=init, stage=stage, candidate=name, **data))
        trained.set_display_name(f"train {stage or 'candidate'}")
    return partial(dsl.Collected, trained.outputs["model"])


def scored(resolved, dealt, split="report") -> partial:
    """Groups of models evaluated side by side. Returns a function that gathers the scores, for one consumer each."""
    with dsl.ParallelFor(dealt.output) as group:
        made = once(evaluate(recipe=resolved, group=group, split=split))
    return partial(dsl.Collected, made.outputs["scores"])


def souped(resolved, trained: partial, untrained, evaluators, **others) -> tuple:
    """Soups of the candidates, and every model's scores. Returns the soup task and a function that gathers the scores."""
    soups = repeatable(soup(recipe=resolved, candidates=trained()))
    dealt = repeatable(
        lineup(
            recipe=resolved, untrained=untrained, candidates=trained(), soup=soups.outputs["result"], evaluators=evaluators,
            **others,
        )
    )  # fmt: skip
    return soups, scored(resolved, dealt)
