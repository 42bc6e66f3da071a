"""The page's server: the loopback alone, every address under a secret token, nothing from elsewhere."""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adapt.mark.session import Session, Stale
from adapt.weak.marks import WeakError

__all__ = ["PageServer"]

MOST_BODY = 1 << 20
PAGE = Path(__file__).with_name("page.html")


class PageServer(ThreadingHTTPServer):
    """Serves the page and applies what is marked.

    Args:
        session: the marks.
        keys: of the frames, in the order in which they are shown.
        frame: (i) → uint8 [H,W,3].
        answer: (i) → uint8 [H,W], the class the network answers.
        colours: (red, green, blue) of each class.
        minutes: the time that is planned, for the clock on the page.
        port: 0 = one that is free.
    """

    daemon_threads = True

    def __init__(
        self,
        session: Session,
        keys: Sequence[str],
        frame: Callable[[int], np.ndarray],
        answer: Callable[[int], np.ndarray],
        colours: Sequence[Sequence[int]],
        *,
        minutes: float = 10,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.session, self.keys, self.colours, self.minutes = session, list(keys), colours, minutes
        self.token = secrets.token_urlsafe(24)
        self.frame = lru_cache(8)(frame)
        self.answer = lru_cache(8)(answer)

    @property
    def url(self) -> str:
        """The address a person opens."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of frame i."""
        height, width = self.frame(i).shape[:2]
        return width, height


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = 30
    body = b""
    server_version, sys_version = "adapt.mark", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9 or int(length) > MOST_BODY:
            self._refuse(413, f"an operation has at most {MOST_BODY} bytes")
            return
        # Read before any refusal: a connection that is closed with unread bytes loses the answer.
        self.body = self.rfile.read(int(length))
        self._answer(self._post)

    def _answer(self, work: Callable[[list[str]], None]) -> None:
        server = self.server
        hosts = {f"127.0.0.1:{server.server_port}", f"localhost:{server.server_port}"}
        if self.headers.get("Host") not in hosts:  # a name of elsewhere that points here
            self._refuse(403, "this page is asked for from its own address alone")
            return
        origin = self.headers.get("Origin")
        if origin is not None and origin.removeprefix("http://") not in hosts:
            self._refuse(403, "another page may not mark frames")
            return
        parts = self.path.split("?")[0].split("/")
        if len(parts) < 3 or not secrets.compare_digest(parts[1].encode(), server.token.encode()):
            self._refuse(403, "the address has no valid token; open the one that adapt.mark printed")
            return
        try:
            work(parts[2:])
        except Stale as error:
            self._refuse(409, str(error))
        except WeakError as error:
            self._refuse(422, str(error))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:  # the page shows what a frame or the disk has
            self._refuse(500, f"{' '.join(str(error).split())}; nothing was saved")

    def _get(self, way: list[str]) -> None:
        server = self.server
        if way == [""]:
            self._send(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif way == ["state"]:
            self._json(
                {
                    "classes": list(server.session.classes),
                    "colours": [list(c) for c in server.colours],
                    "frames": list(server.keys),
                    "minutes": server.minutes,
                }
            )
        elif len(way) == 2 and (i := self._index(way[1])) is not None:
            if way[0] == "frame":
                self._send(_png(Image.fromarray(server.frame(i))), "image/png")
            elif way[0] == "answer":
                self._send(_png(_overlay(server.answer(i), server.colours)), "image/png")
            elif way[0] == "marks":
                size = server.size(i)
                self._json({**server.session.view(server.keys[i], size), "size": size})
            else:
                self._refuse(404, "there is no such address")
        else:
            self._refuse(404, "there is no such address")

    def _post(self, way: list[str]) -> None:
        i = self._index(way[1]) if len(way) == 2 and way[0] == "marks" else None
        if i is None:
            self._refuse(404, "there is no such address")
            return
        try:
            request = json.loads(self.body)
        except (ValueError, RecursionError):
            raise WeakError("the request is no JSON; load the page again") from None
        size = self.server.size(i)
        self._json({**self.server.session.apply(self.server.keys[i], size, request), "size": size})

    def _index(self, text: str) -> int | None:
        ok = text.isascii() and text.isdecimal() and len(text) < 9 and int(text) < len(self.server.keys)
        return int(text) if ok else None

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), "application/json", status)

    def _refuse(self, status: int, why: str) -> None:
        self.close_connection = True
        self._json({"error": why}, status)

    def _send(self, content: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            (
                "Content-Security-Policy",
                "default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'unsafe-inline'; "
                "style-src 'unsafe-inline'; frame-ancestors 'none'",
            ),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent: the address holds the token."""


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _overlay(labels: np.ndarray, colours: Sequence[Sequence[int]]) -> Image.Image:
    image = Image.fromarray(labels).convert("P")
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = np.asarray(colours, np.uint8)
    image.putpalette(table.tobytes())
    return image
