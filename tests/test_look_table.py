"""The wide table and its questions: right rows, right order, bounded memory, nothing from a URL becomes SQL."""

from __future__ import annotations

import os
from pathlib import Path

import look_world
import pytest

from vlmflow.errors import DataError, NoSpace
from vlmflow.look import answers, build, query, sql, table
from vlmflow.look.samples import Samples


def ask(made: table.Table, text: str) -> query.Query:
    return query.parse([tuple(pair.split("=", 1)) for pair in text.split("&") if pair], made)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    manifest = look_world.small(folder)
    made = table.open_table(manifest, folder / "scratch")
    with made.connect() as con:
        yield manifest, made, con


def keys(small, text: str) -> list[str]:
    _, made, con = small
    return [row["key"] for row in answers.page(con, made, ask(made, text))]


def numbers(small, text: str) -> list[int]:
    return [int(key.rpartition("-")[2]) for key in keys(small, text)]


def test_every_sample_is_a_row_in_the_order_of_the_dataset(small):
    manifest, made, _ = small
    assert made.rows == manifest.samples == 24
    assert numbers(small, "") == list(range(24))


def test_filters_by_source_state_reason_error_value_and_text(small):
    assert numbers(small, "source=docs") == list(range(16, 24))
    kept = [i for i in range(24) if i % 12 != 5 and i % 8 <= 3]
    assert numbers(small, "state=kept") == kept
    assert numbers(small, "state=kept&source=docs") == [i for i in kept if i >= 16]
    assert numbers(small, "reason=not scored") == [5, 17]
    assert numbers(small, "error=fused: the reply has # words") == [5, 17]
    assert numbers(small, "min.ppl.ppl=12&max.ppl.ppl=13") == [i for i in range(24) if i % 8 in (2, 3)]
    assert numbers(small, "q=FUSED TEXT 11") == [11]
    assert numbers(small, "q=alt text 1&in=sample.text") == [1, *range(10, 20)]
    assert numbers(small, "q=alt text 1&in=fused.text") == []
    assert numbers(small, "is.clean.problems=aspect # > #") == [1, 7, 13, 19]
    assert numbers(small, "is.fused.engine=") == [5, 17]
    assert numbers(small, "is.keep.keep=true") == kept


def test_an_upstream_failure_is_counted_where_it_arose(small):
    _, made, con = small
    errors = next(f for f in answers.facets(con, made, query.Query()) if f.parameter == "error")
    assert errors.entries == [("fused: the reply has # words", 2)]


def test_sorting_breaks_ties_by_the_order_of_the_dataset_and_puts_missing_values_last(small):
    values = {i: i % 8 for i in range(24) if i % 12 != 5}
    missing = [5, 17]
    assert numbers(small, "sort=ppl.ppl") == [*sorted(values, key=lambda i: (values[i], i)), *missing]
    assert numbers(small, "sort=ppl.ppl&order=desc") == [*sorted(values, key=lambda i: (-values[i], i)), *missing]


def test_pages_are_disjoint_and_complete_whatever_their_size_and_order(small):
    for order in ("sort=ppl.ppl", "sort=random", "sort=n&order=desc"):
        whole = numbers(small, order)
        assert sorted(whole) == list(range(24))
        parts = [numbers(small, f"{order}&per=7&page={page}") for page in range(1, 6)]
        assert [n for part in parts for n in part] == whole and parts[-1] == []
    assert numbers(small, "sort=random") != list(range(24))


def test_a_facet_counts_what_the_other_filters_leave(small):
    _, made, con = small
    found = {f.parameter: dict(f.entries) for f in answers.facets(con, made, ask(made, "state=kept&source=docs"))}
    assert found["state"] == {"kept": 3, "dropped": 5}  # of docs
    assert found["source"] == {"web": 8, "docs": 3}  # of what is kept
    assert answers.count(con, made, ask(made, "state=kept&source=docs")) == 3


def test_a_histogram_counts_every_value_once_and_kept_apart(small):
    _, made, con = small
    shown = answers.histogram(con, made, query.Query(), "ppl.ppl")
    assert sum(map(sum, shown["counts"].values())) == shown["count"] == 22 and shown["missing"] == 2
    assert sum(shown["counts"]["kept"]) == answers.count(con, made, ask(made, "state=kept"))
    assert shown["edges"][0] == 10 and shown["edges"][-1] >= 17
    whole = answers.histogram(con, made, query.Query(), "ppl.tokens")
    assert whole["edges"][:3] == [3, 4, 5] and whole["counts"]["kept"][0] == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sort=ppl.nothing", "ppl.ppl"),
        ("sort=n; DROP TABLE rows", "there is no column"),
        ("is.ppl.ppl=1", "is a number"),
        ("min.fused.text=1", "is a text"),
        ("min.ppl.ppl=nan", "no number"),
        ("page=0", "whole number"),
        ("page=٣", "whole number"),
        ("per=100000", "whole number from 1 to 200"),
        ("order=sideways", "asc"),
        ("colour=red", "not known"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_with_what_there_is(small, text, told):
    with pytest.raises(DataError, match=told):
        keys(small, text)


@pytest.mark.parametrize("text", ["source=' OR 1=1 --", "q='); DROP TABLE rows; --", "q=50_%", "q=f_sed", "reason=\\"])
def test_values_are_values(small, text):
    assert keys(small, text) == []
    assert len(keys(small, "")) == 24


def test_a_question_survives_its_own_url(small):
    from urllib.parse import parse_qsl

    _, made, _ = small
    asked = ask(
        made,
        "source=web&state=kept&min.ppl.ppl=0.1&max.ppl.ppl=1234567.25&q=ä + b&in=fused.text&sort=ppl.ppl&order=desc&page=3&per=7&is.fused.engine=",
    )
    assert query.parse(parse_qsl(asked.url()[1:], keep_blank_values=True), made) == asked


def test_the_connection_reads_nothing_but_its_table(small, tmp_path):
    import duckdb

    _, _, con = small
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for statement in (f"SELECT * FROM '{tmp_path}/secret.csv'", "DELETE FROM rows", "INSTALL httpfs"):
        with pytest.raises(duckdb.Error):
            con.execute(statement).fetchall()


def test_the_table_is_found_again_and_made_whole_or_not_at_all(tmp_path, monkeypatch):
    manifest = look_world.small(tmp_path)
    first = table.open_table(manifest, tmp_path / "scratch")
    monkeypatch.setattr(table, "build", None)
    assert table.open_table(manifest, tmp_path / "scratch") == first
    monkeypatch.undo()
    first.path.unlink()
    monkeypatch.setattr(build, "_describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        table.open_table(manifest, tmp_path / "scratch")
    assert list((tmp_path / "scratch" / "look").iterdir()) == []


def test_layers_that_do_not_fit_each_other_are_refused(tmp_path):
    manifest = look_world.small(tmp_path)
    parts = manifest.layers["ppl"].parts
    swapped = manifest.layers["ppl"].model_copy(update={"parts": [parts[1], parts[0], parts[2]]})
    broken = manifest.model_copy(update={"layers": {**manifest.layers, "ppl": swapped}})
    with pytest.raises(DataError, match="layer 'ppl'"):
        table.open_table(broken, tmp_path / "scratch")
    assert not list((tmp_path / "scratch" / "look").iterdir())


def test_a_dataset_without_layers_is_shown_by_what_its_samples_say(tmp_path):
    manifest = look_world.small(tmp_path).model_copy(update={"layers": {}})
    made = table.open_table(manifest, tmp_path / "scratch")
    with made.connect() as con:
        (row,) = answers.page(con, made, ask(made, "q=alt text 7"))
        assert row["state"] == "undecided" and row["sample.width"] == 96 and row["reason"] is None


def test_a_changed_picture_is_not_shown_as_the_one_that_was_pulled(tmp_path):
    manifest = look_world.small(tmp_path)
    offset, length = Samples(manifest, tmp_path).members(0, "web-00000002")["png"]
    path = manifest.shards[0].uri
    data = bytearray(Path(path).read_bytes())
    data[offset + length // 2] ^= 1
    Path(path).write_bytes(data)
    unpinned = manifest.model_copy(
        update={"shards": [manifest.shards[0].model_copy(update={"sha256": look_world.sha256_file(path)})]}
    )
    with pytest.raises(DataError, match="another sha256"):
        Samples(unpinned, tmp_path).images(0, "web-00000002")


def test_many_rows_in_bounded_memory(tmp_path):
    """200,000 rows whose shards do not even exist, with DuckDB held to 128 MB and pages read at both ends."""
    manifest = look_world.large(tmp_path / "parts", 200_000)
    told: list[str] = []
    os.environ.pop("VLMFLOW_SCRATCH_LIMIT", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sql, "MEMORY", "128MB")
        seen: list[int] = []
        insert = build._insert
        patch.setattr(
            build, "_insert", lambda con, batch, first: (seen.append(batch.num_rows), insert(con, batch, first))
        )
        made = table.open_table(manifest, tmp_path / "scratch", say=told.append)
        assert sum(seen) == made.rows == 200_000 and max(seen) <= build.BATCH_ROWS + 10_000
        assert not made.with_samples and any("186.3 GiB" in text for text in told)  # 20 shards of 10 GB are not fetched
        with made.connect() as con:
            assert con.execute("SELECT current_setting('memory_limit')").fetchall() == [("122.0 MiB",)]
            lowest = answers.page(con, made, ask(made, "sort=ppl.ppl"))
            highest = answers.page(con, made, ask(made, "sort=ppl.ppl&order=desc"))
            last = answers.page(con, made, ask(made, "sort=ppl.ppl&page=4000"))
            assert len(lowest) == len(highest) == len(last) == 50
            assert [row["key"] for row in last[::-1]] == [row["key"] for row in highest]
            assert lowest[0]["ppl.ppl"] <= lowest[-1]["ppl.ppl"] < highest[-1]["ppl.ppl"]
            found = {f.parameter: dict(f.entries) for f in answers.facets(con, made, query.Query())}
            kept = found["state"]["kept"]
            assert kept + found["state"]["dropped"] == 200_000 and sum(found["source"].values()) == 200_000
            assert found["reason"] == {
                "perplexity # is in the lowest # % (to #)": kept,
                "perplexity # is beyond the lowest # % (to #)": 200_000 - kept,
            }


def test_of_a_remote_shard_only_the_bytes_asked_for_travel(tmp_path, monkeypatch):
    manifest = look_world.small(tmp_path)
    from vlmflow import storage
    from vlmflow.look import samples

    ranges: list[int | None] = []
    real = storage.read_bytes
    monkeypatch.setattr(samples, "_is_here", lambda ref, scratch: False)
    monkeypatch.setattr(
        samples.storage,
        "read_bytes",
        lambda uri, offset=0, length=None: (ranges.append(length), real(uri, offset, length))[1],
    )
    monkeypatch.setattr(samples.ShardReader, "path", property(lambda self: pytest.fail("the whole tar was fetched")))
    reading = Samples(manifest, tmp_path / "scratch")
    assert reading.images(2, "docs-00000017") == (look_world.picture(17),)
    members = reading.members(2, "docs-00000017")
    assert ranges == [members["json"][1], members["png"][1]]
    assert reading.bytes_to_fetch() == sum(shard.bytes for shard in manifest.shards)


def test_reasons_that_differ_in_numbers_and_keys_are_one():
    import re

    import duckdb

    texts = {
        "repeats web-00000301 (near, 4 bits apart)": "repeats # (near, # bits apart)",
        "perplexity 1.2e-05, beyond 20 % (to 1,000.5)": "perplexity #, beyond # % (to #)",
        "aspect 41.2 > 30": "aspect # > #",
        "in the 'lowest' control": "in the 'lowest' control",
    }
    with duckdb.connect() as con:
        for text, kind in texts.items():
            assert con.execute(f"SELECT {sql.kind_sql('?')}", [text]).fetchall() == [(kind,)]
            assert re.sub(sql.NUMBER, "#", text) == kind  # `show` counts without DuckDB


def test_what_duckdb_cannot_do_is_an_error_with_words(tmp_path):
    import duckdb

    with pytest.raises(NoSpace, match=str(tmp_path)), sql.answering(tmp_path):
        raise duckdb.OutOfMemoryException("full")
    manifest = look_world.small(tmp_path)
    made = table.open_table(manifest, tmp_path / "scratch")
    made.path.write_bytes(b"not a table")
    with pytest.raises(DataError, match="delete it"):
        table.open_table(manifest, tmp_path / "scratch")
