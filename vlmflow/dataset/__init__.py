"""Shards, layers and manifests: images move once, results are added beside them."""
