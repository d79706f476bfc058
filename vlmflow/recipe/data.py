"""Recipe sections ``data``, ``pull`` and ``curation``: where samples come from and what is done to them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlmflow.recipe.base import Name, Section, Share

Engine = Literal["model", "openai"]


class SourceSpec(Section):
    """One table of samples: image URLs with alt text, or with conversations."""

    table: str = Field(description="URI of a .parquet, .csv or .jsonl table (file, s3, http of an allowed host)")
    url_column: str | None = Field(
        "url", description="column with the image URL (text-only rows leave it empty); None = no images"
    )
    text_column: str | None = Field("text", description="column with the alt text")
    conversations_column: str | None = Field(
        None, description="column with conversations (LLaVA turns or OpenAI messages, JSON)"
    )
    id_column: str | None = Field(None, description="column with a sample id; None = row number")
    licence: str | None = Field(None, description="licence of the images and texts, if known")


class DatasetSpec(Section):
    """A dataset: one or more sources pulled into one manifest."""

    sources: dict[Name, SourceSpec] = Field(min_length=1)


class PullSpec(Section):
    """Fetching images (data-eval-soup.md 1.5)."""

    concurrency: int = Field(64, ge=1, le=4096, description="open requests")
    connect_timeout: float = Field(5.0, gt=0, description="seconds to connect")
    timeout: float = Field(20.0, gt=0, description="seconds for one URL, redirects and retries of a slow body included")
    retries: int = Field(2, ge=0, le=10, description="further tries after 5xx, 429 or a broken connection")
    max_redirects: int = Field(5, ge=0, le=20)
    max_bytes: int = Field(20_000_000, ge=1024, description="largest body in bytes")
    max_pixels: int = Field(50_000_000, ge=1, description="largest width x height, checked before decoding")
    samples_per_shard: int = Field(1000, ge=1, le=100_000)
    allow_hosts: list[str] = Field(default_factory=list, description="hosts allowed although their address is private")
    user_agent: str = Field("vlmflow/0.1 (+image dataset puller; honours X-Robots-Tag)")
    failure_limit: Share = Field(0.5, description="largest share of rows that may fail")


class OcrSpec(Section):
    """Text in images (points.md 3.2; settings measured in data-eval-soup.md 3.2)."""

    engine: Literal["rapidocr"] = "rapidocr"
    min_score: Share = Field(0.5, description="lines read with less confidence are dropped")
    min_chars: int = Field(2, ge=1, description="lines shorter than this are dropped")
    limit_side: int = Field(960, ge=32, description="long side in pixels that detection works at")
    workers: int = Field(1, ge=1, description="processes, one thread each")
    failure_limit: Share = 0.05


class CaptionSpec(Section):
    """Synthetic captions: POINTS' F(I) (points.md 4.1)."""

    engine: Engine = Field("model", description="model = the bootstrap model; openai = an OpenAI-compatible endpoint")
    endpoint_env: str = Field("VLMFLOW_CAPTION_URL", description="environment variable with the endpoint's base URL")
    key_env: str = Field("VLMFLOW_CAPTION_KEY", description="environment variable with the API key")
    model_name: str | None = Field(None, description="model asked of the endpoint")
    prompt: str = Field("Give a brief description of the image in English.", description="instruction")
    max_new_tokens: int = Field(80, ge=1)
    batch: int = Field(64, ge=1)
    concurrency: int = Field(64, ge=1)
    failure_limit: Share = 0.02


class FuseSpec(Section):
    """CapFusion: alt text and synthetic caption become one sentence (points.md 4)."""

    engine: Literal["rules", "openai"] = Field(
        "rules", description="rules = embedded rule-based fuser, not a language model"
    )
    endpoint_env: str = "VLMFLOW_FUSE_URL"
    key_env: str = "VLMFLOW_FUSE_KEY"
    model_name: str | None = None
    max_new_tokens: int = Field(80, ge=1)
    concurrency: int = Field(64, ge=1)
    fallback: Literal["drop", "alt"] = Field(
        "drop", description="what becomes of a sample whose fusion fails its checks twice"
    )
    failure_limit: Share = 0.2


class PerplexitySpec(Section):
    """Perplexity of the caption under the scorer (points.md 5)."""

    text: Literal["fused", "alt", "synthetic", "ocr"] = Field("fused", description="which text is scored")
    prompt: str = Field("please generate a caption for this image.", description="instruction before the text")
    batch_tokens: int = Field(4096, ge=64, description="tokens scored in one pass")
    failure_limit: Share = 0.02


class KeepSpec(Section):
    """Which samples stay: exact, over all shards."""

    fraction: Share = Field(0.2, gt=0, description="share of scored samples that is kept")
    order: Literal["lowest", "highest", "random"] = Field("lowest", description="random = control of the same size")
    threshold: float | None = Field(None, gt=0, description="keep by this perplexity instead of by fraction")
    drop_duplicate_texts: bool = Field(False, description="keep each text once")


class CurationSpec(Section):
    """Steps over one dataset of image + alt text; None leaves curation out."""

    dataset: Name | None = Field(None, description="the dataset that is curated")
    ocr: OcrSpec = Field(default_factory=OcrSpec)
    caption: CaptionSpec = Field(default_factory=CaptionSpec)
    fuse: FuseSpec = Field(default_factory=FuseSpec)
    perplexity: PerplexitySpec = Field(default_factory=PerplexitySpec)
    keep: KeepSpec = Field(default_factory=KeepSpec)

    @model_validator(mode="after")
    def _endpoints_named(self) -> CurationSpec:
        for name, step in (("caption", self.caption), ("fuse", self.fuse)):
            if step.engine == "openai" and not step.model_name:
                raise ValueError(
                    f"curation.{name}.model_name is required with engine openai: the endpoint must be told which model"
                )
        return self
