"""What stands before llama.cpp's server when a person talks to it.

llama.cpp answers whoever sends it anything: pages of other sites, under whatever name they reach this machine; it fetches pictures from
addresses that it is told, and unpacks them however large. So it gets a port and a key that only this process knows, and what comes for
it comes through here.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

BODY = 32 << 20
"""Most bytes of a request."""

PIXELS = 50_000_000
"""Most pixels of a picture; llama.cpp takes some 20 bytes for each."""

FORMATS = ("PNG", "JPEG", "GIF", "BMP")
"""Of pictures, as llama.cpp reads them."""

ASKED = {"/v1/chat/completions", "/chat/completions", "/apply-template", "/tokenize", "/detokenize"}
"""What may be posted."""

LOCAL = {"127.0.0.1", "localhost", "::1"}


class Refused(Exception):
    """A request that is not handed on, with HTTP's code for it."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Guard(ThreadingHTTPServer):
    """Hands requests on to a llama.cpp on this machine, or refuses them.

    Args:
        host, port: where it listens; port 0 takes a free one.
        inner: llama.cpp's address.
        key: which that one asks for.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, inner: str, key: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.host, self.inner, self.key = host, urlsplit(inner).netloc, key
        super().__init__((host, port), _Request)

    @property
    def address(self) -> str:
        """As a browser is given it."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.server_address[1]}"

    def known(self, host: str | None) -> bool:
        """Whether the name that a request came by is this machine's. A site can give its own name this machine's address, and its
        pages are then taken for ours; numbers it can't give. So a name is known here, or it is a number."""
        try:
            name = (urlsplit(f"//{host or ''}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in LOCAL or name == self.host.lower():
            return True
        if self.host in LOCAL:
            return False
        with suppress(ValueError):
            return bool(ip_address(name))
        return name in {socket.gethostname().lower(), socket.getfqdn().lower()}


class _Request(BaseHTTPRequestHandler):
    server: Guard
    timeout = 60
    """Seconds in which a request must have come whole."""

    def do_GET(self) -> None:
        self._hand_on(None)

    def do_POST(self) -> None:
        self._hand_on(self._body)

    def _hand_on(self, body: Any) -> None:
        try:
            self._check()
            content = body() if body else None
        except Refused as refused:
            self._refuse(refused.code, str(refused))
            return
        except OSError:  # it did not come whole
            return
        headers = {"Authorization": f"Bearer {self.server.key}", "Host": self.server.inner, "Connection": "close"}
        headers |= {
            name: self.headers[name] for name in ("Accept", "Accept-Encoding", "Content-Type") if self.headers[name]
        }
        inner = http.client.HTTPConnection(self.server.inner)
        try:
            inner.request(self.command, self.path, content, headers)
            said = inner.getresponse()
        except (OSError, http.client.HTTPException):
            self._refuse(502, "llama.cpp gave no answer")
        else:
            with suppress(OSError, http.client.HTTPException):  # one of the two is gone
                self._answer(said)
        finally:
            inner.close()  # which ends an answer that nobody waits for

    def _check(self) -> None:
        host, origin = self.headers["Host"], self.headers["Origin"]
        if not self.server.known(host):
            raise Refused(403, f"this is {self.server.address}, and not {host}")
        if origin is not None and origin != f"http://{host}":
            raise Refused(403, f"pages of {origin} may not use this model")
        if ".." in unquote(urlsplit(self.path).path).replace("\\", "/").split("/"):
            raise Refused(400, "there is nothing above this page")

    def _body(self) -> bytes:
        if urlsplit(self.path).path not in ASKED:
            raise Refused(404, f"only {', '.join(sorted(ASKED))} are answered")
        length = self.headers["Content-Length"] or ""
        if not length.isdecimal() or self.headers["Transfer-Encoding"]:
            raise Refused(411, "a request says its length")
        if int(length) > BODY:
            raise Refused(413, f"a request has at most {BODY >> 20} MB")
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise OSError("cut off")
        try:
            asked = json.loads(content)
            for url in _urls(asked):
                _check_picture(url)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the request is no JSON, or its picture none ({error})") from None
        return json.dumps(asked).encode()  # as it was read here, whatever else another reader may see in it

    def _answer(self, said: http.client.HTTPResponse) -> None:
        self.send_response(said.status)
        for name, value in said.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "keep-alive", "server", "date"):
                self.send_header(name, value)
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        while piece := said.read1(1 << 16):
            self.wfile.write(piece)
            self.wfile.flush()

    def _refuse(self, code: int, why: str) -> None:
        told = json.dumps({"error": {"code": code, "message": why, "type": "refused"}}).encode()
        with suppress(OSError):  # whoever asked is gone
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

    def log_message(self, *_: Any) -> None:
        """Nothing of what is asked is written down."""


def _urls(tree: Any, inside: bool = False) -> Iterator[str]:
    """Every picture of a request: the texts at or under a key that is called so, whichever way it is asked."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield from _urls(child, inside or "image" in key or "url" in key)
        kind = tree.get("type", "text")
        if "role" not in tree and isinstance(kind, str) and ("audio" in kind or "video" in kind):
            raise ValueError("pictures are all that is taken")
    elif isinstance(tree, list):
        for child in tree:
            yield from _urls(child, inside)
    elif inside and isinstance(tree, str) and tree not in ("auto", "low", "high"):
        yield tree


def _check_picture(url: str) -> None:
    """Raises ValueError unless it is a picture that came along, and not too large; no pixel is unpacked."""
    head, _, content = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("a picture comes with the request, as data:image/...;base64")
    try:
        with Image.open(BytesIO(base64.b64decode(content, validate=True)), formats=FORMATS) as picture:
            width, height = picture.size
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    except (OSError, binascii.Error) as error:
        raise ValueError(f"it can't be read: {error}") from None
    if width * height > PIXELS:
        raise ValueError(f"{width} x {height} are more than {PIXELS:,} pixels")
