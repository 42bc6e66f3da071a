"""Where a command line takes the token from that it sends, without showing it to whoever lists processes."""

from __future__ import annotations

import os
from pathlib import Path

from common import files

VARIABLE = "ROADWORTHY_TOKEN"


def given(text: str = "", file: Path | str | None = None) -> str:
    """The token: `text`, else the content of `file`, else the environment's ROADWORTHY_TOKEN, else "".

    Raises OSError for a file that cannot be read, and ValueError for one that holds no token.
    """
    where, token = "--token", text
    if not token and file:
        where, token = str(file), files.read_file(file).decode(errors="replace").strip()
        if not token:
            raise ValueError(f"{where}: is empty; write the token into it")
    if not token:
        where, token = VARIABLE, os.environ.get(VARIABLE, "").strip()
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(f"{where}: not a token; it is one word of visible ASCII characters")
    return token
