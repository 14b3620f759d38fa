"""Webhooks: which addresses may be called, and one call to one of them.

A caller chooses the address, and the service calls it from inside its network: private addresses are refused, by what
the name resolves to, and the call goes to the address that was checked, whatever the name resolves to later. Redirects
are not followed.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import socket
import ssl
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

from harness.errors import InputError

TIMEOUT_S = 10.0
_MOST_URL = 2000
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class HookAddress:
    """A checked address: the URL's parts, and the IP address to connect to."""

    scheme: str
    host: str
    port: int
    path: str
    ip: str


def checked(url: str, private: bool) -> HookAddress:
    """Resolve a webhook's URL and check every address of it; blocks. Raises InputError for one that is refused."""
    if len(url) > _MOST_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"the webhook is not a URL of at most {_MOST_URL} printable ASCII characters")
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        raise InputError("the webhook is not a URL: write https://host/path") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise InputError("the webhook must begin with https:// or http:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise InputError("the webhook must not hold a user or password")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    addresses = _resolved(parts.hostname, port)
    if not private and (refused := [each for each in addresses if not _is_public(each)]):
        raise InputError(
            f"the webhook's host {parts.hostname} has the address {refused[0]}, which is not a public one: use a "
            "public address (or ask the operator to allow private ones)"
        )
    return HookAddress(parts.scheme, parts.hostname, port, path, addresses[0])


def call(address: HookAddress, event: dict) -> int:
    """POST an event as JSON; returns the status. Blocks; raises OSError or http.client.HTTPException.

    The whole call takes ``TIMEOUT_S`` at most, however slowly bytes come: the socket's own limit is of each read.
    """
    sock = socket.create_connection((address.ip, address.port), timeout=TIMEOUT_S)

    def cut() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # also of an encrypted one, without its farewell

    limit = threading.Timer(TIMEOUT_S, cut)
    limit.daemon = True
    limit.start()
    try:
        if address.scheme == "https":
            sock = _encrypted(sock, address.host)
        connection = http.client.HTTPConnection(address.host, address.port, timeout=TIMEOUT_S)
        connection.sock = sock
        headers = {"Content-Type": "application/json", "User-Agent": "harness-studio", "Connection": "close"}
        connection.request("POST", address.path, json.dumps(event), headers)
        return connection.getresponse().status
    finally:
        limit.cancel()
        sock.close()


def _encrypted(raw: socket.socket, host: str) -> ssl.SSLSocket:
    return ssl.create_default_context().wrap_socket(raw, server_hostname=host)


def _resolved(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(f"the webhook's host {host} has no address: check its name") from None
    return [str(each[4][0]).partition("%")[0] for each in found]


def _is_public(address: str) -> bool:
    """Whether an address is one of the public Internet, also by the IPv4 address inside an IPv6 one."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
        if any(each is not None and not _is_public(str(each)) for each in inner):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast
