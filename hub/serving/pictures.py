"""Pictures in requests: data URLs, and where hosts were named with `--allow_remote`, addresses there. Never a path.

A name is looked up once, all its addresses must be public ones, and the connection goes to an address that was checked:
a name that means another machine a moment later reaches nothing inside. No redirect is followed.
"""

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
from dataclasses import dataclass

import httpx
from PIL import Image

from hub.serving.limits import Limits, RequestError


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is opened; PIL knows formats that start other programs (EPS) or are seldom tried."""
PORTS = {"http": 80, "https": 443}
SECONDS = 10.0
"""For the whole of a picture from elsewhere."""
FETCHES = 8
"""Pictures that are fetched at once."""


@dataclass
class Pictures:
    """Opens the pictures of requests.

    Args:
        limits: of bytes and pixels.
        hosts: names from which pictures may be fetched.
        transport: of httpx; None: its own.
    """

    limits: Limits
    hosts: frozenset[str] = frozenset()
    transport: httpx.AsyncBaseTransport | None = None

    def __post_init__(self) -> None:
        self.fetching = asyncio.Semaphore(FETCHES)

    async def open(self, address: str) -> Image.Image:
        """A picture, its pixels not yet read.

        Args:
            address: data URL, or `http(s)://` of an allowed host.

        Raises:
            RequestError: for any other, and for what is no picture or too large.
        """
        scheme = address[:8].partition(":")[0].lower()
        if scheme == "data":
            encoded = decode(address)
        elif scheme in PORTS:
            encoded = await self._fetch(address)
        else:
            raise RequestError(
                400, "a picture is a data URL (data:image/png;base64,...); paths and other schemes are refused."
            )
        return self._checked(encoded)

    def _checked(self, encoded: bytes) -> Image.Image:
        try:
            picture = Image.open(io.BytesIO(encoded), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise RequestError(400, f"the picture has more than {self.limits.pixels:,} pixels.") from error
        except Exception as error:  # decoders raise errors of every kind
            raise RequestError(400, f"no picture that can be read; known are {', '.join(FORMATS)}.") from error
        width, height = picture.size
        if width * height > self.limits.pixels:
            raise RequestError(
                400, f"the picture has {width} x {height} pixels; at most {self.limits.pixels:,} in all."
            )
        return picture

    async def _fetch(self, address: str) -> bytes:
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL as error:
            raise RequestError(400, f"no address: {error}.") from error
        if url.host.lower() not in self.hosts:
            raise RequestError(
                400, f"pictures are not fetched from {url.host!r}; send a data URL (--allow_remote names hosts)."
            )
        if url.port not in (None, PORTS[url.scheme]) or url.userinfo:
            raise RequestError(400, "an address with a port or a user name is refused.")
        try:
            async with self.fetching, asyncio.timeout(SECONDS):
                return await self._get(url, await public_address(url.host, PORTS[url.scheme]))
        except TimeoutError as error:
            raise RequestError(400, f"{url.host} did not answer within {SECONDS:g} s.") from error
        except (httpx.HTTPError, OSError) as error:
            raise RequestError(400, f"{url.host}: {str(error) or type(error).__name__}.") from error

    async def _get(self, url: httpx.URL, checked: str) -> bytes:
        """The body at `url`, asked of the address that was checked."""
        headers = {"Host": url.host, "Accept-Encoding": "identity", "Accept": "image/*"}
        async with (
            httpx.AsyncClient(transport=self.transport, trust_env=False, follow_redirects=False) as client,
            client.stream(
                "GET", url.copy_with(host=checked), headers=headers, extensions={"sni_hostname": url.host}
            ) as response,
        ):
            if response.status_code != 200 or response.headers.get("Content-Encoding", "identity") != "identity":
                raise RequestError(400, f"{url.host} answered {response.status_code}; redirects are not followed.")
            encoded = bytearray()
            async for chunk in response.aiter_bytes():
                encoded += chunk
                if len(encoded) > self.limits.body_bytes:
                    raise RequestError(400, f"the picture has more than {self.limits.body_bytes:,} bytes.")
        return bytes(encoded)


def decode(address: str) -> bytes:
    """The bytes of a data URL in base64.

    Raises:
        RequestError: for one that is none.
    """
    head, comma, encoded = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(400, "a data URL is data:image/png;base64,... .")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, f"the data URL is no base64 ({error}).") from error


async def public_address(host: str, port: int) -> str:
    """An IP address of a host, all of whose addresses are public.

    Raises:
        RequestError: where one of them is not.
        OSError: for a name that is unknown.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise RequestError(400, f"{host} is not a public address; no picture is fetched from there.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open net, and not one that stands for another inside (IPv4 within IPv6)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
        if inner is not None or nat64:
            return False
    return ip.is_global and not ip.is_multicast
