"""Signed versions: an Ed25519 signature over the manifest's digest, checked before anything is loaded.

The digest covers the manifest and, through it, the hash of every file.  Needs the
``cryptography`` package only where keys are used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import files
from runtime.errors import ConfigError, Refused, Unjudged, of_the_machine
from runtime.repository.manifest import SIGNATURE


def signer(private_key: Path | str) -> Callable[[str], bytes]:
    """What `Repository.publish(sign=…)` takes: an Ed25519 signature of a digest, by the key in a PEM file.

    Raises ConfigError when the file is not such a key.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        message = f"signing needs the package cryptography ({error})"
        raise ConfigError(f"{message}: pip install 'roadworthy[signing]'") from error
    remedy = "make one with 'openssl genpkey -algorithm ed25519'"
    try:
        key = load_pem_private_key(files.read_file(private_key), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{private_key}: not a private key in PEM form ({error}); {remedy}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{private_key}: not an Ed25519 private key; {remedy}")
    return lambda digest: key.sign(digest.encode())


def check_signature(directory: Path, manifest: dict[str, Any], trusted_keys: list[str]) -> None:
    """Refused("signature") unless one of the trusted keys signed the manifest; no keys, no check."""
    if not trusted_keys:
        return
    try:
        signature = files.read_file(directory / SIGNATURE)
    except OSError as error:
        if of_the_machine(error):
            why = f"manifest.sig cannot be read: {error.strerror}"
            raise Unjudged("signature", why) from error
        raise Refused(
            "signature", "the version is not signed and this server trusts only signed ones"
        ) from None
    for path in trusted_keys:
        try:
            key = public_key(path)
        except ConfigError as error:  # it could be read at the start
            raise Unjudged("signature", str(error)) from error
        from cryptography.exceptions import InvalidSignature

        try:
            key.verify(signature, str(manifest["digest"]).encode())
        except InvalidSignature:
            continue
        return
    raise Refused("signature", "the signature is not by a key that this server trusts")


def public_key(path: str) -> Any:
    """Raises ConfigError when `path` is not a readable Ed25519 public key (PEM), or when what reads it is not
    installed.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        message = f"security.trusted_keys needs the package cryptography ({error})"
        raise ConfigError(f"{message}: pip install 'roadworthy[signing]'") from error
    try:
        key = load_pem_public_key(files.read_file(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"security.trusted_keys: {path}: not a public key in PEM form: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"security.trusted_keys: {path}: not an Ed25519 key")
    return key
