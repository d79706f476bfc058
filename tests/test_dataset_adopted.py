"""References of adopted tars: absent from other manifests, verified together with what was written about them."""

from vlmflow.dataset.manifest import Manifest, ShardRef


def test_optional_fields_of_adopted_shards_change_no_older_digest():
    shard = ShardRef(uri="file:///s.tar", sha256="a" * 64, bytes=10, samples=7, source="base")
    manifest = Manifest(name="web", shards=[shard])
    assert manifest.digest == "974bd0209068ee1109569f37401dbdbe9d6fd15397c6b4de6d3abe33847996a4"
    assert list(manifest.model_dump(mode="json")["shards"][0]) == ["uri", "sha256", "bytes", "samples", "source"]
