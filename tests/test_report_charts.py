"""Plots and escaping in small: marks where the numbers say, no colour on the wrong side of the cut."""

import re
import xml.etree.ElementTree as ET

import pytest

from vlmflow.report import charts
from vlmflow.report.html import Safe, el, table
from vlmflow.report.numbers import log_ticks, percent, seconds, short, size, ticks
from vlmflow.report.sections.training import smooth


def parse(svg):
    return ET.fromstring(svg)


def test_children_and_attributes_are_escaped_unless_made_here():
    assert el("p", "<b>", title='"&') == '<p title="&quot;&amp;">&lt;b&gt;</p>'
    assert el("p", el("b", 1)) == "<p><b>1</b></p>"
    assert "<i>" not in table(["<i>"], [["<i>"]])
    assert isinstance(el("br"), Safe)


def test_histogram_counts_every_value_once_and_colours_by_the_cut():
    values = [1.0, 1.5, 2.0, 2.0, 2.1, 5.0, 80.0]
    svg = parse(charts.histograms({"all": (values[:4], values[4:])}, cut=2.0, axis="x"))
    counted = {"kept": 0, "gone": 0}
    for rect in svg.iter("rect"):
        counted[rect.get("class")] += int(rect.find("title").text.rsplit(" ", 1)[1])
    assert counted == {"kept": 4, "gone": 3}


def test_a_bar_that_is_part_kept_and_part_removed_shows_both():
    """Most captions of a sure model lie within one bar: the cut goes through it, and so must the colours."""
    svg = parse(charts.histograms({"all": ([1.001] * 2, [1.002] * 6 + [30000.0])}, cut=1.0015, axis="x"))
    kept, gone = sorted((r for r in svg.iter("rect")), key=lambda r: (float(r.get("x")), -float(r.get("y"))))[:2]
    assert (kept.get("class"), gone.get("class")) == ("kept", "gone") and kept.get("x") == gone.get("x")
    assert float(gone.get("height")) == pytest.approx(3 * float(kept.get("height")), abs=0.2)
    assert float(gone.get("y")) + float(gone.get("height")) == pytest.approx(float(kept.get("y")), abs=0.2)


def test_histogram_leaves_out_what_has_no_logarithm():
    svg = parse(charts.histograms({"all": ([0.0, float("inf"), 3.0], [float("nan"), 4.0])}, cut=None, axis="x"))
    assert sum(int(rect.find("title").text.rsplit(" ", 1)[1]) for rect in svg.iter("rect")) == 2
    assert "no values" in charts.histograms({"all": ([], [])}, None, "x")


def test_curves_fall_when_values_fall_and_survive_odd_input():
    svg = parse(charts.lines({"loss": [(0, 4.0), (1, 2.0), (2, 1.0)]}, "loss"))
    ys = [float(point.split(",")[1]) for point in svg.find("polyline").get("points").split()]
    assert ys == sorted(ys) and ys[0] < ys[-1]
    for points in ([(3, 1.0)], [(0, 0.0), (1, 0.0)], [(0, float("nan")), (1, 2.0)]):
        parse(charts.lines({"a": points}, "a"))
    assert "no values" in charts.lines({"a": []}, "a")
    parse(charts.lines({"a": [(0, 1.0), (1, 0.001)]}, "a", log=True))


def test_interval_puts_dot_and_chance_in_proportion():
    svg = parse(charts.interval(0.5, 0.4, 0.6, 0.1, width=106))
    assert float(svg.find("circle").get("cx")) == pytest.approx(53)
    chance = next(line for line in svg.iter("line") if line.get("class") == "chance")
    assert float(chance.get("x1")) == pytest.approx(13)


def test_gantt_and_bars_scale_with_their_values():
    svg = parse(charts.gantt([("a", 0, 10), ("b", 10, 30)]))
    widths = [float(rect.get("width")) for rect in svg.iter("rect")]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.01)
    assert "3 (75.0\u00a0%)" in charts.bars([("x", 3, "bad"), ("y", 1, "bad")])


def test_names_in_plots_are_escaped():
    evil = "<script>"
    for svg in (charts.gantt([(evil, 0, 1)]), charts.bars([(evil, 1, "bad")]), charts.lines({evil: [(0, 1.0)]}, evil),
                charts.histograms({evil: ([1.0], [2.0])}, 1.5, evil), charts.legend([evil])):  # fmt: skip
        assert "<script" not in svg
        parse(svg)


def test_running_mean_is_centred():
    line = [(float(i), 2.0 * i) for i in range(50)]
    assert smooth(line) == [(x, pytest.approx(y)) for x, y in line]


def test_numbers_are_written_for_people():
    assert percent(0.0417) == "4.2\u00a0%"
    assert [short(v) for v in (1234567, 0.00012, 3.14159, True, None, 0.0, 1e9)] == [
        "1\u202f234\u202f567", "1.2e-4", "3.142", "yes", "", "0", "1e9"]  # fmt: skip
    assert [seconds(v) for v in (3.21, 65, 200)] == ["3.2 s", "65 s", "3 min 20 s"]
    assert size(11_400_000) == "10.9 MiB"
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert log_ticks(1.5, 30) == [2, 5, 10, 20]
    assert re.fullmatch(r"-?[\d.]+e-?\d+", short(0.000512345))
