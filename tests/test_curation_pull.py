"""Pulling tables of URLs against a real, misbehaving web server on the loopback."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from curation_server import picture, serving

from vlmflow.curation import pull
from vlmflow.curation.pull_shard import read_failures
from vlmflow.curation.table import columns_of
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError, RecipeError, StepFailed
from vlmflow.recipe.data import DatasetSpec, PullSpec, SourceSpec
from vlmflow.step import Context


@pytest.fixture
def server():
    with serving() as running:
        yield running


def table(path: Path, rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def context(root: Path, sources: dict[str, dict], **settings) -> Context:
    settings = {"allow_hosts": ["127.0.0.1"], "samples_per_shard": 10, "timeout": 5, "failure_limit": 1.0, **settings}
    data = {"web": DatasetSpec(sources={name: SourceSpec(**spec) for name, spec in sources.items()})}
    recipe = SimpleNamespace(data=data, pull=PullSpec(**settings))
    return Context(recipe, str(root / "store"), root / "scratch", "test")


def pulled(tmp_path: Path, urls: list[str], **settings) -> tuple[Manifest, dict[str, tuple[str, str]]]:
    """Manifest and {url: (reason, detail)} of a table of URLs (one good image is added so that the step succeeds)."""
    uri = table(tmp_path / "t.csv", [{"url": u, "text": f"text {i}"} for i, u in enumerate(urls)])
    ctx = context(tmp_path, {"web": {"table": uri}}, **settings)
    manifest = pull.run(ctx, "web")
    return manifest, failures(ctx)


def failures(ctx: Context) -> dict[str, tuple[str, str]]:
    tars = sorted(Path(ctx.root, "shards").glob("*.tar"))
    return {f["url"]: (f["reason"], f["detail"]) for tar in tars for f in read_failures(str(tar))[0]}


def test_shards_hold_original_bytes_and_all_columns(server, tmp_path):
    rows = [{"url": server.url(f"/img/{i}"), "text": f"a {i}", "topic": f"t{i}", "name": f"id{i}"} for i in range(25)]
    ctx = context(tmp_path, {"web": {"table": table(tmp_path / "t.csv", rows), "id_column": "name", "licence": "CC0"}})
    manifest = pull.run(ctx, "web")
    assert [s.samples for s in manifest.shards] == [10, 10, 5]
    sample = ShardReader(manifest.shards[1]).read("web-00000013")
    assert sample.images == (picture(13),)
    about = sample.meta["images"][0]
    assert (about["width"], about["height"], about["format"]) == (24, 16, "png")
    assert {k: sample.meta[k] for k in ("id", "url", "text", "source", "licence", "extra")} == {
        "id": "id13",
        "url": rows[13]["url"],
        "text": "a 13",
        "source": "web",
        "licence": "CC0",
        "extra": {"topic": "t13"},
    }
    assert manifest.lineage[0].summary["samples"] == 25
    assert server.agents == {ctx.recipe.pull.user_agent}


def test_each_broken_link_has_its_reason(server, tmp_path):
    with serving() as gone:
        dead = gone.url("/img/1")
    expected = {
        server.url("/status/404"): "http_404",
        server.url("/status/403"): "http_403",
        server.url("/status/500"): "http_500",
        server.url("/html/x"): "not_an_image",
        server.url("/cut/x"): "corrupt",
        server.url("/bomb/x"): "too_many_pixels",
        server.url("/endless/x"): "too_large",
        server.url("/gzip/9000000"): "too_large",
        server.url("/drip/x"): "timeout",
        server.url("/drop/x"): "disconnected",
        server.url("/loop"): "too_many_redirects",
        server.url("/robots/x?tag=noindex, max-image-preview:large"): "opted_out",
        server.url("/robots/x?tag=vlmflow: noai"): "opted_out",
        dead: "refused",
        "ftp://example.com/a.png": "bad_scheme",
        "file:///etc/passwd": "bad_scheme",
        "data:image/png;base64,AAAA": "bad_scheme",
        "http://": "bad_url",
        "not a url": "bad_scheme",
        "http://nowhere.invalid/a.png": "dns",
        "http://169.254.169.254/latest/meta-data": "forbidden_address",
        "http://10.0.0.7/a.png": "forbidden_address",
        "http://100.64.1.1/a.png": "forbidden_address",
        "http://[::1]/a.png": "forbidden_address",
        "http://[::ffff:127.0.0.1]/a.png": "forbidden_address",
        "http://2130706433/a.png": "forbidden_address",
        f"http://localhost:{server.port}/img/1": "forbidden_address",
        server.url("/redirect/x?to=http://169.254.169.254/latest"): "forbidden_address",
        server.url(f"/redirect/x?to=http://localhost:{server.port}/img/1"): "forbidden_address",
        server.url("/redirect/x?to=file:///etc/passwd"): "bad_scheme",
    }
    good = {
        server.url("/img/1"),
        server.url("/lie/x"),
        server.url("/robots/x?tag=otherbot: noai"),
        server.url("/robots/x?tag=max-snippet:5"),
        server.url("/redirect/x?to=/img/2"),
        server.url("/gzip/100"),
    }
    manifest, failed = pulled(tmp_path, [*expected, *good], timeout=4.0, max_bytes=1_000_000, samples_per_shard=50)
    assert {url: reason for url, (reason, _) in failed.items()} == expected
    assert {s.meta["url"] for s in ShardReader(manifest.shards[0])} == good
    assert server.hits["/status/404"] == 1 and server.hits["/status/500"] == 3
    summary = manifest.lineage[0].summary
    assert summary["failed"] == len(expected) and summary["failed_by_reason"]["forbidden_address"] == 9
    assert summary["failed_by_host"]["10.0.0.7"] == 1


def test_formats_are_kept_or_converted_and_so_noted(server, tmp_path):
    manifest, failed = pulled(
        tmp_path, [server.url(f"/format/{k}") for k in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    )
    assert not failed
    images = [s.meta["images"][0] for s in ShardReader(manifest.shards[0])]
    assert [i["format"] for i in images] == ["jpg", "png", "webp", "png", "png", "png"]
    assert [i.get("converted_from") for i in images] == [None, None, None, "gif", "bmp", "tiff"]
    assert manifest.lineage[0].summary["converted_to_png"] == {"gif": 1, "bmp": 1, "tiff": 1}


def test_a_busy_server_is_asked_again_after_the_time_it_names(server, tmp_path):
    manifest, failed = pulled(
        tmp_path, [server.url("/busy/a"), server.url("/busy/b?times=9"), server.url("/busy/c?times=9&after=99")]
    )
    assert (
        manifest.samples == 1
        and server.hits["/busy/a"] == 2
        and server.hits["/busy/b"] == 3
        and server.hits["/busy/c"] == 1
    )
    assert {reason for reason, _ in failed.values()} == {"http_429"}
    assert "exceeds the cap" in failed[server.url("/busy/c?times=9&after=99")][1]


def test_an_image_that_rows_share_is_fetched_once(server, tmp_path):
    urls = [server.url(f"/img/{i % 4}") for i in range(25)] + [server.url("/status/404")] * 2
    uri = table(tmp_path / "t.csv", [{"url": u, "text": f"text {i % 24}"} for i, u in enumerate(urls)])
    manifest = pull.run(context(tmp_path, {"web": {"table": uri}}), "web")
    assert manifest.samples == 25 and server.images == 4 and server.hits["/status/404"] == 1
    assert all(s.images == (picture(int(s.key[-2:]) % 4),) for ref in manifest.shards for s in ShardReader(ref))
    assert manifest.lineage[0].summary["duplicate_rows"] == 1
    Path(manifest.shards[1].uri).unlink()  # resumed: the shared image comes from the finished first shard
    assert pull.run(context(tmp_path, {"web": {"table": uri}}), "web") == manifest
    assert server.images == 4


def test_text_only_several_images_and_conversations(server, tmp_path):
    turns = [{"from": "human", "value": "<image>\n<image>\nWhat?"}, {"from": "gpt", "value": "Two."}]
    rows = [
        {"url": json.dumps([server.url("/img/1"), server.url("/img/2")]), "chat": json.dumps(turns)},
        {"url": "", "chat": json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])},
        {"url": "", "chat": ""},
        {"url": server.url("/img/3"), "chat": json.dumps(turns)},
        {"url": server.url("/img/4"), "chat": "{oops"},
    ]
    spec = {"table": table(tmp_path / "t.csv", rows), "conversations_column": "chat"}
    ctx = context(tmp_path, {"web": spec})
    manifest = pull.run(ctx, "web")
    two, none = list(ShardReader(manifest.shards[0]))
    assert two.images == (picture(1), picture(2)) and two.meta["conversations"] == turns
    assert (
        none.images == ()
        and none.meta["conversations"][0] == {"from": "human", "value": "Hi"}
        and none.meta["url"] is None
    )
    summary = manifest.lineage[0].summary
    assert summary["failed_by_reason"] == {"blank_row": 1, "image_marks": 1, "bad_conversations": 1}
    assert server.images == 2  # nothing is fetched for a row that cannot become a sample


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv.gz"])
def test_table_formats_give_the_same_samples(server, tmp_path, kind):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"url": server.url(f"/img/{i}"), "text": f"tëxt, {i}"} for i in range(3)]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(Path(table(tmp_path / "plain.csv", rows)).read_bytes()))
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    manifest = pull.run(context(tmp_path, {"web": {"table": path.as_uri()}}), "web")
    assert [s.meta["text"] for s in ShardReader(manifest.shards[0])] == [r["text"] for r in rows]


def test_a_table_at_an_allowed_host_is_fetched(server, tmp_path):
    manifest = pull.run(context(tmp_path, {"web": {"table": server.url("/table/12.csv")}}), "web")
    assert [s.samples for s in manifest.shards] == [10, 2]


def test_wrong_tables_are_refused_with_what_to_change(server, tmp_path):
    uri = table(tmp_path / "t.csv", [{"link": "x", "alt": "y"}])
    with pytest.raises(
        DataError, match=r"no column 'url'; it has \['link', 'alt'\]. Set data.web.sources.web.url_column"
    ):
        pull.run(context(tmp_path, {"web": {"table": uri}}), "web")
    with pytest.raises(DataError, match=r"no column 'text'.*sources.web.text_column"):
        pull.run(context(tmp_path, {"web": {"table": uri, "url_column": "link"}}), "web")
    with pytest.raises(DataError, match=r"not in pull\.allow_hosts"):
        pull.run(context(tmp_path, {"web": {"table": server.url("/t.csv")}}, allow_hosts=[]), "web")
    with pytest.raises(DataError, match="could not be fetched: http_404"):
        pull.run(context(tmp_path, {"web": {"table": server.url("/t.csv")}}), "web")
    (tmp_path / "t.xlsx").write_text("")
    with pytest.raises(DataError, match=r"'.xlsx' is not known"):
        pull.run(context(tmp_path, {"web": {"table": str(tmp_path / "t.xlsx")}}), "web")
    (tmp_path / "empty.csv").write_text("url,text\n")
    with pytest.raises(DataError, match="0 rows"):
        pull.run(context(tmp_path, {"web": {"table": str(tmp_path / "empty.csv")}}), "web")
    with pytest.raises(RecipeError, match=r"data\.nope"):
        pull.run(context(tmp_path, {"web": {"table": uri}}), "nope")


def test_too_many_failures_stop_the_step_with_a_histogram(server, tmp_path):
    urls = [server.url(f"/img/{i}") for i in range(20)] + [server.url(f"/status/404?{i}") for i in range(10)]
    with pytest.raises(StepFailed, match=r"10 of 30 rows failed \(33.3%.*allows 20.0%.*10 x http_404") as error:
        pulled(tmp_path, urls, failure_limit=0.2)
    assert "raise the limit" in str(error.value)
    manifest, _ = pulled(tmp_path, urls, failure_limit=0.4)  # what landed is found, whatever the limit
    assert manifest.samples == 20 and server.images == 20
    assert server.hits["/status/404"] == 20, "the verdict asks for one more look at what failed"
    pulled(tmp_path, urls, failure_limit=0.4)
    assert server.hits["/status/404"] == 20, "and a verdict that passed asks for none"


def test_a_dead_server_is_named_and_nothing_of_it_is_kept(tmp_path):
    with serving() as gone:
        port = gone.port
    uri = table(tmp_path / "t.csv", [{"url": f"http://127.0.0.1:{port}/img/{i}", "text": "x"} for i in range(40)])
    ctx = context(tmp_path, {"web": {"table": uri}}, failure_limit=0.5)
    with pytest.raises(StepFailed, match=f"refused.*No server answers at 127.0.0.1:{port}.*run the step again"):
        pull.run(ctx, "web")
    assert not list(tmp_path.glob("store/shards/*.tar"))


def test_shards_lost_to_an_outage_are_fetched_again_later(server, tmp_path):
    rows = [{"url": server.url(f"/img/{i}"), "text": f"a {i}"} for i in range(10)]
    rows += [{"url": server.url(f"/status/503?{i}"), "text": "x"} for i in range(10)]
    uri = table(tmp_path / "t.csv", rows)
    server.down = True
    with pytest.raises(
        StepFailed, match=r"10 of 10 rows failed.*http_503.*1 shards with such passing failures were not kept"
    ):
        pull.run(context(tmp_path, {"web": {"table": uri}}, failure_limit=0.4, retries=0), "web")
    server.down = False
    with pytest.raises(StepFailed, match="10 of 20 rows failed"):  # the first shard lands now, the second is still out
        pull.run(context(tmp_path, {"web": {"table": uri}}, failure_limit=0.4, retries=0), "web")
    hits = server.images
    manifest = pull.run(context(tmp_path, {"web": {"table": uri}}, failure_limit=0.6, retries=0), "web")
    assert manifest.samples == 10 and server.images == hits
    assert len(list(tmp_path.glob("store/shards/*.tar"))) == 2
    assert not list(tmp_path.glob("scratch/pull/*/*"))


def test_resume_fetches_nothing_that_had_landed(server, tmp_path):
    rows = [{"url": server.url(f"/img/{i}"), "text": f"a {i}"} for i in range(30)]
    ctx = context(tmp_path, {"web": {"table": table(tmp_path / "t.csv", rows)}})
    first = pull.run(ctx, "web")
    again = pull.run(ctx, "web")
    assert again == first and set(server.hits.values()) == {1}
    before = {path: path.read_bytes() for path in tmp_path.glob("store/shards/*")}
    lost = Path(first.shards[1].uri)
    lost.unlink()
    assert pull.run(ctx, "web") == first
    assert {path: path.read_bytes() for path in tmp_path.glob("store/shards/*")} == before
    assert [server.hits[f"/img/{i}"] for i in range(30)] == [1] * 10 + [2] * 10 + [1] * 10


def test_killed_in_the_middle_and_started_again_gives_the_same_manifest(server, tmp_path):
    rows = [{"url": server.url(f"/img/{i}"), "text": f"a {i}"} for i in range(60)] + [
        {"url": server.url("/status/410"), "text": "x"}
    ]
    uri = table(tmp_path / "t.csv", rows)
    server.gate_after = 35  # three shards of ten can land, then the server holds its answers back
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from vlmflow.curation import pull; from test_curation_pull import context\n"
        "pull.run(context(Path(sys.argv[2]), {'web': {'table': sys.argv[3]}}, timeout=60), 'web')"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}"}
    process = subprocess.Popen([sys.executable, "-c", program, str(here), str(tmp_path), uri], env=environment)
    assert server.waiting.wait(30)
    while not list(tmp_path.glob("store/shards/*.tar")) and process.poll() is None:
        time.sleep(0.01)  # the first shard has all its images; it needs a moment to be written
    process.send_signal(signal.SIGKILL)
    process.wait()
    landed = {p.name: p.read_bytes() for p in tmp_path.glob("store/shards/*.tar")}
    before = server.images
    server.gate_after = None
    server.released.set()
    manifest = pull.run(context(tmp_path, {"web": {"table": uri}}, timeout=60), "web")
    assert 0 < len(landed) <= 3
    assert 60 - 35 <= server.images - before <= 60 - 10 * len(landed)
    assert {name: (tmp_path / "store/shards" / name).read_bytes() for name in landed} == landed
    clean = context(tmp_path / "clean", {"web": {"table": uri}}, timeout=60)
    other = pull.run(clean, "web")
    assert [(s.sha256, s.samples) for s in other.shards] == [(s.sha256, s.samples) for s in manifest.shards]
    assert other.lineage == manifest.lineage


def test_a_resolved_recipe_asks_for_no_other_columns_than_the_written_one():
    """`dump` spells out every default; a table of conversations without a text column must stay fine."""
    written = SourceSpec(table="t.parquet", conversations_column="conversations")
    resolved = SourceSpec.model_validate(written.model_dump())
    assert columns_of(resolved) == columns_of(written)
    assert columns_of(resolved).optional == {"text"}
