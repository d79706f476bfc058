"""Recipe section ``curation``: what is done to one dataset of images and texts, layer by layer.

Steps that are None do nothing; each of the others adds one layer, and ``keep`` turns what the layers say into one decision a
sample, with its reason.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlmflow.recipe.base import Name, Section, Share

Engine = Literal["model", "openai"]
TextLayer = Literal["fused", "alt", "synthetic", "described", "ocr"]


class EndpointFields(Section):
    """Where a text or vision-language model answers, and what it costs. Addresses and keys come from the environment."""

    model_name: str | None = Field(None, description="model asked of the endpoint; required when one is asked")
    concurrency: int = Field(64, ge=1, le=4096, description="open requests")
    timeout: float = Field(
        300.0,
        gt=0,
        description="seconds after which an answer is given up and asked for again, the server's queue included",
    )
    lost_limit: Share = Field(
        0.02,
        description="largest share of a shard's requests that may stay unanswered by a server in trouble (timeouts, 5xx); above it "
        "the step stops and asks them again when it is run again",
    )
    price_in: float | None = Field(
        None, ge=0, description="price of a million prompt tokens, for the cost in the summary"
    )
    price_out: float | None = Field(None, ge=0, description="price of a million completion tokens")


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
    provider: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the models run; auto = CUDA when onnxruntime-gpu and a GPU are there"
    )
    timeout: float = Field(
        300.0,
        gt=0,
        description="seconds after which an image that is still being read is given up: its process is replaced, its row says so. "
        "Another value than the default makes a new layer, in which such images are tried again",
    )
    failure_limit: Share = Field(0.05, description="largest share of samples with an image that cannot be read")


class CaptionSpec(EndpointFields):
    """Layer `synthetic`: brief captions by a vision-language model, POINTS' F(I) (POINTS 3.1, app. B)."""

    engine: Engine = Field("model", description="model = the bootstrap model; openai = an OpenAI-compatible endpoint")
    endpoint_env: str = Field(
        "VLMFLOW_CAPTION_URL", description="environment variable with the endpoint's base URL (engine openai)"
    )
    key_env: str = Field("VLMFLOW_CAPTION_KEY", description="environment variable with the API key (engine openai)")
    prompt: str = Field(
        "Give a brief description of the image in English.",
        description="instruction; POINTS app. B asks for a brief English description",
    )
    max_new_tokens: int = Field(80, ge=1, description="longest caption in tokens")
    batch: int = Field(64, ge=1, description="captions written at a time (engine model)")
    failure_limit: Share = Field(
        0.02, description="largest share of samples without a caption; samples that an earlier step failed do not count"
    )


class FuseSpec(EndpointFields):
    """Layer `fused`: alt text and synthetic caption become one sentence, CapFusion's G(c, F(I)) (POINTS 3.1, app. B)."""

    engine: Literal["rules", "openai"] = Field(
        "rules", description="rules = embedded rule-based fuser, not a language model; openai = an endpoint"
    )
    endpoint_env: str = Field(
        "VLMFLOW_FUSE_URL", description="environment variable with the endpoint's base URL (engine openai)"
    )
    key_env: str = Field("VLMFLOW_FUSE_KEY", description="environment variable with the API key (engine openai)")
    max_new_tokens: int = Field(80, ge=1, description="longest fused caption in tokens (engine openai; CapsFusion: 80)")
    fallback: Literal["drop", "alt"] = Field(
        "drop",
        description="what becomes of a sample whose fusion fails its checks (twice with openai): no text, or the alt text",
    )
    failure_limit: Share = Field(
        0.2,
        description="largest share of samples without a fused text; samples that an earlier step failed do not count",
    )


class DescribeSpec(EndpointFields):
    """Layer `described`: long descriptions by MiniGPT-4's builder: describe, continue when short, repair, reject
    (spec/systems.md A.2)."""

    engine: Engine = Field("model", description="who describes: model = the scorer; openai = the caption endpoint")
    endpoint_env: str = Field("VLMFLOW_CAPTION_URL", description="environment variable with the describer's base URL")
    key_env: str = Field("VLMFLOW_CAPTION_KEY", description="environment variable with the describer's API key")
    prompt: str = Field("Describe this image in detail.", description="instruction")
    min_tokens: int = Field(
        80, ge=1, description="words and marks; shorter descriptions are asked to go on, then rejected (MiniGPT-4: 80)"
    )
    continuations: int = Field(2, ge=0, le=5, description="how often a short description is asked to go on")
    max_new_tokens: int = Field(300, ge=1, description="longest answer in tokens, each time")
    batch: int = Field(64, ge=1, description="descriptions written at a time (engine model)")
    repair: bool = Field(
        True, description="a text model removes repetition, garbage and unfinished sentences (the fusion endpoint)"
    )
    repair_endpoint_env: str = Field(
        "VLMFLOW_FUSE_URL", description="environment variable with the repairer's base URL"
    )
    repair_key_env: str = Field("VLMFLOW_FUSE_KEY", description="environment variable with the repairer's API key")
    repair_model_name: str | None = Field(None, description="model asked to repair; required with repair")
    repair_concurrency: int = Field(64, ge=1, le=4096, description="open requests to the repairer")
    repair_price_in: float | None = Field(None, ge=0, description="price of a million prompt tokens of the repairer")
    repair_price_out: float | None = Field(None, ge=0, description="price of a million completion tokens")
    failure_limit: Share = Field(
        0.5, description="largest share of samples without a description (rejected ones count)"
    )


class DocqaSpec(EndpointFields):
    """Layer `docqa`: questions and answers written from a page's OCR text, Docmatix's builder (spec/systems.md A.1)."""

    endpoint_env: str = Field("VLMFLOW_FUSE_URL", description="environment variable with the text model's base URL")
    key_env: str = Field("VLMFLOW_FUSE_KEY", description="environment variable with the API key")
    min_chars: int = Field(80, ge=1, description="pages with less OCR text get no questions (counted, no failure)")
    max_chars: int = Field(6000, ge=1, description="OCR text beyond this is cut at a line")
    pairs: int = Field(5, ge=1, le=50, description="question and answer pairs asked for a page")
    max_turn_chars: int = Field(500, ge=1, description="longer questions or answers are dropped (smollm: 500)")
    max_new_tokens: int = Field(1024, ge=1, description="longest reply in tokens")
    failure_limit: Share = Field(0.2, description="largest share of pages with text for which no pair is left")


class CleanSpec(Section):
    """Layers `phash` and `clean`: checks of each sample by itself; a failed check drops the sample with its reason."""

    text: TextLayer | None = Field(
        "fused",
        description="which text is checked (alt = conversations and preferences where a sample has them); None = images only",
    )
    min_side: int = Field(1, ge=1, description="pixels of the shorter side of every image")
    max_aspect: float = Field(30.0, ge=1, description="longer side over shorter side")
    min_words: int = Field(1, ge=0, description="words of the text (characters where a script has no spaces)")
    max_words: int = Field(2000, ge=1, description="words of the text, at least min_words")
    languages: list[str] = Field(
        default_factory=list,
        description="ISO 639-1 codes that may stay, e.g. [en, zh]; empty = all. Texts whose language cannot be told stay",
    )
    max_repetition: Share = Field(
        0.5, description="largest share of character 10-grams that occurred before in the text (data-juicer: 0.5)"
    )

    @model_validator(mode="after")
    def _some_length(self) -> CleanSpec:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}; no text fits")
        return self


class JudgeSpec(EndpointFields):
    """Layer `judge`: what a text model finds wrong with questions and answers (POINTS1.5, spec/points.md 8)."""

    endpoint_env: str = Field("VLMFLOW_FUSE_URL", description="environment variable with the text model's base URL")
    key_env: str = Field("VLMFLOW_FUSE_KEY", description="environment variable with the API key")
    text: TextLayer | Literal["conversations", "docqa"] = Field("conversations", description="what is judged")
    checks: list[Literal["needs_image", "grammar"]] = Field(
        default_factory=lambda: ["grammar"],  # type: ignore[arg-type]
        min_length=1,
        description="needs_image = questions answered rightly without the image; grammar = errors in the text. POINTS1.5 found "
        "dropping grammar errors better than mending them, and dropping text-like questions slightly worse",
    )
    drop: bool = Field(True, description="drop what a check finds; false = only label it")
    max_new_tokens: int = Field(100, ge=1, description="longest verdict in tokens")
    failure_limit: Share = Field(0.05, description="largest share of samples without a verdict")

    @model_validator(mode="after")
    def _questions(self) -> JudgeSpec:
        if "needs_image" in self.checks and self.text not in ("conversations", "docqa"):
            raise ValueError(f"checks: needs_image asks the questions of conversations or docqa; text is '{self.text}'")
        return self


class DedupSpec(Section):
    """Layer `dedup`: exact and near duplicates over all sources of the dataset; of duplicates the one with most pixels stays."""

    images: int | None = Field(
        6,
        ge=0,
        le=16,
        description="largest Hamming distance of 64-bit perceptual hashes; None = identical bytes only. Above 6 a million samples "
        "take several times as long",
    )
    text: TextLayer | None = Field(None, description="also one sample a wording of this text; None = images only")
    same_text: bool = Field(
        False,
        description="images count as duplicates only when the texts agree too; conversations and preferences always must",
    )
    against: list[Name] = Field(
        default_factory=list,
        description="other datasets of the recipe: a sample that repeats one of theirs is dropped. A sample without conversations "
        "or preferences goes for its pictures alone",
    )

    @model_validator(mode="after")
    def _each_once(self) -> DedupSpec:
        if len(set(self.against)) < len(self.against):
            raise ValueError(f"against: {self.against} names a dataset twice")
        return self


class ContaminationSpec(Section):
    """Layer `contamination`: samples that stand in a benchmark of the recipe, by image hash or by the words of questions."""

    images: int = Field(
        6, ge=0, le=16, description="largest Hamming distance of perceptual hashes, also trimmed and mirrored"
    )
    ngram: int = Field(13, ge=3, description="words in a row that count as the same text")
    text: TextLayer | None = Field(
        None, description="which text is compared; None = alt text, conversations and preferences"
    )
    drop: bool = Field(True, description="drop contaminated samples; false = only count them")


class BalanceSpec(Section):
    """Fewer samples of the commonest main objects (POINTS app. E, spec/points.md 5: +0.6)."""

    top: int = Field(
        6,
        ge=1,
        description="how many of the commonest classes are thinned when they exceed the mean count; `other` is never thinned",
    )
    to: Share = Field(0.6, gt=0, description="share of such a class that stays, the first in rank")


class PerplexitySpec(Section):
    """Layer `ppl`: perplexity of the text given its image, under the scorer P (POINTS eq. 3)."""

    text: TextLayer = Field("fused", description="which text is scored")
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

    fraction: Share = Field(
        0.2, gt=0, description="share that is kept of the scored samples which no earlier step dropped (POINTS: 0.2)"
    )
    order: Literal["lowest", "highest", "random"] = Field(
        "lowest", description="which perplexities are kept; random = control of the same size"
    )
    threshold: float | None = Field(
        None,
        gt=0,
        description="a perplexity instead of a fraction: kept up to it (lowest) or from it on (highest); not with random",
    )
    per_source: bool = Field(False, description="the fraction of each source instead of the whole dataset")
    quota: dict[Name, int] = Field(
        default_factory=dict, description="most samples kept of a source, by name; sources that are not named have none"
    )
    balance: BalanceSpec | None = Field(None, description="thin out the commonest main objects before the selection")
    drop_duplicate_texts: bool = Field(False, description="keep each text once (the first in rank)")

    @model_validator(mode="after")
    def _one_measure(self) -> KeepSpec:
        if self.per_source and self.threshold is not None:
            raise ValueError("per_source is about fraction; remove it or threshold")
        return self


class CurationSpec(Section):
    """Steps over one dataset of image + alt text; None leaves curation out."""

    dataset: Name | None = Field(None, description="the dataset that is curated; None leaves curation out")
    scorer: str | None = Field(
        None,
        description="URI of a model folder that captions and scores: one of the store (with its model.json), or a plain Hugging "
        "Face folder of a vision-language model (safetensors, chat template; code in it is never run). None = the bootstrap model",
    )
    ocr: OcrSpec = Field(default_factory=OcrSpec, description="text in images")
    caption: CaptionSpec = Field(default_factory=CaptionSpec, description="synthetic captions")
    fuse: FuseSpec = Field(default_factory=FuseSpec, description="alt text and synthetic caption merged")
    describe: DescribeSpec | None = Field(None, description="long descriptions (MiniGPT-4)")
    docqa: DocqaSpec | None = Field(None, description="questions about pages (Docmatix)")
    clean: CleanSpec | None = Field(None, description="checks of each sample by itself")
    judge: JudgeSpec | None = Field(None, description="checks by a text model")
    dedup: DedupSpec | None = Field(None, description="duplicates over all shards")
    contamination: ContaminationSpec | None = Field(None, description="samples that stand in a benchmark")
    perplexity: PerplexitySpec = Field(default_factory=PerplexitySpec, description="perplexity of a text")
    keep: KeepSpec = Field(default_factory=KeepSpec, description="which samples stay")

    @model_validator(mode="after")
    def _objects_known(self) -> CurationSpec:
        if self.keep.balance and self.clean is None:
            raise ValueError("curation.keep.balance needs the main objects that curation.clean finds; turn clean on")
        return self

    @model_validator(mode="after")
    def _endpoints_named(self) -> CurationSpec:
        steps = {name: getattr(self, name) for name in ("caption", "fuse", "describe", "docqa", "judge")}
        for name, step in steps.items():
            if step and getattr(step, "engine", "openai") == "openai" and not step.model_name:
                raise ValueError(f"curation.{name}.model_name is required: the endpoint must be told which model")
        named = {"clean": self.clean, "judge": self.judge, "dedup": self.dedup, "contamination": self.contamination}
        for name, step in [*named.items(), ("perplexity", self.perplexity)]:
            text = getattr(step, "text", None)
            if section := self.missing_section(text):
                raise ValueError(f"curation.{name}.text is '{text}', which the step of section {section} makes; add it")
        if self.describe and self.describe.repair and not self.describe.repair_model_name:
            raise ValueError("curation.describe.repair_model_name is required: the endpoint must be told which model")
        return self

    def endpoints(self) -> list[tuple[str, str]]:
        """(field, name of the environment variable with the address) of every server that the steps will ask."""
        found = []
        for name in ("caption", "fuse", "describe", "docqa", "judge"):
            step = getattr(self, name)
            if step and getattr(step, "engine", "openai") == "openai":
                found.append((f"curation.{name}", step.endpoint_env))
        if self.describe and self.describe.repair:
            found.append(("curation.describe.repair", self.describe.repair_endpoint_env))
        return found if self.dataset else []

    def missing_section(self, text: str | None) -> str | None:
        """The section whose step makes a text, when the recipe lacks it; the steps of other texts always run."""
        sections = {"described": ("curation.describe", self.describe), "docqa": ("curation.docqa", self.docqa)}
        name, section = sections.get(text or "", ("", True))
        return None if section else name
