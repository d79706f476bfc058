"""WebDataset tars that exist already become shards where they lie: never copied, never changed.

One pass over a tar groups its members into samples, checks every picture as the puller does, and hashes the whole; what we
know about it (offsets, our metas, refused samples) is written under `{root}/adopted/`. A later run finds that by the tar's
address, its stamp in the store (size, ETag, times) and the settings, without reading it; a tar whose stamp changed is read
again, and one that changed unnoticed is refused by its hash when samples are read.
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vlmflow import storage
from vlmflow.curation.accept import Rejected, accept
from vlmflow.curation.pull_shard import COLUMNS, Result, failures_parquet, meta_of, parse_failures
from vlmflow.curation.table import Columns, Row, row_of
from vlmflow.curation.tar_stream import Member, TarStream, members
from vlmflow.curation.turns import utf8
from vlmflow.dataset.manifest import ShardRef, adopted_identity
from vlmflow.digest import canonical, digest, sha256_bytes
from vlmflow.errors import DataError, NotFound

VERSION = 1  # raise when the same tar and settings would give other samples
MAX_TEXT = 8 << 20  # bytes of one text or JSON member
MAX_MEMBERS = 1000  # of one sample
WAITING = 64 << 20  # bytes of pictures that wait for a thread
IGNORED = 100  # kinds of members that are counted one by one
THREADS = 4
_IMAGE = re.compile(r"(?:(?:img|image)?[_-]?(\d+)\.)?(?:jpe?g|png|webp)$")
_OTHER_IMAGE = re.compile(r"(?:(?:img|image)?[_-]?\d+\.)?(?:gif|bmp|tiff?)$")
_TEXTS = ("txt", "text", "caption")
_UNCHANGED = "the tar is not changed, so it cannot be converted"


@dataclass
class Adopted(Result):
    """An adopted tar; nothing of ours lies beside it."""

    def doubt(self) -> None:
        """Nothing to ask again: the tar is what it is."""


@dataclass(frozen=True)
class Adopter:
    """Adopts the tars of one source. `settings` is recipe.pull."""

    root: str
    source: str
    columns: Columns
    licence: str | None
    settings: Any

    def adopt(self, uri: str, position: int) -> Adopted:
        """The tar at `uri`, the one at `position` of its source, as a shard; read only where no earlier run has read it.

        Raises:
            NotFound: there is none. DataError: it is no plain whole tar, or changed while it was read.
        """
        params = {
            "version": VERSION,
            "source": self.source,
            "position": position,
            "columns": {**vars(self.columns), "optional": sorted(self.columns.optional)},
            "licence": self.licence,
            **{name: getattr(self.settings, name) for name in ("max_bytes", "max_pixels", "proof")},
        }
        stamp = storage.stamp(uri)
        seen = storage.join(self.root, "adopted", "seen", f"{digest([uri, stamp, params])[:32]}.json")
        known = _known(seen, uri)
        if known:
            return known
        result = _Reading(self, uri, position, digest(params)[:12]).run()
        if storage.stamp(uri) != stamp:
            raise DataError(
                f"{uri} was changed while it was read; let whoever writes it finish, then run the command again"
            )
        storage.write_json(seen, {"uri": uri, "stamp": stamp, "record": result[1]})
        return result[0]


def _known(seen: str, uri: str) -> Adopted | None:
    """What an earlier run wrote about the tar; None when there is nothing, or not all of it is there."""
    try:
        record = storage.read_json(storage.read_json(seen)["record"])
        ref = ShardRef.model_validate({**record["ref"], "uri": uri})
        failures, _ = parse_failures(storage.read_bytes(record["failures"]))
        assert ref.index and ref.meta
        index, meta = storage.read_bytes(ref.index), storage.read_bytes(ref.meta)
        if adopted_identity(ref.content, sha256_bytes(meta), sha256_bytes(index)) != ref.sha256:
            return None
        return Adopted(ref, record["rows"], len(failures), failures, {})
    except (NotFound, DataError, KeyError, TypeError, ValueError, AssertionError):
        return None


class _Seen(NamedTuple):
    """What was found of a picture; its bytes are let go."""

    about: dict[str, Any]
    converted_from: str | None


@dataclass
class _Group:
    """Members that make one sample, while they pass by."""

    key: str
    images: list[tuple[int, str, Member, Future[_Seen]]] = field(default_factory=list)  # order, name, where, verdict
    texts: dict[str, bytes] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    problem: tuple[str, str] | None = None


class _Reading:
    """One pass over one tar."""

    def __init__(self, adopter: Adopter, uri: str, position: int, settings: str) -> None:
        self.adopter, self.uri, self.position, self.settings = adopter, uri, position, settings
        self.index: dict[str, dict[str, list[int]]] = {}
        self.metas: list[bytes] = []
        self.end = 0
        self.failures: list[dict[str, Any]] = []
        self.ignored: Counter[str] = Counter()
        self.fields: set[str] = set()
        self.rows = self.repeated = 0
        self._columns = adopter.columns
        self._pool: ThreadPoolExecutor

    def run(self) -> tuple[Adopted, str]:
        """The shard, and the URI of its record."""
        with (
            TarStream(self.uri) as stream,
            ThreadPoolExecutor(THREADS, thread_name_prefix="adopt") as self._pool,
        ):
            for group in self._groups(stream):
                self._finish(group)
        self._check_columns()
        return self._write(stream)

    def _groups(self, stream: TarStream) -> Iterator[_Group]:
        """Samples in order; a few wait for their pictures, whose bytes in memory stay below `WAITING`."""
        waiting: deque[_Group] = deque()
        held: deque[tuple[int, Future[_Seen]]] = deque()
        current: _Group | None = None
        keys: set[str] = set()
        for member in members(stream, self._wanted, lambda: len(keys) + self.repeated - 1 if keys else 0):
            key, extension = _split(member.name)
            if not key.rsplit("/", 1)[-1]:  # hidden files, as macOS and the Hub leave them
                self._ignore("(hidden)")
                continue
            if current is None or key != current.key:
                if current is not None:
                    waiting.append(current)
                while len(waiting) > 64 or (waiting and all(f.done() for *_, f in waiting[0].images)):
                    yield waiting.popleft()
                current = _Group(key)
                self.repeated += key in keys
                keys.add(key)
            future = self._take(current, member, extension)
            if future is not None:
                held.append((member.size, future))
            while held and (held[0][1].done() or sum(size for size, _ in held) > WAITING):
                held.popleft()[1].exception()  # waits; the verdict is looked at in its turn
        yield from waiting
        if current is not None:
            yield current

    def _wanted(self, name: str, size: int) -> bool:
        extension = _split(name)[1]
        if _IMAGE.match(extension):
            return size <= self.adopter.settings.max_bytes
        return (extension == "json" or extension in _TEXTS) and size <= MAX_TEXT

    def _take(self, group: _Group, member: Member, extension: str) -> Future[_Seen] | None:
        """Put a member into its sample; returns the verdict to come of a picture."""
        image = _IMAGE.match(extension)
        if not image and extension != "json" and extension not in _TEXTS and not member.problem:
            if _OTHER_IMAGE.match(extension):
                group.problem = group.problem or ("not_kept", f"'{extension}': {_UNCHANGED}")
            self._ignore(extension)
            return None
        if member.problem:
            group.problem = group.problem or ("bad_member", member.problem)
        elif extension in group.seen:
            group.problem = group.problem or ("duplicate_member", f"'{extension}' stands twice in sample '{group.key}'")
        elif len(group.seen) >= MAX_MEMBERS:
            group.problem = group.problem or ("too_large", f"more than {MAX_MEMBERS} members")
        elif member.data is None:
            limit = self.adopter.settings.max_bytes if image else MAX_TEXT
            group.problem = group.problem or (
                "too_large",
                f"'{extension}' has {member.size} bytes, the limit is {limit}",
            )
        elif image:
            group.seen.add(extension)
            verdict = self._pool.submit(self._judge, member.data)
            order = int(image[1]) if image[1] else -1
            group.images.append((order, extension, member._replace(data=None), verdict))
            return verdict
        else:
            group.seen.add(extension)
            group.texts[extension] = member.data
        return None

    def _ignore(self, extension: str) -> None:
        """Count a member that is no part of a sample."""
        self.ignored[extension if extension in self.ignored or len(self.ignored) < IGNORED else "(others)"] += 1

    def _judge(self, data: bytes) -> _Seen:
        image = accept(data, self.adopter.settings.max_pixels, None, self.adopter.settings.proof)
        return _Seen(image.about(sha256_bytes(image.data)), image.converted_from)

    def _finish(self, group: _Group) -> None:
        """Write a sample down, or why it is none."""
        number = self.rows
        self.rows += 1
        key = f"{self.adopter.source}-{self.position:05d}-{number:06d}"
        described, places = [], {}
        problem = group.problem
        pictures = sorted(group.images, key=lambda image: image[0])
        for place, (_, extension, member, future) in enumerate(pictures):
            try:
                image = future.result()
            except Rejected as refusal:
                problem = problem or (refusal.reason, f"{extension}: {refusal.detail}")
                continue
            if image.converted_from:
                problem = problem or ("not_kept", f"'{extension}' is {image.converted_from}; {_UNCHANGED}")
            described.append(image.about)
            kind = image.about["format"]
            places[kind if len(pictures) == 1 else f"{place}.{kind}"] = [member.offset, member.size]
        row, unread = self._row(group, number)
        name = row.id or utf8(group.key)
        problem = problem or unread or row.problem
        url = row.urls[0] if row.urls else None
        if problem:
            cells = (number, key, self.adopter.source, url or name, "", *problem)
            self.failures.append(dict(zip(COLUMNS, cells, strict=True)))
            return
        meta = canonical(meta_of(row, name, url, self.adopter.source, self.adopter.licence, described))
        self.index[key] = {**places, "json": [self.end, len(meta)]}
        self.metas.append(meta + b"\n")
        self.end += len(meta) + 1

    def _row(self, group: _Group, number: int) -> tuple[Row, tuple[str, str] | None]:
        """What JSON and text say, as a row of a table."""
        problem, record, columns = None, {}, self._columns
        try:
            if "json" in group.texts:
                record = json.loads(group.texts["json"])
            text = next((group.texts[name].decode() for name in _TEXTS if name in group.texts), None)
        except (ValueError, RecursionError) as error:
            record, text, problem = {}, None, ("bad_json" if "json" in group.texts else "bad_text", str(error)[:200])
        if not isinstance(record, dict):
            record, problem = {}, ("bad_json", f"a {type(record).__name__}, not an object")
        if columns.text and text is not None:
            record = {columns.text: text, **record}
        named = {n for kind in ("url", "text", "conversations", "id") if (n := getattr(columns, kind))}
        pairs = columns.preferences
        named |= {pairs} if isinstance(pairs, str) else set(pairs or ())
        self.fields |= record.keys() if len(self.fields) < 1000 else record.keys() & named
        return row_of(number, record, columns, named, images=len(group.images)), problem

    def _check_columns(self) -> None:
        """A named field that no sample has is a mistake of the recipe, not of the data."""
        for kind in ("text", "conversations", "url", "id"):
            name = getattr(self._columns, kind)
            if name and name not in self.fields and kind not in self._columns.optional and self.rows:
                raise DataError(
                    f"{self.uri}: no sample has a JSON field '{name}'; there are {sorted(self.fields)[:40]}. Set {kind}_column of source "
                    f"'{self.adopter.source}' to the one that holds the {kind}, or to null if there is none."
                )

    def _write(self, stream: TarStream) -> tuple[Adopted, str]:
        """Put index, metas and failures in the store, their record last."""
        base = storage.join(self.adopter.root, "adopted", f"{stream.sha256[:24]}-{self.settings}")
        index, metas = canonical(self.index), b"".join(self.metas)
        names = {"index": f"{base}.idx.json", "meta": f"{base}.meta.jsonl", "failures": f"{base}.failures.parquet"}
        about = {"rows": self.rows, "ignored": dict(sorted(self.ignored.items())), "repeated_keys": self.repeated}
        ref = ShardRef(
            uri=self.uri,
            sha256=adopted_identity(stream.sha256, sha256_bytes(metas), sha256_bytes(index)),
            bytes=stream.size,
            samples=len(self.index),
            source=self.adopter.source,
            index=names["index"],
            meta=names["meta"],
            tar_sha256=stream.sha256,
        )
        storage.write_bytes(names["index"], index)
        storage.write_bytes(names["meta"], metas)
        storage.write_bytes(names["failures"], failures_parquet(self.failures, about))
        record = f"{base}.json"
        storage.write_json(record, {**about, "ref": ref.model_dump(exclude={"uri"}), "failures": names["failures"]})
        return Adopted(ref, self.rows, len(self.failures), self.failures, {}), record


def _split(name: str) -> tuple[str, str]:
    """Sample key and extension of a member's name, as WebDataset splits them: at the first dot of the last part."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
