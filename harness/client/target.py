"""The target of a load: the replicas of a service, and how to connect to them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict

from harness.errors import InputError
from harness.records.load_test import TargetRecord, TlsRecord

if TYPE_CHECKING:
    import grpc.aio

DEFAULT_PORT = 8001
ROUND_ROBIN, LEAST_LOADED = BALANCES = ("round-robin", "least-loaded")
CA, CERT, KEY = "--tls-ca", "--tls-client-cert", "--tls-client-key"  # --tls-cert belongs to Locust's own page
OWN_HEADERS = ("connection", "content-type", "host", "te", "user-agent")  # set by gRPC itself


class Argument(TypedDict, total=False):
    """A command-line option: what argparse takes, ``flags`` (its short names) and ``on_page`` (of Locust's form)."""

    help: Required[str]
    action: str
    choices: tuple[str, ...]
    const: str
    default: str
    dest: str
    flags: tuple[str, ...]
    metavar: str
    nargs: str
    on_page: bool


OPTIONS: dict[str, Argument] = {
    "--balance": {
        "metavar": "CHOICE",
        "help": f"how requests are spread over several servers: {ROUND_ROBIN} (default), or {LEAST_LOADED}: "
        "the server with the fewest open streams from this client process",
    },
    CA: {"metavar": "FILE.pem", "help": "trust only servers with certificates of these authorities"},
    CERT: {"metavar": "FILE.pem", "help": "client certificate, for servers that require one"},
    KEY: {"metavar": "FILE.pem", "help": f"the key of {CERT}"},
    "--tls-server-name": {
        "metavar": "NAME",
        "help": "name in the servers' certificates, if not the URL's host",
    },
    "--header": {
        "action": "append",
        "metavar": "'NAME: VALUE'",
        "help": "sent with every call; may be repeated. @FILE holds one per line: use it for secrets, since process "
        "lists show command lines",
    },
    "--ready-timeout": {
        "metavar": "S",
        "help": "time limit for connecting, and for a server to report that it is ready, in seconds",
    },
    "--request-timeout": {"metavar": "S", "help": "fail a request that takes longer than this, in seconds"},
    "--silence-timeout": {
        "metavar": "S",
        "help": "fail a request after this many seconds without a message from the server",
    },
}
"""Options of every command that opens connections; each is also read from the environment as ``LOCUST_NAME``."""
URL_VARIABLE = "LOCUST_URL"  # --url is read from it where it is not given
_SECONDS = {"--ready-timeout": "ready_s", "--request-timeout": "request_s", "--silence-timeout": "silence_s"}
_TLS = {CA: "ca", CERT: "cert", KEY: "key", "--tls-server-name": "server_name"}


@dataclass(frozen=True)
class Tls:
    """Encryption, by PEM files. ``ca`` "" trusts gRPC's list of well-known authorities.

    ``cert`` and ``key`` are for a server that requires client certificates. Raises InputError, naming the option, for a
    file that cannot be used.
    """

    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""

    def __post_init__(self):
        if bool(self.cert) != bool(self.key):
            given, missing = (CERT, KEY) if self.cert else (KEY, CERT)
            raise InputError(f"{given} needs {missing} too: give both")
        _check_ca(self.ca)
        _check_pair(self.cert, self.key)

    def pems(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The contents of the authorities, the key and the certificate; None for those not given."""
        files = ((CA, self.ca), (KEY, self.key), (CERT, self.cert))
        ca, key, cert = (_content(option, path) if path else None for option, path in files)
        return ca, key, cert


@dataclass(frozen=True)
class Target:
    """A service: one ``host:port`` per replica, and how to connect to them.

    A host name counts as one replica, however many addresses it resolves to. ``tls`` None is plain text. ``headers`` go
    with every call as (name, value). ``balance`` selects the replica of the next request. Timeouts in seconds:
    ``ready_s`` for connecting and for the server to report that it is ready; ``silence_s`` for a stream that receives
    nothing; ``request_s`` for a whole request (None: no limit). Raises InputError.
    """

    addresses: tuple[str, ...]
    tls: Tls | None = None
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # not shown: values may be secrets
    balance: str = ROUND_ROBIN
    ready_s: float = 10.0
    silence_s: float = 60.0  # shorter where the server announces a heartbeat interval: see stream.BEATS_MISSED
    request_s: float | None = None

    def __post_init__(self):
        if not self.addresses:
            raise InputError("no server is given: write its address as HOST:PORT")
        for address in self.addresses:
            if self.addresses.count(address) > 1:
                raise InputError(f"{address} is given twice: each server of a target counts once")
        if self.balance not in BALANCES:
            hint = difflib.get_close_matches(self.balance, BALANCES, n=1, cutoff=0.3)
            raise InputError(f"--balance {self.balance!r} is not one of {', '.join(BALANCES)}" + _did_you_mean(hint))
        for option, name in _SECONDS.items():
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise InputError(f"{option} {seconds:g} must be above 0")

    @classmethod
    def of(cls, where: str | Iterable[str] | Target, tls: Tls | None = None, **more) -> Target:
        """A target of URLs (a list, or text with commas between); ``more`` are other fields. Raises InputError.

        ``grpcs://`` or ``tls`` means TLS for all of them. A Target is returned unchanged.
        """
        if isinstance(where, Target):
            return where
        texts = [text for each in ([where] if isinstance(where, str) else where) for text in each.split(",")]
        found = [address_of(text) for text in texts]
        schemes = {scheme for _, scheme in found}
        if "grpc" in schemes and ("grpcs" in schemes or tls):
            with_tls = "grpcs://" if "grpcs" in schemes else "the --tls options"
            raise InputError(f"grpc:// means plain text, but {with_tls} need TLS: use only one of them")
        tls = Tls() if tls is None and "grpcs" in schemes else tls
        return cls(tuple(address for address, _ in found), tls, **more)

    @classmethod
    def from_options(cls, where: str | Iterable[str], values: Mapping) -> Target:
        """A target from OPTIONS as on a command line: texts by name, without leading dashes. Raises InputError."""
        texts = {option: values.get(option.strip("-").replace("-", "_")) or "" for option in OPTIONS}
        tls = {name: str(texts[option]) for option, name in _TLS.items() if texts[option]}
        more: dict[str, float | str] = {
            name: _seconds(option, texts[option]) for option, name in _SECONDS.items() if texts[option]
        }
        if texts["--balance"]:
            more["balance"] = texts["--balance"]
        return cls.of(where, Tls(**tls) if tls else None, headers=parse_headers(texts["--header"] or ()), **more)

    @classmethod
    def from_environment(cls, where: str | Iterable[str]) -> Target:
        """A target with the OPTIONS found in the environment."""
        return cls.from_options(where, options_in_environment())

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Target:
        tls = Tls(**plain["tls"]) if plain["tls"] else None
        headers = tuple((name, value) for name, value in plain["headers"])
        given: dict[str, Any] = {**plain, "addresses": tuple(plain["addresses"]), "tls": tls, "headers": headers}
        return cls(**given)

    def to_plain(self) -> dict[str, Any]:
        """Plain values for another of our processes. They include secrets."""
        return dataclasses.asdict(self)

    def record(self) -> TargetRecord:
        """The target without secrets, for records."""
        return TargetRecord(
            addresses=self.addresses,
            tls=TlsRecord(**dataclasses.asdict(self.tls)) if self.tls else None,
            headers=tuple(sorted({name for name, _ in self.headers})),
            balance=self.balance,
            ready_s=self.ready_s,
            silence_s=self.silence_s,
            request_s=self.request_s,
        )

    @property
    def url(self) -> str:
        """A URL from which ``of`` makes the same addresses."""
        return ",".join(f"grpcs://{address}" if self.tls else address for address in self.addresses)

    def channel(self, address: str) -> grpc.Channel:
        """A connection for blocking calls; it adds the headers to each."""
        from harness.client import channels

        return channels.blocking(self, address)

    def aio_channel(self, address: str) -> grpc.aio.Channel:
        """A connection for asyncio; every call must pass the headers as its ``metadata``."""
        from harness.client import channels

        return channels.aio(self, address)


def is_this_host(target: Target | str) -> bool:
    """Whether all servers share our clock: only addresses of this host can be bound to."""
    return all(_is_ours(address.rpartition(":")[0].strip("[]")) for address in Target.of(target).addresses)


def _is_ours(host: str) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def address_of(url: str) -> tuple[str, str]:
    """Split ``grpc://host:port``, ``grpcs://…``, ``host:port`` or ``host`` into ``host:port`` and scheme ("" if none).

    Raises InputError for any other URL.
    """
    scheme, separator, rest = url.strip().rpartition("://")
    scheme, rest = scheme.lower(), rest.rstrip("/")
    if "@" in rest:
        raise InputError("a server's address cannot hold a user and password: send them with --header @FILE")
    if separator and scheme not in ("grpc", "grpcs"):
        like = (
            "grpcs://host:port, for TLS" if scheme == "https" else f"grpc://host:{DEFAULT_PORT} (or grpcs:// for TLS)"
        )
        raise InputError(f"cannot stream from {url!r}: speech comes over Triton's gRPC port; give it as {like}")
    if not rest or any(letter in rest for letter in "/?# \t"):
        raise InputError(f"{url!r} is not a server address: write grpc://host:port or host:port")
    host, colon, port = rest.rpartition(":")
    has_port = bool(colon) and not rest.endswith("]")
    if has_port and ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise InputError(f"{url!r} is not a server address: write an IPv6 address as [::1]:{DEFAULT_PORT}")
    if has_port and not (host and port.isdigit() and 0 < int(port) < 65_536):
        raise InputError(f"{url!r} has no usable port: write grpc://host:port with a port from 1 to 65535")
    return (rest if has_port else f"{rest}:{DEFAULT_PORT}"), scheme


def parse_headers(texts: str | Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(name, value) of each ``name: value``; ``@FILE`` holds one per line. Raises InputError without the values."""
    headers = []
    for number, text in enumerate([texts] if isinstance(texts, str) else texts, start=1):
        if text.startswith("@"):
            headers += [_header(line, f"line {at} of --header {text}") for at, line in _header_lines(text[1:])]
        else:
            headers.append(_header(text, f"--header number {number}"))
    return tuple(headers)


def options_in_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str | list[str]]:
    """OPTIONS from LOCUST_BALANCE, LOCUST_TLS_CA, …, in Locust's format: several headers are a JSON list."""
    values = {}
    for option, about in OPTIONS.items():
        name = option.strip("-").replace("-", "_")
        if text := environment.get(_variable(name)):
            values[name] = _several(_variable(name), text) if about.get("action") == "append" else text
    return values


def as_environment(values: Mapping[str, str | list[str]]) -> dict[str, str]:
    """Options by name, as the variables that ``options_in_environment`` reads."""
    return {
        _variable(name): value if isinstance(value, str) else json.dumps(list(value)) for name, value in values.items()
    }


def urls_in_environment(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The URLs in LOCUST_URL, in Locust's format: comma-separated, or a JSON list."""
    text = environment.get(URL_VARIABLE)
    return tuple(_several(URL_VARIABLE, text)) if text else ()


def _variable(name: str) -> str:
    return f"LOCUST_{name.upper()}"


def _several(name: str, text: str) -> list[str]:
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    try:
        return [str(each) for each in json.loads(text)]
    except ValueError:
        raise InputError(f'{name} is not a JSON list: write ["one", "another"]') from None


def _header_lines(path: str) -> Iterable[tuple[int, str]]:
    if not path:
        raise InputError("--header @ names no file: write --header @FILE")
    content = _content("--header file", path)
    try:
        lines = content.decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--header @{path} holds a character that is not ASCII: headers are ASCII only") from None
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _header(text: str, where: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    name, value = name.strip().lower(), value.strip()
    if not colon:  # the text may be a secret
        raise InputError(f"{where} has no colon: write it as 'name: value'")
    if not name or not all(letter in "-_." or (letter.isascii() and letter.isalnum()) for letter in name):
        raise InputError(f"{where}: the name {name!r} must consist of ASCII letters, digits, '-', '_' and '.'")
    if name.startswith("grpc-") or name in OWN_HEADERS:
        raise InputError(f"{where}: {name} is set by gRPC itself: leave it out")
    if name.endswith("-bin"):
        raise InputError(f"{where}: {name} is a binary header, which cannot be given here; use a name without -bin")
    if not value:
        raise InputError(f"{where}: {name} has no value")
    if not (value.isascii() and value.isprintable()):
        raise InputError(f"{where}: the value of {name} holds a character that is not printable ASCII")
    return name, value


def _seconds(option: str, text) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option} {text!r} is not a number of seconds") from None


def _content(option: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: not a possible file name
        raise InputError(f"{option} {path} cannot be read: {getattr(error, 'strerror', error)}") from error


def _check_ca(path: str) -> None:
    if not path:
        return
    _content(CA, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise InputError(_not_pem(CA, path, "certificate")) from None


def _check_pair(cert: str, key: str) -> None:
    """Check that a certificate and its key can be read and belong together."""
    if not cert:
        return
    for option, path, what in ((CERT, cert, "certificate"), (KEY, key, "key")):
        if b"-----BEGIN" not in _content(option, path):
            raise InputError(_not_pem(option, path, what))

    def ask_password():
        raise InputError(
            f"{KEY} {key} is encrypted, and its password cannot be entered here: give a key without a password"
        )

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password=ask_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InputError(f"{KEY} {key} is not the key of {CERT} {cert}") from None
        raise InputError(f"{CERT} {cert} with {KEY} {key} cannot be used: {error.reason or error}") from None


def _not_pem(option: str, path: str, what: str) -> str:
    return f"{option} {path} holds no {what} in PEM, which begins with -----BEGIN; `openssl` converts other forms"


def _did_you_mean(names: Iterable[str]) -> str:
    return "".join(f"; did you mean {name!r}?" for name in names)
