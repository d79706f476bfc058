"""What makes a pull cheap keeps its promises: threads that start late, rare looks for cycles, whichever event loop, bodies
that stay in memory while there is room."""

from __future__ import annotations

import asyncio
import gc
import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from curation_server import picture, serving

from vlmflow.curation import fetch
from vlmflow.curation.allocator import CYCLES, few_collections
from vlmflow.curation.fetch_limits import Limits
from vlmflow.curation.judges import Judges
from vlmflow.curation.loop import run_loop


@pytest.mark.parametrize(("patience", "together"), [(0, True), (2, True), (3, False), (8, False)])
def test_a_second_thread_starts_only_when_enough_wait(patience: int, together: bool) -> None:
    """The first of four calls holds its thread: the others overtake it only where three that wait call for a second one."""
    may_end, order = threading.Event(), []

    def work(number: int) -> None:
        if not number:
            assert may_end.wait(60), "nobody let the first call end"
        order.append(number)

    async def main() -> None:
        with ThreadPoolExecutor(2) as pool:
            judge = Judges(pool, 2, patience)
            first = judge(work, 0)
            await asyncio.sleep(0)  # the first call is with its thread, alone
            await asyncio.sleep(0)
            others = [judge(work, number) for number in (1, 2, 3)]
            if together:
                await asyncio.gather(*others)
            else:
                with ThreadPoolExecutor(1) as another:  # time in which a second thread would have overtaken
                    await asyncio.get_running_loop().run_in_executor(another, sum, range(100_000))
            may_end.set()
            await asyncio.gather(first, *others)

    run_loop(main())
    assert order == ([1, 2, 3, 0] if together else [0, 1, 2, 3])


def test_every_call_is_answered_when_few_wait_and_a_call_fails() -> None:
    async def main() -> list[object]:
        with ThreadPoolExecutor(4) as pool:
            judge = Judges(pool, 4, patience=8)
            calls = [judge(lambda n: 12 // n, number % 4) for number in range(100)]
            return await asyncio.gather(*calls, return_exceptions=True)

    found = run_loop(main())
    assert [f for n, f in enumerate(found) if n % 4] == [12 // (n % 4) for n in range(100) if n % 4]
    assert all(isinstance(f, ZeroDivisionError) for f in found[::4])


def test_rare_looks_for_cycles_end_with_the_pull() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), few_collections():
        assert gc.get_threshold() == CYCLES and gc.isenabled()
        raise KeyError
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_without_uvloop_the_loop_is_that_of_asyncio(monkeypatch: pytest.MonkeyPatch) -> None:
    async def module() -> str:
        return type(asyncio.get_running_loop()).__module__

    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run_loop(module()).startswith("asyncio")


def test_uvloop_is_taken_where_it_is_installed() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert isinstance(run_loop(loop()), uvloop.Loop)


def test_bodies_wait_in_memory_only_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bodies of 600 kB that wait at the same time, with room for one; afterwards one alone."""
    monkeypatch.setattr(fetch, "IN_MEMORY", 1 << 20)
    whole, in_memory = picture(8) + bytes(600_000), []

    async def main(urls: list[str], bad: list[str]) -> None:
        everyone = asyncio.Event()

        async def use(body: io.IOBase) -> bytes:
            in_memory.append(isinstance(body, io.BytesIO))
            if len(in_memory) >= len(urls):
                everyone.set()
            await everyone.wait()
            body.seek(0)
            return body.read()

        limits = Limits(
            concurrency=16,
            max_bytes=1_000_000,
            retries=0,
            timeout=600,
            first_byte_timeout=600,
            allow_hosts=frozenset({"127.0.0.1"}),
        )
        async with fetch.Fetcher(limits) as fetcher:
            found = await asyncio.gather(*(fetcher.get(url, use) for url in urls))
            assert [f.used for f in found] == [whole] * len(urls)
            assert sum(in_memory) <= 1, "more waited in memory than there is room for"
            failed = await asyncio.gather(*(fetcher.get(url, use) for url in bad))
            assert [f.reason for f in failed] == ["too_large", "http_410", "too_large"]
            assert (await fetcher.get(urls[0], use)).used == whole and in_memory[-1]
            assert (await fetcher.get(urls[0])).data == whole
            assert fetcher._waiting == 0

    with serving() as server:
        urls = [server.url(f"/gzip/600000?{i}") for i in range(8)]
        run_loop(main(urls, [server.url("/endless"), server.url("/gone"), server.url("/gzip/2000000")]))
