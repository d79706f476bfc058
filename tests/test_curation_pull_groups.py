"""A pull dealt to groups: the same shards whatever the grouping, one manifest at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from curation_server import picture, serving
from test_curation_pull import context, table

from vlmflow.curation import pull
from vlmflow.curation.first_seen import FirstSeen
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "store/shards").glob("*"))}


def rows(server, count: int, start: int = 0) -> list[dict]:
    shared = [{"url": server.url(f"/img/{start + i % 50}"), "text": f"text {i % 50}"} for i in range(count)]
    return [*shared, {"url": server.url(f"/status/404?{start}"), "text": "gone"}]


@pytest.mark.parametrize("count", [1, 2, 3, 99])
def test_any_grouping_gives_the_bytes_of_one_pull(server, tmp_path, count):
    sources = {
        "a": {"table": table(tmp_path / "a.csv", rows(server, 57))},
        "b": {"table": table(tmp_path / "b.csv", rows(server, 23, 100))},
    }
    whole = pull.run(context(tmp_path / "whole", sources), "web")
    ctx = context(tmp_path / "groups", sources)
    groups = pull.plan_groups(ctx, "web", count)
    assert sum(group["shards"] for group in groups) == 6 + 3 and len(groups) == min(count, 9)
    parts = [pull.run(ctx, "web", group) for group in reversed(groups)]
    assert not list((tmp_path / "groups/store").glob("manifests/*")), "a group seals nothing"
    hits = server.images
    manifest = pull.run(ctx, "web")
    assert server.images == hits, "all of it was found"
    assert files(tmp_path / "groups") == files(tmp_path / "whole")
    shards = [shard for part in reversed(parts) for shard in part.shards]
    assert shards == manifest.shards
    assert [s.sha256 for s in shards] == [s.sha256 for s in whole.shards]
    assert manifest.lineage == whole.lineage
    assert whole.lineage[0].summary["duplicate_rows"] == 7
    assert whole.lineage[0].summary["failed_by_host"] == {"127.0.0.1": 2}


def test_a_group_leaves_what_it_could_not_have_to_the_sealing_call(server, tmp_path):
    urls = [server.url(f"/img/{i}") for i in range(300, 315)] + [server.url(f"/status/503?g{i}") for i in range(5)]
    spec = {"web": {"table": table(tmp_path / "t.csv", [{"url": u, "text": "t"} for u in urls])}}
    ctx = context(tmp_path, spec, retries=0, failure_limit=0.4)
    groups = pull.plan_groups(ctx, "web", 2)
    assert [len(pull.run(ctx, "web", group).shards) for group in groups] == [1, 0], "the second shard is held"
    before = server.images
    manifest = pull.run(ctx, "web")
    assert manifest.samples == 15 and server.images == before, "its images wait in the spool"
    assert server.hits["/status/503"] == 10


def test_groups_of_a_table_that_changed_are_refused(server, tmp_path):
    uri = table(tmp_path / "t.csv", rows(server, 20))
    ctx = context(tmp_path, {"web": {"table": uri}})
    groups = pull.plan_groups(ctx, "web", 2)
    table(tmp_path / "t.csv", rows(server, 30))
    with pytest.raises(DataError, match="have 31 rows, but group 1 was made of 21"):
        pull.run(ctx, "web", groups[0])


def test_samples_know_their_images_in_every_group(server, tmp_path):
    ctx = context(tmp_path, {"web": {"table": table(tmp_path / "t.csv", rows(server, 57))}})
    for group in pull.plan_groups(ctx, "web", 4):
        pull.run(ctx, "web", group)
    for shard in pull.run(ctx, "web").shards:
        for sample in ShardReader(shard):
            assert sample.images == (picture(int(sample.key[-3:]) % 50),)


def test_first_rows_of_values_that_repeat(tmp_path, monkeypatch):
    import random

    from vlmflow.curation import first_seen

    monkeypatch.setattr(first_seen, "BUFFER", 100)
    rng = random.Random(3)
    values = [str(rng.randrange(600)).encode() for _ in range(2000)]
    seen = FirstSeen(tmp_path)
    for row, value in enumerate(values):
        seen.add(value, row)
    seen.seal()
    assert seen.repeats == len(values) - len(set(values))
    for value in set(values):
        assert seen.first(value) == (values.index(value) if values.count(value) > 1 else None)
    assert seen.first(b"never seen") is None
    assert FirstSeen(tmp_path).seal().first(b"x") is None
