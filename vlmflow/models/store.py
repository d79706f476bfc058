"""Models in the store: a complete Hugging Face folder, hashed file by file, whole or absent.

``model.json`` is put last and is the marker: a model without it does not exist. A Kubeflow model artifact holds that
JSON and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vlmflow import storage
from vlmflow.digest import digest, sha256_file
from vlmflow.errors import ModelError, NotFound

if TYPE_CHECKING:
    from vlmflow.step import Context

MARKER = "model.json"
BEHAVIOUR = (".json", ".jinja", ".txt", ".model", ".safetensors")  # files that decide what a model says and learns


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRef(_Frozen):
    """One file of a model: path relative to the folder, sha256, size in bytes."""

    path: str
    sha256: str
    bytes: int

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        """A reference is read from a store: it must not make a download write outside its folder."""
        if not path or path.startswith("/") or "\\" in path or ".." in path.split("/"):
            raise ValueError(f"'{path}' does not lie inside the model's folder")
        return path


class ModelLineage(_Frozen):
    """How weights came to be.

    Attributes:
        parents: weight hashes this model was made from.
        ancestor: weight hash of the common start; only models that share it may be averaged (points.md 7.3).
        data: manifest digests seen in training.
        log_uri: training log (JSON lines), if the model was trained.
    """

    step: str
    stage: str = ""
    params: dict[str, Any] = Field(default_factory=dict)
    parents: list[str] = Field(default_factory=list)
    ancestor: str = ""
    data: list[str] = Field(default_factory=list)
    log_uri: str | None = None


class ModelRef(_Frozen):
    """A model in the store; ``weights_sha256`` is its identity."""

    name: str
    uri: str
    files: list[FileRef]
    weights_sha256: str
    lineage: ModelLineage


def weights_digest(files: list[FileRef]) -> str:
    """Identity of the weights: digest over the hashes of all ``*.safetensors`` files."""
    return digest([[f.path, f.sha256] for f in sorted(files, key=lambda f: f.path) if f.path.endswith(".safetensors")])


def behaviour_digest(files: Iterable[FileRef]) -> str:
    """Identity of what a model does: weights, configuration, tokenizer, template, processor.

    Weights alone do not tell: two random starts of one seed have equal weights under different tokenizers, tile limits
    or encoder weightings, and train to different models.
    """
    return digest(sorted([f.path, f.sha256] for f in files if f.path.endswith(BEHAVIOUR)))


def describe_files(folder: str | Path) -> list[FileRef]:
    """Hash every file of a folder, sorted by path; marker and hidden files left out."""
    folder = Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER and not p.name.startswith("."))
    return [
        FileRef(path=p.relative_to(folder).as_posix(), sha256=sha256_file(p), bytes=p.stat().st_size) for p in paths
    ]


def publish(ctx: Context, local_dir: str | Path, name: str, lineage: ModelLineage, key: str) -> ModelRef:
    """`publish_under` the root of a step."""
    return publish_under(ctx.root, local_dir, name, lineage, key)


def marker_uri(root: str, key: str) -> str:
    """Where the reference of a model lies once it is published."""
    return storage.join(root, "models", key, MARKER)


def publish_under(root: str, local_dir: str | Path, name: str, lineage: ModelLineage, key: str) -> ModelRef:
    """Upload a folder to ``{root}/models/{key}/``, the marker last.

    Raises:
        ModelError: the folder has no weights.
    """
    files = describe_files(local_dir)
    if not any(f.path.endswith(".safetensors") for f in files):
        raise ModelError(
            f"{local_dir} has no *.safetensors among its {len(files)} files; nothing to publish as model '{name}'"
        )
    uri = storage.join(root, "models", key)
    for file in files:
        storage.put_file(Path(local_dir) / file.path, storage.join(uri, file.path))
    ref = ModelRef(name=name, uri=uri, files=files, weights_sha256=weights_digest(files), lineage=lineage)
    storage.write_json(storage.join(uri, MARKER), ref.model_dump(mode="json"))
    return ref


def find(ctx: Context, key: str) -> ModelRef | None:
    """The model published under ``key``, or None."""
    uri = marker_uri(ctx.root, key)
    return load_ref(uri) if storage.exists(uri) else None


def fetch(ref: ModelRef, scratch: str | Path | None = None) -> Path:
    """A local folder with the model; every file's hash is verified.

    Raises:
        ModelError: a file is missing or was changed or cut, and how the model is made again.
    """
    if (local := storage.local_path(ref.uri)) is not None:
        for file in ref.files:
            _verify(ref, file, local / file.path)
        return local
    base = Path(scratch or storage.default_scratch()) / "models"
    folder = base / digest([f.model_dump() for f in ref.files])[:32]
    done = folder / ".complete"
    if not done.exists():
        for file in ref.files:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(NotFound):  # said by the check
                storage.get_file(storage.join(ref.uri, file.path), target)
            _verify(ref, file, target)
        done.touch()
    return folder


def plain_folder(uri: str, scratch: str | Path | None = None) -> ModelRef:
    """Reference of a folder that no step published (a download of the Hugging Face hub, say): hashed here.

    From a store, its files are copied into `scratch` once. Only safetensors weights are looked at.
    Raises ModelError when the folder has no config.json or no such weights.
    """
    local = storage.local_path(uri)
    if local is not None:
        found = {path.name: path.stat().st_size for path in local.iterdir() if path.is_file()} if local.is_dir() else {}
    else:
        above = uri.rstrip("/") + "/"
        found = {o.uri.removeprefix(above): o.size for o in storage.list_uris(above)}
    wanted = {path: size for path, size in sorted(found.items()) if path.endswith(BEHAVIOUR) and "/" not in path}
    if "config.json" not in wanted or not any(path.endswith(".safetensors") for path in wanted):
        raise ModelError(
            f"{uri} holds {len(found)} files and is neither a model of this store ({MARKER} is missing) nor a Hugging Face folder with "
            "config.json and *.safetensors; weights in other formats can run code when they are read, so convert them first"
        )
    if (folder := local) is None:
        folder = Path(scratch or storage.default_scratch()) / "models" / f"plain-{digest([uri, wanted])[:32]}"
        for path in wanted:
            if not (folder / path).exists():
                storage.get_file(storage.join(uri, path), folder / path)
    files = [f for f in describe_files(folder) if f.path in wanted]
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    lineage = ModelLineage(step="plain folder")
    return ModelRef(name=name, uri=str(folder), files=files, weights_sha256=weights_digest(files), lineage=lineage)


def _verify(ref: ModelRef, file: FileRef, path: Path) -> None:
    if path.is_file() and (found := sha256_file(path)) == file.sha256:
        return
    size = path.stat().st_size if path.is_file() else 0
    what = f"has {size} bytes and sha256 {found[:16]}…" if path.is_file() else "is missing"
    if storage.local_path(ref.uri) is None:
        path.unlink(missing_ok=True)  # our copy; the store's own file is left for its owner to look at
    raise ModelError(
        f"model '{ref.name}': {file.path} {what}, {file.bytes} bytes with sha256 {file.sha256[:16]}… were recorded: the copy in the "
        f"store was changed or cut after it was written, and what it would say is not what was trained. Delete "
        f"{storage.join(ref.uri, MARKER)} and run the same command again; step '{ref.lineage.step}' then makes it anew."
    )


def load_ref(path_or_uri: str | Path) -> ModelRef:
    """Read a reference (a model artifact or a marker). Raises ModelError when it is not one."""
    data = storage.read_bytes(str(path_or_uri))
    try:
        return ModelRef.model_validate(json.loads(data))
    except (ValueError, ValidationError) as error:
        raise ModelError(
            f"{path_or_uri} holds {len(data)} bytes that are not a model reference: it was cut or changed. Delete it and run the same "
            f"command again; the step that made the model makes it anew. ({error})"
        ) from error


def dump_ref(ref: ModelRef, path: str | Path) -> None:
    """Write a reference as JSON (to an artifact path)."""
    storage.write_json(str(path), ref.model_dump(mode="json"))
