"""A local copy of a benchmark table, wherever the recipe says it is: a path, file://, s3:// or http(s)://.

Scores are cached under the table's hash, so the copy must be today's: an object is fetched once per process, and a web
address is asked whether it changed (ETag, Last-Modified).
"""

from __future__ import annotations

import http.client
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vlmflow import storage, web
from vlmflow.digest import digest
from vlmflow.errors import AccessDenied, NotFound, StorageError, Unreachable
from vlmflow.storage_file import full_disk, write_atomically

if TYPE_CHECKING:
    from vlmflow.recipe.results import BenchmarkSpec
    from vlmflow.step import Context

TIMEOUT = 60.0  # seconds without a byte
ATTEMPTS = 3
_fetched: dict[tuple[str, str], Path] = {}  # (uri, scratch) of this process


def table_of(ctx: Context, spec: BenchmarkSpec) -> Path:
    """`local_table` of a benchmark, with the hosts that the recipe allows although their address is private."""
    hosts = ctx.recipe.pull.allow_hosts if spec.table.startswith(web.SCHEMES) else ()
    return local_table(spec.table, ctx.scratch, hosts)


def local_table(uri: str, scratch: str | Path, allow_hosts: Iterable[str] = ()) -> Path:
    """The path of the table on this machine.

    Raises NotFound, Unreachable, AccessDenied (a private address that `allow_hosts` does not name) or another
    StorageError naming the address.
    """
    local = storage.local_path(uri)
    if local is not None:
        if not local.is_file():
            raise NotFound(f"benchmark table {local} is not there; check evaluation.benchmarks.*.table in the recipe")
        return local
    known = (uri, str(scratch))
    if known not in _fetched or not _fetched[known].exists():
        path = Path(scratch) / "benchmarks" / f"{digest(uri)[:24]}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        if uri.startswith(web.SCHEMES):
            _download(uri, path, allow_hosts)
        else:
            storage.get_file(uri, path)
        _fetched[known] = path
    return _fetched[known]


def _download(uri: str, path: Path, allow_hosts: Iterable[str]) -> None:
    memory = path.with_suffix(".etag.json")
    try:
        headers = json.loads(memory.read_text()) if path.exists() else {}
    except (OSError, ValueError):  # none yet, or another process is writing it
        headers = {}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            request = urllib.request.Request(uri, headers={"User-Agent": "vlmflow", **headers})
            with web.opener(allow_hosts).open(request, timeout=TIMEOUT) as reply:
                _receive(reply, path, memory)
            return
        except urllib.error.HTTPError as e:
            if e.code == 304:
                return
            if e.code in (404, 410):
                raise NotFound(f"benchmark table {uri}: the server answers {e.code} {e.reason}") from None
            problem = f"the server answers {e.code} {e.reason}"
            if e.code < 500 and e.code != 429:
                raise StorageError(f"benchmark table {uri}: {problem}") from None
        except (OSError, http.client.HTTPException) as e:
            if (full := full_disk(e)) is not None:
                raise full from e
            if refused := web.forbidden(e):
                raise AccessDenied(
                    f"benchmark table {uri}: {refused}, an address of a private network, which a recipe may not read. Name "
                    "the host in pull.allow_hosts if that is meant, or copy the table to the store."
                ) from None
            problem = f"{type(e).__name__}: {e}"
        if attempt == ATTEMPTS:
            raise Unreachable(
                f"benchmark table {uri} could not be fetched in {ATTEMPTS} attempts ({problem}). Start the server or "
                "copy the table to the store, then run again; finished benchmarks are kept."
            )


def _receive(reply: http.client.HTTPResponse, path: Path, memory: Path) -> None:
    memory.unlink(missing_ok=True)  # it must never describe another body

    def fill(file: BinaryIO) -> None:
        shutil.copyfileobj(reply, file, 1 << 20)
        found, expected = file.tell(), reply.headers.get("Content-Length")
        if expected is not None and found != int(expected):
            raise OSError(f"{found} of {expected} bytes arrived")

    write_atomically(path, fill)
    pairs = (("If-None-Match", reply.headers.get("ETag")), ("If-Modified-Since", reply.headers.get("Last-Modified")))
    memory.write_text(json.dumps({name: value for name, value in pairs if value}))
