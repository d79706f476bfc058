"""The report: all parts with their numbers, gaps said and not filled, nothing of a stranger's text taken as HTML."""

import html.parser
import re

import pytest
import report_case

from vlmflow import storage
from vlmflow.report.inputs import ReportInputs
from vlmflow.report.run import run
from vlmflow.report.sections import SECTIONS

VOID = {"br", "img", "meta", "hr", "col"}


class Reader(html.parser.HTMLParser):
    """Checks nesting; collects tags, text by section, and what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.fetched, self.sections, self.here = [], [], [], {}, ""

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        assert not any(name.startswith("on") for name in attrs), attrs
        self.fetched += [
            v for k, v in attrs.items() if k in ("src", "href", "data") and not v.startswith(("data:", "#"))
        ]
        if tag == "section":
            self.here = attrs["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" not in self.open:
            self.sections[self.here] = self.sections.get(self.here, "") + data + " "


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert reader.fetched == [], "the page would load something"
    assert "script" not in reader.tags
    return reader


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    ctx = report_case.context(tmp_path_factory.mktemp("report"))
    inputs = report_case.full(ctx)
    return ctx, inputs, run(ctx, inputs)


@pytest.fixture(scope="module")
def text(whole):
    return {name: re.sub(r"\s+", " ", part) for name, part in read(whole[2]).sections.items()}


def test_every_part_is_shown_and_none_is_missing(text):
    assert set(text) >= {anchor for anchor, *_ in SECTIONS}
    everything = " ".join(text.values())
    assert "not run" not in everything
    assert "cannot be" not in everything


def test_score_table_has_all_rows_and_both_multiples(text):
    scores = text["scores"]
    for row in ("chance", "untrained", "model P (bootstrap)", "candidate charts", "candidate pairs", "candidate describe",
                "maximum soup", "average soup", "greedy soup chosen"):  # fmt: skip
        assert row in scores, row
    greedy = scores.split("greedy soup chosen")[1].split("Rows with")[0]
    assert (
        "78.0 %" in greedy and "7.8 × chance" in greedy and "14.9 × chance" in greedy and "62.0 × untrained" in greedy
    )
    assert "untrained has 0 of 180" in greedy, "a multiple of zero must be said, not computed"
    assert (
        "n = 180" in scores
        and "Rows with the same weights, hence the same scores: maximum soup = greedy soup" in scores
    )


def test_selection_scores_stand_apart_from_the_reported_ones(text):
    report, _, selection = text["scores"].partition("Selection split")
    assert "n = 120" in selection and "n = 120" not in report
    assert "too good to report" in selection and re.search(r"mean chance( [\d.]+ %){5} ", selection)


def test_verdict_counts_only_what_was_reached(text):
    assert "Chosen model: greedy soup" in text[""]
    assert "2 of 4 benchmarks reach 4 times chance and 4 times the untrained model (digits, words), " in text[""]
    assert re.search(r"\(digits, words\), \w+, \w+ not, on held-out questions", text[""])


def test_perplexity_counts_planted_samples(text):
    ppl = text["perplexity"]
    assert "planted captions removed 20 of 20" in ppl
    assert "web captions 139 32 107" in ppl
    assert "cut at 5.769" in ppl


def test_pull_gallery_training_soup_registry_lineage_tell_the_run(text):
    assert "kept: 8 of 32, from the lowest" in text["samples"] and "removed: 8 of 107" in text["samples"]
    assert "not scored, so not kept: 1 of 1" in text["samples"]
    assert "http 404" in text["pull"] and "9 (5.3 %)" in text["pull"]
    assert "serial no." in text["samples"] and "planted" in text["samples"] and "What digit is this?" in text["samples"]
    for part in ("Model P", "Stage 1", "Stage 2", "candidate charts", "frozen", "812 544", "tokens/s 5200"):
        assert part in text["training"], part
    assert "describe 62.00 % 60.70 % rejected" in text["soup"]
    assert "points-tiny-candidates" in text["registry"] and "yesno 0.47 vs 0.48" in text["registry"]
    assert "max logit difference 0" in text["registry"]
    assert "What word is written here? river river" in text["registry"]
    assert "wrong gold: 0" in text["answers"] and "right gold: 8" in text["answers"]
    assert "Recipe as resolved" in text["lineage"]


def test_pictures_are_embedded(whole):
    assert whole[2].count("data:image/png;base64,") > 40


def test_text_of_strangers_stays_text(whole, text):
    page = whole[2]
    assert "<script" not in page and "<img src=x" not in page
    for section in ("samples", "training", "registry", "answers"):
        assert report_case.EVIL in text[section], section


def test_an_empty_run_says_not_run_everywhere(tmp_path):
    ctx = report_case.context(tmp_path)
    parts = read(run(ctx, ReportInputs())).sections
    for anchor, *_ in SECTIONS:
        assert "not run" in parts[anchor], anchor
    assert "No model was chosen" in parts[""]
    assert "%" not in parts["scores"]


@pytest.mark.parametrize("missing", ["datasets", "models", "scores", "soup", "registered", "exported", "timings"])
def test_each_part_may_be_missing(whole, missing):
    ctx, inputs, _ = whole
    given = {name: getattr(inputs, name) for name in ReportInputs.model_fields if name != missing}
    parts = read(run(ctx, ReportInputs(**given))).sections
    assert "cannot be shown" not in " ".join(parts.values())
    shown = {"datasets": "pull", "models": "training", "scores": "scores", "soup": "soup", "registered": "registry",
             "exported": "registry", "timings": "timings"}  # fmt: skip
    assert "not run" in parts[shown[missing]]


def test_a_model_without_scores_is_named_not_guessed(whole):
    ctx, inputs, _ = whole
    scores = {name: score for name, score in inputs.scores.items() if name not in ("untrained", "pairs")}
    parts = read(run(ctx, inputs.model_copy(update={"scores": scores}))).sections
    assert "Not evaluated on the report split: untrained, candidate pairs." in parts["scores"]
    assert "× untrained" not in parts["scores"]
    assert "0 of 4 benchmarks" in parts[""], "without the untrained model nothing counts as reached"


def test_curation_that_stopped_half_way_is_shown_so_far(whole):
    ctx, inputs, _ = whole
    web = inputs.datasets["web"]
    half = web.model_copy(update={"layers": {k: v for k, v in web.layers.items() if k in ("ocr", "synthetic")}})
    parts = read(run(ctx, inputs.model_copy(update={"datasets": {"web": half}}))).sections
    assert "not ranked: 8 of 140" in parts["samples"] and "not run" in parts["samples"]
    assert "not run" in parts["perplexity"] and "not run" in parts["curation"]


def test_a_part_that_cannot_be_read_is_said_and_the_rest_stands(tmp_path):
    ctx = report_case.context(tmp_path)
    inputs = report_case.full(ctx)
    storage.delete(inputs.models["ocr"].lineage.log_uri)
    storage.write_bytes(inputs.scores["soup-greedy"]["benchmarks"]["words"]["predictions"], b"not parquet")
    part = inputs.datasets["web"].layers["ppl"].parts[0]
    storage.write_bytes(part.uri, b"cut")
    parts = read(run(ctx, inputs)).sections
    assert "The training log cannot be read" in parts["training"] and "Stage 2" in parts["training"]
    assert "The replies cannot be read" in parts["answers"] and "gold: 8" in parts["answers"]
    assert "cannot be shown: DataError" in parts["perplexity"]
    assert "greedy soup" in parts["scores"]


def test_results_may_be_objects(whole):
    from pydantic import BaseModel

    class Registered(BaseModel):
        name: str = "points-tiny-candidates"
        version: str = "9"

    inputs = ReportInputs(registered=Registered())
    assert inputs.registered == {"name": "points-tiny-candidates", "version": "9"}


def test_timings_are_read_from_the_run_records_when_not_handed_in(tmp_path):
    ctx = report_case.context(tmp_path)
    for name, start in (("pull", 100.0), ("ocr", 130.5)):
        record = {"step": name, "started": start, "seconds": 12.5}
        storage.write_json(storage.join(ctx.root, "runs", ctx.run_id, "steps", f"{name}.json"), record)
    timings = read(run(ctx, ReportInputs())).sections["timings"]
    assert "25 s in steps within 43 s" in re.sub(r"\s+", " ", timings)


def test_the_same_run_gives_the_same_page(whole):
    ctx, inputs, page = whole
    assert run(ctx, inputs) == page
