"""The demo's data: the same bytes every time, nothing of a benchmark in training, faults in the numbers promised."""

import base64
import collections
import csv
import hashlib
import io
import json
import urllib.error
import urllib.request

import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmflow import demo
from vlmflow.demo import draw, site, wording
from vlmflow.demo.plan import Plan, Sizes

SMALL = Sizes(seed=48, web=100, base=60, charts=8, pairs=16, describe=16, digits=40, words=50, mcq=40, yesno=40)
TRAINING = ("seed", "texts", "web", "base", "charts", "pairs", "describe")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with demo.serve(tmp_path_factory.mktemp("state"), SMALL, port=0) as running:
        yield running


def table(served, name):
    path = served.path(site.TABLES[name])
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return pq.read_table(path).to_pylist()


def benchmark(served, name):
    csv.field_size_limit(1 << 30)
    with served.path(f"benchmarks/{name}.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def get(url):
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.status, reply.headers["Content-Type"], reply.read()


def files_of(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*.*")
        if p.is_file()
    }


def test_generating_twice_gives_the_same_bytes(tmp_path):
    tiny = Sizes(seed=16, web=20, base=20, charts=3, pairs=3, describe=3, digits=4, words=4, mcq=4, yesno=4)
    one, two = (site.build(tmp_path / name, tiny) for name in ("one", "two"))
    site.tables(one, demo.DEFAULT_URL)
    site.tables(two, demo.DEFAULT_URL)
    assert files_of(one) == files_of(two)
    assert len(files_of(one)) > 60


def test_a_finished_site_is_found_again_and_an_interrupted_one_is_not(tmp_path, monkeypatch):
    tiny = Sizes(seed=2, web=20, base=2, charts=1, pairs=1, describe=1, digits=2, words=2, mcq=2, yesno=2)
    write = site._write

    def interrupted(draft, plan):
        write(draft, plan)
        (draft / "rows" / "web.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(site, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        site.build(tmp_path, tiny)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(site, "_write", write)
    built = site.build(tmp_path, tiny)
    monkeypatch.setattr(site, "_write", None)
    assert site.build(tmp_path, tiny) == built


def test_no_scan_is_in_two_splits_and_no_font_in_both_halves():
    scans = Plan(SMALL).scans
    assert sum(len(part) for part in scans.values()) == 1797
    assert len({int(i) for part in scans.values() for i in part}) == 1797
    assert len(scans["benchmark"]) >= Sizes().digits
    assert not set(draw.TRAINING_FONTS) & set(draw.HELD_OUT_FONTS)


def test_no_benchmark_picture_is_in_a_training_table(served):
    """By the hash of the file and of its pixels, for every picture that any training table links to."""
    names = {row["url"].rsplit("/", 1)[1].partition(".")[0] for name in TRAINING for row in table(served, name)}
    training = [(served.root / "images" / f"{name}.png").read_bytes() for name in names]
    held_out = [base64.b64decode(row["image"]) for name in site.BENCHMARKS for row in benchmark(served, name)]

    def hashes(pictures):
        pixels = {hashlib.sha256(Image.open(io.BytesIO(data)).tobytes()).hexdigest() for data in pictures}
        return pixels | {hashlib.sha256(data).hexdigest() for data in pictures}

    assert len(training) > 200 and len(held_out) == 170
    assert not hashes(training) & hashes(held_out)


def test_broken_links_are_broken_in_the_way_and_number_promised(served):
    rows = table(served, "web")
    kinds = collections.Counter(row["url"].split("/")[3] for row in rows)
    broken = {k: kinds[k] for k in ("missing", "error", "pages", "truncated", "bomb")}
    assert broken == {"missing": 2, "error": 1, "pages": 1, "truncated": 1, "bomb": 1}
    assert sum(row["planted"] for row in rows) == 12
    by_kind = {row["url"].split("/")[3]: row["url"] for row in rows}
    for folder, status in (("missing", 404), ("error", 500)):
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError) as failure:
                get(by_kind[folder])
            assert failure.value.code == status
    assert get(by_kind["pages"])[1].startswith("text/html")
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(get(by_kind["truncated"])[2])).load()
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(get(by_kind["bomb"])[2]))
    assert Image.open(io.BytesIO(get(by_kind["moved"])[2])).height in (56, 112)


def test_a_slow_link_is_slow_once_and_served(served, monkeypatch):
    waits = []
    monkeypatch.setattr("vlmflow.demo.server.time.sleep", waits.append)
    url = next(row["url"] for row in table(served, "web") if "/slow/" in row["url"])
    assert get(url)[2] == get(url)[2]
    assert len(waits) == 1


def test_every_working_link_gives_the_picture_of_its_name(served):
    for name in TRAINING:
        for row in table(served, name)[:8]:
            if "/images/" in row["url"]:
                status, kind, data = get(row["url"])
                assert (status, kind) == (200, "image/png")
                assert hashlib.sha256(data).hexdigest()[:20] == row["url"].rsplit("/", 1)[1].removesuffix(".png")


def test_nothing_outside_the_site_is_served(served):
    with pytest.raises(urllib.error.HTTPError) as failure:
        get(f"{served.base_url}/images/../../port")
    assert failure.value.code == 404


def test_conversations_are_llava_turns_about_one_picture(served):
    for name in ("base", "charts", "pairs", "describe"):
        for row in table(served, name):
            turns = row["conversations"]
            turns = json.loads(turns) if isinstance(turns, str) else turns
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>\n") and turns[0]["value"].count("<image>") == 1
            assert all(t["value"].strip() for t in turns)


def test_benchmarks_are_valid_and_balanced(served):
    for name in site.BENCHMARKS:
        rows = benchmark(served, name)
        assert [row["index"] for row in rows] == [str(i) for i in range(len(rows))]
        splits = collections.Counter(row["split"] for row in rows)
        assert splits == {"selection": len(rows) * 2 // 5, "report": len(rows) - len(rows) * 2 // 5}
        for row in rows:
            assert Image.open(io.BytesIO(base64.b64decode(row["image"]))).height == 56
    for row in benchmark(served, "mcq"):
        options = [row[letter] for letter in "ABCD"]
        assert len(set(options)) == 4 and row["answer"] in "ABCD"
    for split in ("selection", "report"):
        answers = collections.Counter(r["answer"] for r in benchmark(served, "yesno") if r["split"] == split)
        assert abs(answers["Yes"] - answers["No"]) <= 2
    assert {row["answer"] for row in benchmark(served, "words")} == set(wording.VOCABULARY)
    assert all(row["answer"] in "0123456789" for row in benchmark(served, "digits"))


def test_a_taken_port_is_replaced_remembered_and_given_as_overrides(tmp_path):
    tiny = Sizes(seed=2, web=20, base=2, charts=1, pairs=1, describe=1, digits=2, words=2, mcq=2, yesno=2)
    recipe = {"data": {"web": {"table": f"{demo.DEFAULT_URL}/tables/web.parquet", "text_column": "text"}}}
    assert demo.fields(recipe) == {"data.web.table": "http://127.0.0.1:8765/tables/web.parquet"}
    with demo.serve(tmp_path / "other", tiny, port=0) as other:
        taken = int(other.base_url.rsplit(":", 1)[1])
        with demo.serve(tmp_path / "mine", tiny, port=taken) as mine:
            assert mine.base_url != other.base_url
            assert mine.overrides(demo.fields(recipe)) == [f"data.web.table={mine.base_url}/tables/web.parquet"]
            assert table(mine, "base")[0]["url"].startswith(mine.base_url + "/")
    with demo.serve(tmp_path / "mine", tiny) as again:
        assert again.base_url == mine.base_url


def test_tuning_asks_in_the_words_of_the_evaluation(served):
    from vlmflow.evaluation.prompts import build
    from vlmflow.evaluation.tsv import Table

    asked = [row["conversations"][0]["value"].removeprefix("<image>\n") for row in table(served, "base")]
    kinds = {"digits": "reading", "words": "reading", "mcq": "multiple_choice", "yesno": "yes_no"}
    for name, kind in kinds.items():
        rows = Table(served.path(f"benchmarks/{name}.tsv"), kind)
        assert rows.images(rows[0])[0].height == 56

        def shape(prompt):  # the frame of a prompt, without the digits and words asked about
            frame = [word for word in prompt.split() if word.strip("?") not in {*wording.VOCABULARY, *"0123456789"}]
            return " ".join(frame)

        prompts = {shape(build(question, kind)) for question in rows}
        assert prompts <= {shape(prompt) for prompt in asked}, name


def test_a_client_that_hangs_up_does_not_spoil_the_screen(served, capfd):
    import socket
    import struct

    host, port = served.base_url.removeprefix("http://").split(":")
    for request in (b"", b"GET /images/none.png HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(request)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    get(table(served, "seed")[0]["url"])
    assert capfd.readouterr().err == ""
