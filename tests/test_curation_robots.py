"""robots.txt, asked once a host through the guarded client; and how busy and dead hosts are spared."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from vlmflow.curation.fetch import Fetcher
from vlmflow.curation.fetch_limits import Limits
from vlmflow.curation.hosts import GIVEN_UP, REGAIN, Host, Slots

pytestmark = pytest.mark.asyncio
HERE = frozenset({"127.0.0.1"})


@asynccontextmanager
async def serving(rules: web.Response | str | None):
    """A server with a robots.txt, which counts requests; yields (base URL, counts)."""
    hits: Counter[str] = Counter()

    async def handle(request: web.Request) -> web.StreamResponse:
        hits[request.path] += 1
        if request.path == "/robots.txt":
            if rules is None:
                raise web.HTTPNotFound
            if isinstance(rules, str):
                return web.Response(text=rules)
            return web.Response(status=rules.status, headers=dict(rules.headers))
        if request.path == "/moved":
            return web.Response(status=302, headers={"Location": "/secret/a"})
        return web.Response(body=b"picture")

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", hits
    finally:
        await runner.cleanup()


async def fetched(rules, *paths: str, **settings):
    async with serving(rules) as (base, hits):
        limits = Limits(allow_hosts=HERE, robots_txt=True, user_agent="vlmflow/1 (x)", retries=0, **settings)
        async with Fetcher(limits) as fetcher:
            found = await asyncio.gather(*(fetcher.get(base + path) for path in paths))
    return [f.reason for f in found], hits


RULES = "User-agent: *\nDisallow: /\n\nUser-agent: vlmflow\nDisallow: /secret/\nAllow: /\n"


@pytest.mark.parametrize(
    ("rules", "reasons"),
    [
        (RULES, [None, "robots_txt", "robots_txt"]),
        ("User-agent: otherbot\nDisallow: /\n", [None, None, None]),
        ("User-agent: *\nDisallow: /open", ["robots_txt", None, None]),
        ("", [None, None, None]),
        (None, [None, None, None]),
        (web.Response(status=403), [None, None, None]),
        (web.Response(status=500), ["robots_unknown"] * 3),
        (web.Response(status=429), ["robots_unknown"] * 3),
        (
            web.Response(status=302, headers={"Location": "http://169.254.169.254/robots.txt"}),
            ["forbidden_address"] * 3,
        ),
    ],
)
async def test_rules_are_asked_once_and_obeyed_on_every_hop(rules, reasons):
    found, hits = await fetched(rules, "/open/a", "/secret/b", "/moved")
    assert found == reasons
    assert hits["/robots.txt"] == 1 and not hits["/secret/a"] + hits["/secret/b"] - 2 * (reasons[1] is None)
    if reasons[0]:
        assert not hits["/open/a"]


async def test_without_the_setting_nobody_asks():
    async with serving(RULES) as (base, hits), Fetcher(Limits(allow_hosts=HERE)) as fetcher:
        assert (await fetcher.get(base + "/secret/a")).data == b"picture"
    assert not hits["/robots.txt"]


async def test_slots_may_shrink_and_grow_and_lose_nobody():
    slots, inside, most = Slots(4), 0, []

    async def visit(number: int) -> None:
        nonlocal inside
        async with slots:
            inside += 1
            most.append(inside)
            for _ in range(number % 3):
                await asyncio.sleep(0)
            inside -= 1

    tasks = [asyncio.create_task(visit(n)) for n in range(60)]
    await asyncio.sleep(0)
    slots.limit = 1
    for task in tasks[20:25]:
        task.cancel()
    await asyncio.gather(*tasks[:10])
    slots.limit = 3
    slots.wake()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert max(most) == 4 and slots.idle
    async with slots:
        assert not slots.idle


async def test_a_busy_host_is_asked_less_and_regains_by_good_answers():
    host = Host(4, dead_after=3)
    host.failed(connecting=False)
    for _ in range(9):
        host.busy(0.0)
    assert host.slots.limit == 1 and not host.dead and not host.hopeless
    for _ in range(3):
        host.busy(0.0)
    assert host.hopeless, "retries stop, attempts do not"
    assert host.given_up() is None
    for _ in range(3 * REGAIN):
        host.answered()
    assert host.slots.limit == 4 and not host.hopeless


async def test_a_dead_host_is_given_up_but_probed():
    host = Host(4, dead_after=3)
    for _ in range(3):
        assert not host.hopeless
        host.failed(connecting=True)
    assert host.dead and host.hopeless and host.given_up() is None
    for _ in range(3 * GIVEN_UP):
        host.failed(connecting=True)
    assert host.given_up() is None, "the probe"
    assert "none succeeded" in str(host.given_up())
    host.answered()
    assert not host.dead and host.given_up() is None
