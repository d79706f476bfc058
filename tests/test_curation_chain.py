"""phash, clean, contamination, dedup and keep one after the other: the same manifest whatever the grouping and restarts."""

from dataclasses import replace
from types import SimpleNamespace

from curation_world import context, dataset, seal_layer
from test_curation_dedup import encoded, picture, sample

from vlmflow import storage
from vlmflow.curation import clean, contamination, dedup, keep, phash
from vlmflow.dataset.groups import cut, deal
from vlmflow.dataset.layer import read_layer
from vlmflow.evaluation.tsv import write_table

ROW_LOCAL = (phash, clean, contamination)


def world(folder, root):
    """30 samples in 10 shards: every third picture is a copy, one stands in a benchmark, some texts fail a check."""
    samples = [
        sample(f"k{n:02d}", encoded(picture(n - n % 3), "JPEG", quality=95 - 20 * (n % 3)), text=f"A dog near tree {n}" * (n % 5 > 0))
        for n in range(30)
    ]  # fmt: skip
    data = dataset(folder / "d", samples, 3, ("a", "b"))
    table = folder / "b.tsv"
    write_table(table, [{"index": "1", "question": "What?", "answer": "dog", "image": picture(9)}])
    ctx = replace(
        context(folder, clean={"text": "alt"}, dedup={}, contamination={}, perplexity={"text": "alt"}, keep={"fraction": 0.5}),
        root=str(root),
    )  # fmt: skip
    ctx.recipe.evaluation = SimpleNamespace(benchmarks={"b": SimpleNamespace(table=str(table), kind="reading")})
    rows = {s.key: {"key": s.key, "ppl": float(1 + n * 7 % 11)} for n, s in enumerate(samples)}
    return ctx, seal_layer(ctx, data, "ppl", params={}, version=1, schema={"ppl": "float"}, rows=rows)


def finished(ctx, data, groups):
    for step in ROW_LOCAL:
        for group in deal(data, groups) if groups else ():
            step.run(replace(ctx, parts_only=True), cut(data, group))
        data = step.run(ctx, data)
    return keep.run(ctx, dedup.run(ctx, data))


def test_any_grouping_and_a_second_run_give_the_same_manifest(tmp_path):
    ctx, data = world(tmp_path, tmp_path / "root")
    made = finished(ctx, data, 0)
    assert finished(ctx, data, 4).digest == made.digest
    found = {
        uri: storage.read_bytes(uri) for uri in (part.uri for layer in made.layers.values() for part in layer.parts)
    }
    for number, uri in enumerate(found):
        if number % 3 == 0:  # as if killed before they were written
            storage.delete(uri)
    for shard, part in zip(data.shards, data.layers["ppl"].parts, strict=True):
        if not storage.exists(part.uri):
            storage.write_bytes(part.uri, found[part.uri])
        assert shard.samples == part.rows
    again = finished(ctx, data, 3)
    assert again.digest == made.digest and {uri: storage.read_bytes(uri) for uri in found} == found


def test_each_sample_stays_or_has_the_first_reason_that_applies(tmp_path):
    sealed = finished(*world(tmp_path, tmp_path / "root"), 2)
    rows = read_layer(sealed, "keep")
    reasons = {key: row["reason"].split(" ")[0] for key, row in rows.items()}
    assert reasons["k00"] == "clean:" and reasons["k05"] == "clean:"  # no text
    assert reasons["k09"] == "stands" and rows["k11"]["reason"].startswith("repeats k09 (near")
    assert reasons["k01"] == reasons["k02"] == "repeats" and reasons["k12"] == "perplexity"
    summary = sealed.layers["keep"].summary
    assert summary["benchmarks"] == {"b": {"items": 1, "found": 0, "share": 0.0}}
    ranked = [key for key, row in rows.items() if row["rank"] is not None]
    assert summary["kept"] == sum(row["keep"] for row in rows.values()) == (len(ranked) + 1) // 2
    assert sum(summary["dropped"].values()) + len(ranked) == 30
