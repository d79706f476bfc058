"""The manifest: a small, content-addressed JSON that *is* the dataset.

It lists shards (never rewritten), layers (what each step computed) and lineage. A dataset exists when its manifest
does; a Kubeflow dataset artifact holds nothing else.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from vlmflow import storage
from vlmflow.digest import digest
from vlmflow.errors import DataError


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardRef(_Frozen):
    """One tar: where, its hash, size in bytes, number of samples and the data source it came from.

    A tar that was adopted where it lay (`curation.adopt`) also names what we wrote about it: ``index`` (URI of the offsets),
    ``meta`` (URI of the samples' JSON, one a line, which the index's "json" members point into) and ``tar_sha256``. Its
    ``sha256``, the shard's identity everywhere, then covers all three, because equal tars may be adopted with other texts.
    """

    uri: str
    sha256: str
    bytes: int
    samples: int
    source: str
    index: str | None = None
    meta: str | None = None
    tar_sha256: str | None = None

    @property
    def content(self) -> str:
        """sha256 of the tar's bytes."""
        return self.tar_sha256 or self.sha256

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields of adopted tars are absent from others, whose manifests keep their digest."""
        return {name: value for name, value in dump(self).items() if value is not None}


def adopted_identity(tar_sha256: str, meta_sha256: str, index_sha256: str) -> str:
    """The identity of an adopted tar, from the hashes of its bytes, metas and index."""
    return digest({"tar": tar_sha256, "meta": meta_sha256, "index": index_sha256})


class LayerPart(_Frozen):
    """One Parquet file of a layer, for one shard; ``failed`` rows carry a reason in their ``error`` column."""

    uri: str
    sha256: str
    rows: int
    failed: int = 0


class LayerRef(_Frozen):
    """What one step computed: parts in shard order; ``digest`` covers step, version (of its code), parameters and layers read."""

    step: str
    digest: str
    params: dict[str, Any]
    version: int | None = None
    parts: list[LayerPart]
    summary: dict[str, Any] = Field(default_factory=dict)


class Lineage(_Frozen):
    """One step in the making of a dataset; ``parents`` are manifest digests."""

    step: str
    params: dict[str, Any] = Field(default_factory=dict)
    parents: list[str] = Field(default_factory=list)
    summary: dict[str, Any] = Field(default_factory=dict)


class Manifest(_Frozen):
    """A dataset."""

    version: int = 1
    name: str
    shards: list[ShardRef]
    layers: dict[str, LayerRef] = Field(default_factory=dict)
    lineage: list[Lineage] = Field(default_factory=list)

    @property
    def digest(self) -> str:
        """sha256 of the whole manifest: the dataset's identity."""
        return digest(self)

    @property
    def samples(self) -> int:
        """Number of samples over all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def sources(self) -> list[str]:
        """Names of the data sources, sorted."""
        return sorted({shard.source for shard in self.shards})

    def select(self, sources: list[str] | None) -> Manifest:
        """The same dataset with only some sources; None keeps all.

        Raises:
            DataError: a source that the dataset does not have.
        """
        if sources is None:
            return self
        if unknown := sorted(set(sources) - set(self.sources)):
            raise DataError(f"dataset '{self.name}' has no source {unknown}; it has {self.sources}")
        chosen = [i for i, shard in enumerate(self.shards) if shard.source in sources]
        layers = {
            name: layer.model_copy(update={"parts": [layer.parts[i] for i in chosen]})
            for name, layer in self.layers.items()
        }
        return self.model_copy(update={"shards": [self.shards[i] for i in chosen], "layers": layers})

    def layer(self, name: str) -> LayerRef:
        """A layer by name. Raises DataError listing those there are."""
        if name not in self.layers:
            raise DataError(
                f"dataset '{self.name}' has no layer '{name}'; it has {sorted(self.layers)}. Run the step that adds it first."
            )
        return self.layers[name]


def save(manifest: Manifest, root: str) -> str:
    """Store under ``{root}/manifests/{digest}.json``; returns the URI."""
    uri = storage.join(root, "manifests", f"{manifest.digest}.json")
    storage.write_json(uri, manifest.model_dump(mode="json"))
    return uri


def load(path_or_uri: str) -> Manifest:
    """Read a manifest. Raises DataError naming the field that is wrong."""
    data = storage.read_bytes(str(path_or_uri))
    try:
        return Manifest.model_validate(json.loads(data))
    except (ValueError, ValidationError) as error:
        raise DataError(f"{path_or_uri} is not a dataset manifest: {error}") from error
