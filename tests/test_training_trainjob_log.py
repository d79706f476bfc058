"""Reading a pod's log in pieces: each line once, in order, whatever the pieces overlap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlmflow.training.trainjob.log import LogCursor


def stamp(second: int, nanos: int) -> str:
    fraction = f"{nanos:09d}".rstrip("0")  # as Go writes it
    return f"2026-01-01T00:00:{second:02d}{'.' + fraction if fraction else ''}Z"


def served(lines: list[tuple[int, int, str]], cursor: LogCursor) -> str:
    """What the API gives: whole seconds from `sinceTime` on."""
    since = cursor.query().get("sinceTime", "")
    since_second = int(since[17:19]) if since else 0
    return "".join(f"{stamp(second, nanos)} {text}\n" for second, nanos, text in lines if second >= since_second)


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 500_000_000, 999_999_999])), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_every_line_once_over_any_pieces(steps: list[tuple[int, int]], cuts: list[int]) -> None:
    lines, second, last = [], 0, 0
    for number, (more, nanos) in enumerate(steps):
        second += more
        last = max(last, nanos) if not more else nanos
        lines.append((second, last, f"line {number}"))
    cursor, seen = LogCursor("pod"), []
    for cut in [*sorted(cuts), len(lines)]:
        seen += cursor.take(served(lines[:cut], cursor))
    assert seen == [text for _, _, text in lines]


def test_a_line_that_is_still_written_waits_for_its_end() -> None:
    cursor = LogCursor("pod")
    whole = f"{stamp(1, 5)} one\n{stamp(2, 5)} two"
    assert cursor.take(whole) == ["one"]
    assert cursor.take(whole + " is longer\n") == ["two is longer"]


def test_what_is_no_line_of_a_log_is_passed_over() -> None:
    assert LogCursor("pod").take("<html>bad gateway</html>\n") == []


def test_stamps_with_a_time_zone_are_asked_for_with_it() -> None:
    cursor = LogCursor("pod")
    assert cursor.take("2026-01-01T02:00:01.5+02:00 one\n") == ["one"]
    assert cursor.query()["sinceTime"] == "2026-01-01T02:00:01+02:00"
