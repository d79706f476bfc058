"""Real small data for a laptop run, served over HTTP.

`serve(state_dir)` makes the site once and serves it while the `with` block runs:

    with serve(".vlmflow") as demo:
        recipe = load("recipes/points-tiny.yaml", demo.overrides(...))

The tiny recipe names its tables at the default address http://127.0.0.1:8765. When that port is taken, another is
chosen, remembered under `state_dir` and given back as recipe overrides, so that a second run finds the same URLs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlmflow.demo.plan import Sizes

DEFAULT_PORT = 8765
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"

__all__ = ["DEFAULT_PORT", "DEFAULT_URL", "Demo", "Sizes", "serve"]


@dataclass(frozen=True)
class Demo:
    """A site that is being served. `root` holds images/ and benchmarks/, `tables` holds tables/."""

    base_url: str
    root: Path
    tables: Path

    def path(self, url_path: str) -> Path:
        """The file behind `benchmarks/digits.tsv` or `tables/web.parquet`."""
        return next(p for p in (self.root / url_path, self.tables / url_path) if p.is_file())

    def overrides(self, sources: dict[str, str]) -> list[str]:
        """Recipe overrides `field=url` for every entry (field -> URL at the default address) when the port differs.

        `sources` comes from the recipe (`vlmflow.demo.fields(recipe)`), so nothing here repeats its layout.
        """
        if self.base_url == DEFAULT_URL:
            return []
        return [f"{name}={url.replace(DEFAULT_URL, self.base_url, 1)}" for name, url in sorted(sources.items())]


def fields(tree: object, prefix: str = "") -> dict[str, str]:
    """Every field of a recipe (as nested dicts) whose value is a URL of the demo site at its default address."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in fields(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: tree} if isinstance(tree, str) and tree.startswith(DEFAULT_URL + "/") else {}


@contextmanager
def serve(state_dir: str | Path, sizes: Sizes | None = None, port: int = DEFAULT_PORT) -> Iterator[Demo]:
    """Generate the site under `state_dir`/demo if needed and serve it on 127.0.0.1 until the block ends.

    The port is the one remembered from last time, else `port`, else any free one; `port=0` asks for any free one.
    """
    from vlmflow.demo import site
    from vlmflow.demo.server import Site

    folder = Path(state_dir) / "demo"
    root = site.build(folder, sizes)
    remembered = folder / "port"
    wanted = int(remembered.read_text()) if remembered.is_file() else port
    try:
        server = Site(wanted)
    except OSError:
        server = Site(0)
    if server.server_address[1] != wanted or not remembered.is_file():
        remembered.write_text(str(server.server_address[1]))
    thread = threading.Thread(target=server.serve_forever, name="vlmflow-demo-site", daemon=True)
    try:
        tables = site.tables(root, server.base_url)
        server.roots = [root, tables]
        thread.start()
        yield Demo(server.base_url, root, tables)
    finally:
        if thread.is_alive():
            server.shutdown()
            thread.join()
        server.server_close()
