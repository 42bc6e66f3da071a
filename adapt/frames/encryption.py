"""Encryption at rest: AES-256-GCM with a key file, for the pictures of a frame store.  Knows bytes only.

"RWS1" | nonce, 12 bytes | ciphertext and tag            the name of the file is authenticated with it
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

__all__ = ["Seal", "SealError", "new_key"]

MAGIC = b"RWS1"


class SealError(Exception):
    """A key or a sealed file cannot be used.  One line: thing, reason, remedy."""


class Seal:
    """Seals and opens with the key in `path`: 32 bytes, or 64 hexadecimal digits.

    Raises SealError: no such key, or `cryptography` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise SealError("encryption needs `cryptography`: pip install 'roadworthy[signing]'") from error
        try:
            key = Path(path).read_bytes()
        except OSError as error:
            raise SealError(
                f"key {str(path)!r} cannot be read ({error.strerror}); make one with keygen"
            ) from error
        if len(key) != 32:
            text = key.strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{64}", text):
                raise SealError(
                    f"key {str(path)!r} is neither 32 bytes nor 64 hexadecimal digits: make one with keygen"
                )
            key = bytes.fromhex(text.decode())
        self._cipher: Any = AESGCM(key)

    def seal(self, content: bytes, name: str) -> bytes:
        nonce = os.urandom(12)
        return MAGIC + nonce + bytes(self._cipher.encrypt(nonce, content, name.encode()))

    def open(self, content: bytes, name: str) -> bytes:
        """Raises SealError where it was sealed with another key, under another name, or altered."""
        from cryptography.exceptions import InvalidTag

        if content[:4] != MAGIC:
            raise SealError(f"{name} is not sealed")
        try:
            return bytes(self._cipher.decrypt(content[4:16], content[16:], name.encode()))
        except InvalidTag as error:
            raise SealError(f"{name} was sealed with another key, or altered") from error


def new_key(path: str | os.PathLike[str]) -> None:
    """Write a new key, readable by its owner alone.  Raises SealError where the file is there already."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise SealError(f"key {str(path)!r} cannot be made ({error.strerror}); give another path") from error
    with os.fdopen(handle, "w") as file:
        file.write(os.urandom(32).hex() + "\n")
