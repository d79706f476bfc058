"""Recipe sections ``data`` and ``pull``: where samples come from and how their images are fetched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlmflow.recipe.base import Name, Section, Share


class PreferenceColumns(Section):
    """Columns of a table that keeps a pair's three parts apart, as RLAIF-V and TRL's datasets do."""

    prompt: str = Field("prompt", description="column with the question: plain words, or turns")
    chosen: str = Field("chosen", description="column with the better answer")
    rejected: str = Field("rejected", description="column with the worse answer")


class SourceSpec(Section):
    """Samples of one origin: a table of image URLs or image bytes with alt text, conversations or preferences; or
    WebDataset tars that exist already and are adopted where they lie."""

    table: str | None = Field(
        None,
        description="URI of a .parquet, .csv, .tsv, .jsonl, .ndjson or .json table (file, s3, http of an allowed host), or of a "
        "folder (URI that ends in /, or in a pattern such as train-*.parquet) whose Parquet files together are the table, as "
        "Hugging Face datasets lie",
    )
    shards: list[str] | None = Field(
        None,
        min_length=1,
        description="URIs of existing WebDataset tars instead of a table, with {00000..00099} ranges; never copied nor changed",
    )
    image_root: str | None = Field(
        None,
        description="folder in the store under which the url column's paths or URIs lie; nothing is fetched over HTTP then",
    )
    image_column: str | None = Field(
        None,
        description="column with the images themselves: bytes, or {bytes, path} as Hugging Face writes them, or lists of these",
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

    @model_validator(mode="after")
    def _one_origin(self) -> SourceSpec:
        if (self.table is None) == (self.shards is None):
            raise ValueError("name either a table or shards, not both and not neither")
        if self.shards and (self.image_root or self.image_column):
            raise ValueError("shards hold their images; remove image_root and image_column")
        if self.image_root and self.image_column:
            raise ValueError(
                "image_root and image_column contradict each other: images lie in the store or in the table"
            )
        return self


class ResizeSpec(Section):
    """What becomes of large images. Without it, original bytes are kept: re-encoding costs twenty times as much."""

    side: int = Field(ge=16, description="pixels")
    measure: Literal["longest", "shortest"] = Field("longest", description="which side is brought down to `side`")
    format: Literal["jpg", "webp", "png"] = Field(
        "jpg", description="format of resized images; smaller ones stay as they are"
    )
    quality: int = Field(92, ge=1, le=100, description="of jpg and webp")


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
    first_byte_timeout: float = Field(10.0, gt=0, description="seconds from the request to the head of its answer")
    min_rate: int = Field(
        1024, ge=0, description="bytes per second below which a body is given up, after 5 seconds of it; 0 = no limit"
    )
    per_host: int = Field(
        16, ge=1, le=4096, description="open requests to one host at a time; not part of a shard's name"
    )
    robots_txt: bool = Field(
        False, description="also ask each host's robots.txt (cached); X-Robots-Tag is always honoured"
    )
    proof: Literal["decode", "structure"] = Field(
        "decode",
        description="how a picture is proved whole: decode it once at small scale, or walk its structure from the header to the "
        "end mark, which is several times cheaper for JPEG",
    )
    resize: ResizeSpec | None = Field(None, description="shrink large images; None = keep the original bytes")
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
