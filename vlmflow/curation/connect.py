"""Connections that cannot reach into our own network: addresses are judged after name resolution and again as each
socket is opened.

The second look matters because a client may skip resolution: `http://①②⑦.0.0.1/` is a name to a parser and an address
after Unicode normalisation, and a name may resolve differently a moment later.
"""

from __future__ import annotations

import socket
from typing import Any

from vlmflow.curation.guards import ForbiddenAddress, is_public

RESOLVERS = 32  # names that are looked up at a time
IDLE_SECONDS = 2.0  # an unused connection is kept: a table of the open web leaves hundreds a second behind
DNS_SECONDS = 300  # a resolved name is believed so long


def connector(allow_hosts: frozenset[str]) -> Any:
    """An aiohttp connector that opens sockets to public addresses and to those of `allow_hosts` only.

    Its requests fail with ForbiddenAddress (as `os_error`) otherwise.
    """
    from concurrent.futures import ThreadPoolExecutor

    import aiohttp
    from aiohttp.abc import AbstractResolver

    allowed = {host.strip("[]") for host in allow_hosts}

    class Guarded(AbstractResolver):
        """Refuses a host of which any address is not public: the check and the connection see the same answer."""

        def __init__(self) -> None:
            self._pool = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="dns")  # the loop's own has six threads here

        async def resolve(self, host: str, port: int = 0, family: Any = 0) -> Any:
            import asyncio

            found = await asyncio.get_running_loop().run_in_executor(self._pool, _lookup, host, port, family)
            if host.lower() in allow_hosts:
                allowed.update(entry["host"] for entry in found)
                return found
            for entry in sorted(found, key=lambda e: e["host"]):
                if not is_public(entry["host"]):
                    raise ForbiddenAddress(host, entry["host"])
            return found

        async def close(self) -> None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def opened(info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        if address[0] not in allowed and not is_public(address[0]):
            raise ForbiddenAddress(address[0], address[0])
        return socket.socket(family, kind, protocol)

    return aiohttp.TCPConnector(
        limit=0, resolver=Guarded(), ttl_dns_cache=DNS_SECONDS, keepalive_timeout=IDLE_SECONDS, socket_factory=opened
    )


def _lookup(host: str, port: int, family: int) -> list[dict[str, Any]]:
    """All addresses of a host, as aiohttp wants them."""
    found = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [
        {"hostname": host, "host": address[0], "port": address[1], "family": kind, "proto": protocol, "flags": 0}
        for kind, _, protocol, _, address in found
        if len(address) < 4 or not address[3]  # a link-local IPv6 address has a scope and is never public
    ]
