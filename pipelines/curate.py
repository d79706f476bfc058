"""Curation alone: tables of URLs become datasets with OCR, captions, built samples, checks, perplexity and a selection.

The web dataset is worked on in groups of shards at a time, on as many nodes as there are; the manifest is the same
whatever their number. Pipelines that run the same recipe afterwards, `points` among them, find every layer again.
"""

from kfp import dsl

from components.initial import initial
from components.preflight import preflight
from pipelines import parts
from pipelines.platform import once


@dsl.pipeline(name="vlmflow-curate", display_name="Curation: from URLs to selected captions")
def curate(recipe: str, overrides: list = [], model: str = "", shard_groups: int = 8):  # noqa: B006
    """Pull the recipe's datasets and curate the web data: OCR, caption, fuse, build, clean, perplexity, dedup, keep.

    Args:
        recipe: Recipe (YAML or JSON), as a path in the image or a URI in the object store, such as s3://bucket/recipe.yaml.
        overrides: Changes to the recipe, each `section.key=value`, such as ["curation.keep.fraction=0.3"].
        model: Model that captions and scores: URI of its folder, or a registered version such as models:/NAME@champion.
            Empty trains one by the recipe's bootstrap section.
        shard_groups: Number of groups that the shards are dealt to; each is pulled and curated by tasks of its own.
    """
    with parts.finished():
        checked = once(preflight(source=recipe, overrides=overrides, pipeline="curate", scorer=model))
        resolved = checked.outputs["recipe"]
        raw = parts.datasets(resolved, shard_groups=shard_groups)
        # `once`, because the model that a registered version's alias names changes
        start = once(initial(recipe=resolved, given=model, **raw)).outputs["model"]
        model_p = parts.stage(resolved, "bootstrap", start, raw)
        parts.curated(resolved, raw, model_p, shard_groups)
