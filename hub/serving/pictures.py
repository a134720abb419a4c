"""Pictures in requests: data URLs, and where hosts were named with `--allow_remote`, addresses there. Never a path.

Those are fetched as tables' pictures are (`training.tables.remote`), but once, kept nowhere, and through no redirect.
"""

import asyncio
import base64
import binascii
import io
from dataclasses import dataclass, field

import httpx
from PIL import Image

from hub.serving.limits import Limits, RequestError
from training.tables.remote.limits import Limits as AnswerLimits
from training.tables.remote.places import PORTS, Allowed, RemoteError
from training.tables.remote.web import Web


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is opened; PIL knows formats that start other programs (EPS) or are seldom tried."""
SECONDS = 10.0
"""For the whole of a picture from elsewhere."""
FETCHES = 8
"""Pictures that are fetched at once."""


@dataclass
class Pictures:
    """Opens the pictures of requests.

    Args:
        limits: of bytes and pixels.
        allowed: hosts from which pictures may be fetched.
        transport: of httpx; None: its own.
    """

    limits: Limits
    allowed: Allowed = field(default_factory=Allowed)
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
        encoded = bytearray()
        limits = AnswerLimits(self.limits.body_bytes, SECONDS, SECONDS)
        try:
            async with self.fetching, Web(self.allowed, transport=self.transport) as asked:
                await asked.get(address, limits, encoded.extend, {"Accept": "image/*"})
        except RemoteError as error:
            raise RequestError(400, f"{error}; a data URL can be sent in its place.") from error
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
