"""Which addresses may be asked: those that `--allow_remote` names, and of these none inside that isn't named as such.

An entry is a host (`cdn.example.com`, `cdn.example.com:8443`), whose name must mean public addresses alone; an IP address
(`10.0.0.5`, `127.0.0.1:9000`, `[::1]:9000`), which may be one inside, as the user typed it; or a place of another kind
(`s3://bucket`, `hf://datasets/ORG/DATA`), with all that lies below.
"""

import ipaddress
import posixpath
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urljoin, urlsplit

from training.tables.commands.handler import OptionError


PORTS = {"http": 80, "https": 443}
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s/:@?#\[\]]+)(?::(\d{1,5}))?")
HERE = ("file", "local")
"""Schemes that name this machine; what they stand for is a path."""


class RemoteError(ValueError):
    """An address that is not fetched, or can't be; the message says why."""


@dataclass(frozen=True)
class Allowed:
    """What `--allow_remote` names.

    Attributes:
        hosts: of http and https, in lower case, each with its port; None: the scheme's own.
        places: of other schemes; what lies below them is allowed too.
    """

    hosts: frozenset[tuple[str, int | None]] = frozenset()
    places: tuple[str, ...] = ()

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, named: str | None) -> "Allowed":
        """Read the option: hosts and places with commas between them.

        Raises:
            OptionError: for an entry that is neither.
        """
        hosts, places = set(), []
        for entry in filter(None, (part.strip() for part in (named or "").split(","))):
            if ADDRESS.match(entry):
                scheme, _, rest = entry.partition("://")
                if scheme.lower() in PORTS or scheme.lower() in HERE or "::" in entry:
                    meant = urlsplit(entry).netloc or "cdn.example.com"
                    raise OptionError(f"--allow_remote {entry}: name a host ({meant}), or a place such as s3://bucket.")
                places.append(f"{scheme.lower()}://{rest}")
            elif (parts := HOST.fullmatch(entry)) and int(parts[2] or 0) <= 65_535:
                hosts.add((parts[1].strip("[]").lower(), int(parts[2]) if parts[2] else None))
            else:
                raise OptionError(f"--allow_remote {entry}: neither a host nor a place such as s3://bucket.")
        return cls(frozenset(hosts), tuple(places))

    def check(self, address: str) -> None:
        """Refuse what isn't named. Nothing is looked up.

        Raises:
            RemoteError: with what to pass.
        """
        scheme, _, rest = address.partition("://")
        if scheme.lower() in PORTS:
            host, port = host_of(address)
            if (host, None if port == PORTS[scheme.lower()] else port) not in self.hosts and (
                (host, port) not in self.hosts
            ):
                entry = f"[{host}]" if ":" in host else host
                entry += "" if port == PORTS[scheme.lower()] else f":{port}"
                raise RemoteError(f"{shown(address)} is not fetched: --allow_remote {entry} would allow it")
            return
        if "::" in address or ".." in rest.split("/"):
            raise RemoteError(f"{shown(address)} is not fetched: an address with :: or .. in it is refused")
        whole = f"{scheme.lower()}://{rest}"
        if not any(whole == place or whole.startswith(_as_folder(place)) for place in self.places):
            entry = f"{scheme.lower()}://{rest.split('/')[0]}"
            raise RemoteError(f"{shown(address)} is not fetched: --allow_remote {entry} would allow it")


@dataclass(frozen=True)
class RemoteFolder:
    """Where relative paths of a table's pictures start that lies elsewhere: `folder / path`, as of a `Path`."""

    address: str

    def __truediv__(self, path: str) -> str:
        """The address of a picture beside the table; an absolute path is one of this machine."""
        if path.startswith("/"):
            return path
        folder = _as_folder(self.address)
        return urljoin(folder, quote(path)) if is_web(folder) else folder + posixpath.normpath(path)

    def holds(self, address: str) -> bool:
        """Whether an address lies below this one."""
        return address.startswith(_as_folder(self.address)) and ".." not in address.split("/")

    def around(self, name: str) -> "RemoteFolder":
        """The folder of one of its files."""
        parent = posixpath.dirname(name)
        return RemoteFolder(_as_folder(self.address) + parent) if parent else self


def is_address(text: str) -> bool:
    """Whether a text names something elsewhere, and not a path of this machine."""
    scheme = ADDRESS.match(text)
    return scheme is not None and scheme[0][:-3].lower() not in HERE


def is_web(address: str) -> bool:
    """Whether an address is one of http or https."""
    return address.partition("://")[0].lower() in PORTS


def host_of(address: str) -> tuple[str, int]:
    """Host, in lower case and without brackets, and port of a web address.

    Raises:
        RemoteError: for one that has none, or a user's name in it.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise RemoteError(f"{shown(address)}: no address ({error})") from error
    if not host or re.search(r"[\s\\]", parts.netloc):
        raise RemoteError(f"{shown(address)}: no address")
    if "@" in parts.netloc:
        raise RemoteError(f"{shown(address)}: an address with a user name is refused")
    return host, PORTS[parts.scheme.lower()] if port is None else port


def shown(address: str) -> str:
    """An address for people: without its query, which may be a signature, and not endless."""
    return re.sub(r"//[^/@]*@", "//", address.partition("?")[0].partition("#")[0])[:200]


def name_of(address: str) -> str:
    """The last part of an address' path."""
    path = unquote(urlsplit(address).path) if is_web(address) else address
    return path.rstrip("/").rpartition("/")[2]


def suffix_of(address: str) -> str:
    """What kind of file an address names, as `.csv`."""
    return PurePosixPath(name_of(address)).suffix.lower()


def checked_address(host: str, found: Sequence[str], allowed: Allowed) -> str:
    """The IP address to connect to for a host.

    Args:
        host: as it is named.
        found: the addresses that its name means; those of an IP address are itself.

    Raises:
        RemoteError: where one of them is inside, and the user did not type this very address.
    """
    typed = any(name == host for name, _ in allowed.hosts) and _is_ip(host)
    if not found or not (typed or all(map(is_public, found))):
        raise RemoteError(
            f"{host} is not a public address; nothing is fetched from there (an address inside must be named in "
            "--allow_remote itself, as 127.0.0.1:9000)"
        )
    return found[0]


def addresses_of(host: str, port: int) -> list[str]:
    """What a host's name means now.

    Raises:
        OSError: for a name that is unknown.
    """
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open net, and not one that stands for another inside (IPv4 within IPv6)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
        if inner is not None or nat64:
            return False
    return ip.is_global and not ip.is_multicast


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _as_folder(place: str) -> str:
    return place if place.endswith("/") else f"{place}/"
