"""What a fetcher must refuse, and why it is one small file: these are the rules a security review reads.

A URL table comes from strangers. Without a guard, `http://169.254.169.254/...` in a row makes the puller read the
cloud's metadata service, and a harmless looking host may resolve, or redirect, to an address inside the cluster.
Every address is therefore judged after name resolution and again at every redirect hop.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from functools import lru_cache

# Wrappers of an IPv4 address inside an IPv6 one besides the mapped form, which `ipaddress` unwraps itself.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")

# Directives of X-Robots-Tag that forbid use as training data. `none` is short for noindex + nofollow.
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none", "noml"})
_VALUED = frozenset({"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"})
_AGENT = re.compile(r"^([A-Za-z0-9_*.\-]+)\s*:\s*(.*)$")


class ForbiddenAddress(OSError):
    """The host resolves to an address that only the machine itself or its network may use."""

    def __init__(self, host: str, address: str):
        super().__init__(f"{host} is {address}")
        self.host, self.address = host, address


@lru_cache(4096)
def is_public(address: str) -> bool:
    """Whether an IP address (text, no brackets) may be fetched from: globally routable unicast, unwrapped first.

    Refuses private, loopback, link-local (the metadata services), CGNAT (100.64/10), multicast, reserved and
    unspecified addresses, in IPv4, IPv6 and IPv4 wrapped in IPv6 (mapped, compatible, 6to4, Teredo, NAT64).
    """
    try:
        ip = ipaddress.ip_address(address.split("%", 1)[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and (ip in _NAT64 or ip in _COMPATIBLE):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not ip.is_unspecified


@lru_cache(4096)
def literal_address(host: str) -> str | None:
    """The address that `host` spells out itself (`10.0.0.1`, `[::1]`), or None for a name that needs DNS.

    The loose IPv4 forms that C libraries accept (`127.1`, `0x7f000001`, `2130706433`) count as addresses too.
    """
    bare = host.strip("[]")
    try:
        return str(ipaddress.ip_address(bare.split("%", 1)[0]))
    except ValueError:
        pass
    if re.fullmatch(r"(0[xX][0-9a-fA-F]+|\d+)(\.(0[xX][0-9a-fA-F]+|\d+)){0,3}", bare):
        try:
            return socket.inet_ntoa(socket.inet_aton(bare))
        except OSError:
            return None
    return None


def opted_out(headers: Iterable[str], agent: str) -> str | None:
    """The X-Robots-Tag directive that keeps us from using an image, or None.

    `headers` are all values of X-Robots-Tag of the response; `agent` is our product name in lower case. Handles lists,
    several header lines, directives scoped to a user agent (`otherbot: noai` does not bind us) and directives with
    values (`max-image-preview:large`), where img2dataset's parser gives up (spec/data-eval-soup.md 1.2).
    """
    for header in headers:
        scope: str | None = None
        for token in header.split(","):
            token = token.strip()
            match = _AGENT.match(token)
            if match and match.group(1).lower() not in _VALUED:
                scope, token = match.group(1).lower(), match.group(2).strip()
            if token.lower() in OPT_OUT and scope in (None, "*", agent):
                return token.lower()
    return None
