"""Recipe sections ``data``, ``pull`` and ``curation``: where samples come from and what is done to them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlmflow.recipe.base import Name, Section, Share

Engine = Literal["model", "openai"]


class PreferenceColumns(Section):
    """Columns of a table that keeps a pair's three parts apart, as RLAIF-V and TRL's datasets do."""

    prompt: str = Field("prompt", description="column with the question: plain words, or turns")
    chosen: str = Field("chosen", description="column with the better answer")
    rejected: str = Field("rejected", description="column with the worse answer")


class SourceSpec(Section):
    """One table of samples: image URLs with alt text, conversations or preferences."""

    table: str = Field(
        description="URI of a .parquet, .csv, .tsv, .jsonl, .ndjson or .json table (file, s3, http of an allowed host)"
    )
    url_column: str | None = Field(
        "url", description="column with the image URL (text-only rows leave it empty); None = no images"
    )
    text_column: str | None = Field("text", description="column with the alt text; None = no alt text")
    conversations_column: str | None = Field(
        None, description="column with conversations (LLaVA turns or OpenAI messages, JSON)"
    )
    preferences_column: str | PreferenceColumns | None = Field(
        None,
        description="column with pairs of answers ({conversations, chosen, rejected} or a list of them, JSON), or the three "
        "columns {prompt, chosen, rejected}",
    )
    id_column: str | None = Field(
        None, description="column with a sample id; None = the sample key (source and row number)"
    )
    licence: str | None = Field(None, description="licence of the images and texts, if known")


class DatasetSpec(Section):
    """A dataset: one or more sources pulled into one manifest."""

    sources: dict[Name, SourceSpec] = Field(min_length=1, description="tables by source name")


class PullSpec(Section):
    """Fetching images over HTTP into shards."""

    concurrency: int = Field(64, ge=1, le=4096, description="open requests at a time; not part of a shard's name")
    connect_timeout: float = Field(5.0, gt=0, description="seconds for one connection")
    timeout: float = Field(
        20.0, gt=0, description="seconds on the network for one URL, redirects and retries together; pauses not counted"
    )
    retries: int = Field(
        2, ge=0, le=10, description="further tries after 429, 500, 502, 503, 504 or a broken connection"
    )
    max_redirects: int = Field(
        5, ge=0, le=20, description="redirects followed; the address guard is applied at every hop"
    )
    max_bytes: int = Field(20_000_000, ge=1024, description="largest body in bytes")
    max_pixels: int = Field(50_000_000, ge=1, description="largest width x height, checked before decoding")
    samples_per_shard: int = Field(1000, ge=1, le=100_000, description="table rows that make one shard")
    allow_hosts: list[str] = Field(
        default_factory=list,
        description="hosts allowed although their address is private, and hosts that tables may be fetched from",
    )
    user_agent: str = Field(
        "vlmflow/0.1 (+image dataset puller; honours X-Robots-Tag)", description="User-Agent header of every request"
    )
    failure_limit: Share = Field(0.5, description="largest share of rows that may fail")


class OcrSpec(Section):
    """Layer `ocr`: text in images, the label of the OCR encoder's stage (POINTS 4.2)."""

    engine: Literal["rapidocr"] = Field(
        "rapidocr", description="rapidocr = PaddleOCR's PP-OCR models on ONNX Runtime (POINTS 4.2 used PaddleOCR)"
    )
    min_score: Share = Field(0.5, description="lines read with less confidence are dropped; POINTS does not state one")
    min_chars: int = Field(2, ge=1, description="lines of fewer characters (white space not counted) are dropped")
    limit_side: int = Field(
        960, ge=32, description="pixels of the long side above which detection works on a shrunk copy; never enlarges"
    )
    workers: int = Field(1, ge=1, description="processes, one thread each; not part of the layer's digest")
    failure_limit: Share = Field(0.05, description="largest share of samples with an image that cannot be read")


class CaptionSpec(Section):
    """Layer `synthetic`: brief captions by a vision-language model, POINTS' F(I) (POINTS 3.1, app. B)."""

    engine: Engine = Field("model", description="model = the bootstrap model; openai = an OpenAI-compatible endpoint")
    endpoint_env: str = Field(
        "VLMFLOW_CAPTION_URL", description="environment variable with the endpoint's base URL (engine openai)"
    )
    key_env: str = Field("VLMFLOW_CAPTION_KEY", description="environment variable with the API key (engine openai)")
    model_name: str | None = Field(None, description="model asked of the endpoint; required with engine openai")
    prompt: str = Field(
        "Give a brief description of the image in English.",
        description="instruction; POINTS app. B asks for a brief English description",
    )
    max_new_tokens: int = Field(80, ge=1, description="longest caption in tokens")
    batch: int = Field(64, ge=1, description="captions written at a time (engine model)")
    concurrency: int = Field(64, ge=1, description="open requests (engine openai)")
    failure_limit: Share = Field(
        0.02, description="largest share of samples without a caption; samples that an earlier step failed do not count"
    )


class FuseSpec(Section):
    """Layer `fused`: alt text and synthetic caption become one sentence, CapFusion's G(c, F(I)) (POINTS 3.1, app. B)."""

    engine: Literal["rules", "openai"] = Field(
        "rules", description="rules = embedded rule-based fuser, not a language model; openai = an endpoint"
    )
    endpoint_env: str = Field(
        "VLMFLOW_FUSE_URL", description="environment variable with the endpoint's base URL (engine openai)"
    )
    key_env: str = Field("VLMFLOW_FUSE_KEY", description="environment variable with the API key (engine openai)")
    model_name: str | None = Field(None, description="model asked of the endpoint; required with engine openai")
    max_new_tokens: int = Field(80, ge=1, description="longest fused caption in tokens (engine openai; CapsFusion: 80)")
    concurrency: int = Field(64, ge=1, description="open requests (engine openai)")
    fallback: Literal["drop", "alt"] = Field(
        "drop",
        description="what becomes of a sample whose fusion fails its checks (twice with openai): no text, or the alt text",
    )
    failure_limit: Share = Field(
        0.2,
        description="largest share of samples without a fused text; samples that an earlier step failed do not count",
    )


class PerplexitySpec(Section):
    """Layer `ppl`: perplexity of the text given its image, under the scorer P (POINTS eq. 3)."""

    text: Literal["fused", "alt", "synthetic", "ocr"] = Field("fused", description="which text is scored")
    prompt: str = Field(
        "please generate a caption for this image.",
        description="instruction before the text (of the released filtering script); not counted in the perplexity",
    )
    batch_tokens: int = Field(4096, ge=64, description="tokens scored in one pass; does not change the values")
    failure_limit: Share = Field(
        0.02, description="largest share of samples that cannot be scored; samples without the text do not count"
    )


class KeepSpec(Section):
    """Layer `keep`: which samples stay, exact over all shards (POINTS 3.1 keeps the lowest 20 %)."""

    fraction: Share = Field(0.2, gt=0, description="share of scored samples that is kept (POINTS: 0.2)")
    order: Literal["lowest", "highest", "random"] = Field(
        "lowest", description="which perplexities are kept; random = control of the same size"
    )
    threshold: float | None = Field(
        None,
        gt=0,
        description="a perplexity instead of a fraction: kept up to it (lowest) or from it on (highest); not with random",
    )
    drop_duplicate_texts: bool = Field(False, description="keep each text once (the first in rank)")


class CurationSpec(Section):
    """Steps over one dataset of image + alt text; None leaves curation out."""

    dataset: Name | None = Field(None, description="the dataset that is curated; None leaves curation out")
    scorer: str | None = Field(
        None,
        description="URI of a model folder in the store (with its model.json) that captions and scores; None = the bootstrap model",
    )
    ocr: OcrSpec = Field(default_factory=OcrSpec, description="text in images")
    caption: CaptionSpec = Field(default_factory=CaptionSpec, description="synthetic captions")
    fuse: FuseSpec = Field(default_factory=FuseSpec, description="alt text and synthetic caption merged")
    perplexity: PerplexitySpec = Field(default_factory=PerplexitySpec, description="perplexity of a text")
    keep: KeepSpec = Field(default_factory=KeepSpec, description="which samples stay")

    @model_validator(mode="after")
    def _endpoints_named(self) -> CurationSpec:
        for name, step in (("caption", self.caption), ("fuse", self.fuse)):
            if step.engine == "openai" and not step.model_name:
                raise ValueError(
                    f"curation.{name}.model_name is required with engine openai: the endpoint must be told which model"
                )
        return self
