"""The engine repository: immutable versions that appear by one rename.

Knows directories, hashes and JSON; knows nothing of engines, slots or gRPC.  The layout
is Triton's, see docs/architecture.md.  Any number of processes may publish into a
repository at the same time and be killed at any moment: a reader sees whole versions or
none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.files import replace_file, sync
from runtime.errors import Code, Refused, ServiceError, Unjudged, of_the_machine
from runtime.repository import records
from runtime.repository.manifest import (
    LARGEST,
    MANIFEST,
    MODEL_NAME,
    SCHEMA,
    SIGNATURE,
    check_name,
    checked,
    digest,
    read_listed,
)

log = logging.getLogger("roadworthy.repository")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_STAGING = ".staging-"
_NEW = ".new-"
_TEMPORARY = ".tmp-"
_GONE = ".gone-"  # a version that is being deleted
HISTORY_BYTES = 1 << 20  # of a history, before its older half makes room: some hundred swaps


class Repository:
    """`path`/<model>/<version>/…; creates `path` when it is absent.  `read_only`: what is live, and its
    history, belong to another server.
    """

    def __init__(self, path: Path | str, *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        if not read_only:
            self.path.mkdir(parents=True, exist_ok=True)
        self._history = threading.Lock()
        self._shortened: dict[Path, int] = {}  # history -> what was left of it when it was last shortened
        self._locks: dict[Path, int] = {}  # staging directory -> descriptor that holds its lock

    # -- reading ---------------------------------------------------------------------

    def models(self) -> list[str]:
        """Names of the models that have at least one version directory."""
        names = [
            entry.name for entry in self.path.iterdir() if entry.is_dir() and MODEL_NAME.fullmatch(entry.name)
        ]
        return sorted(name for name in names if self.versions(name))

    def versions(self, model: str) -> list[int]:
        """Version numbers, ascending.  Zero-prefixed and non-integral directories are ignored, as Triton
        does.
        """
        try:
            entries = list((self.path / check_name(model)).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(
            int(entry.name) for entry in entries if _VERSION.fullmatch(entry.name) and entry.is_dir()
        )

    def directory(self, model: str, version: int) -> Path:
        return self.path / check_name(model) / str(int(version))

    def manifest(self, model: str, version: int) -> dict[str, Any]:
        """The manifest as written; raises Refused("manifest", …) when it is missing or not one of ours."""
        path = self.directory(model, version) / MANIFEST
        try:
            manifest = records.parse(records.read(path, LARGEST), finite=False)
        except FileNotFoundError:
            what = "has no manifest.json" if path.parent.is_dir() else "does not exist"
            raise Refused(
                "manifest", f"version {version} of '{model}' {what}; publish it with export.build"
            ) from None
        except (OSError, ValueError) as error:
            kind = Unjudged if of_the_machine(error) else Refused
            raise kind(
                "manifest", f"manifest.json of '{model}' version {version} cannot be read: {error}"
            ) from error
        return checked(manifest, model, version)

    def verify(self, model: str, version: int) -> dict[str, Any]:
        """Reads and hashes every file of a version; returns the manifest.

        Raises Refused("manifest"|"hash", reason).
        """
        return self.read(model, version, keep=())[0]

    def read(
        self, model: str, version: int, *, keep: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        """`verify`, and the very bytes that were hashed (of the files in `keep`; None = of all).

        What is loaded afterwards must come from these bytes: a file that is altered between
        hashing and loading can then not slip in.
        """
        manifest = self.manifest(model, version)
        directory = self.directory(model, version)
        present = {entry.name for entry in directory.iterdir()} - {MANIFEST, SIGNATURE}
        listed: dict[str, Any] = manifest["files"]
        for name in sorted(present - set(listed)):
            raise Refused(
                "hash", f"file '{name}' is not in the manifest; the version was altered after publishing"
            )
        kept: dict[str, bytes] = {}
        for name, entry in sorted(listed.items()):
            content = read_listed(directory / name, name, entry.get("bytes"))
            if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
                raise Refused(
                    "hash", f"file '{name}' does not have the SHA-256 of the manifest; it was altered"
                )
            if keep is None or name in keep:
                kept[name] = content
        return manifest, kept

    def live(self, model: str) -> dict[str, Any] | None:
        """What of live.json can be used, by its types; None when there is none, or nothing of it can be read
        (an atomic replace prevents that; `last_live` then knows).
        """
        path = self.path / check_name(model) / "live.json"
        try:
            value = records.parse(records.read(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s: not used: %s", path, error)
            return None
        found = records.live(value)
        if not isinstance(value, dict) or {k for k, v in value.items() if v is not None} - set(found):
            log.warning("%s: what is damaged of it is not used", path)
        return found if isinstance(value, dict) else None

    def last_live(self, model: str) -> dict[str, Any]:
        """{"live", "previous", "pinned", "frozen", "frozen_reason"} by the history, for when live.json is
        lost; empty where nothing was live.
        """
        history = self.history(model)
        numbers = [e["version"] for e in history if e.get("state") == "LIVE" and e.get("version")]
        if not numbers:
            return {}
        rolled_back = {e.get("version") for e in history if e.get("state") == "ROLLED_BACK"}
        before = [n for n in numbers if n != numbers[-1] and n not in rolled_back]
        flags: dict[str, Any] = {}
        for entry in history:
            detail = entry.get("detail")
            if entry.get("state") == "NOTE" and isinstance(detail, dict) and "pinned" in detail:
                said = {key: detail.get(key) for key in ("pinned", "frozen", "frozen_reason")}
                flags = records.live(said)
        return {"live": numbers[-1], "previous": before[-1] if before else None, **flags}

    def history(self, model: str) -> list[dict[str, Any]]:
        """One dictionary per transition, oldest first.  Torn lines and those of another form are left out.

        Raises OSError where the machine does not give it out: what it says must not be passed over.
        """
        path = self.path / check_name(model) / "history.jsonl"
        try:
            content = records.read_ends(path)
        except FileNotFoundError:
            return []
        except OSError as error:
            if of_the_machine(error):
                raise
            log.warning("%s: not used: %s", path, error.strerror or error)  # a directory, a pipe
            return []
        return [entry for line in content.split(b"\n") if (entry := records.transition(line)) is not None]

    # -- writing ---------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raises ServiceError(FAILED_PRECONDITION) where what is live belongs to another server."""
        if self.read_only:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "this server reads its repository and changes nothing (read_only); ask the one that has it",
                "state",
            )

    def ensure_model_dir(self, name: str) -> Path:
        """The directory of a model, or of a frame group, which has no versions; made when it is absent."""
        home = self.path / check_name(name)
        if not self.read_only:
            home.mkdir(exist_ok=True)
        return home

    def stage(self, model: str) -> Path:
        """A fresh directory to write a version into; `publish` turns it into one."""
        home = self.path / check_name(model)
        home.mkdir(parents=True, exist_ok=True)
        unique = uuid.uuid4().hex
        # Locked before it gets the name that `sweep` looks for: no one can mistake a
        # directory that is being written for one whose writer died.
        new = home / f"{_NEW}{unique}"
        new.mkdir(parents=True)  # `abandon` of another may have removed the model's empty directory
        descriptor = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        staged = home / f"{_STAGING}{unique}"
        new.rename(staged)
        self._locks[staged] = descriptor
        return staged

    def publish(
        self,
        model: str,
        staged: Path,
        manifest: dict[str, Any],
        config_pbtxt: str = "",
        labels: list[str] | None = None,
        sign: Callable[[str], bytes] | None = None,
    ) -> int:
        """Makes the staged directory the next version of `model`, durably, by one rename; returns its number.

        Adds "schema", "model", "version", "created", "files" and "digest" to the manifest.
        Parallel publishers get different numbers.  Numbers are never reused.  `sign` makes the signature of
        the digest (`runtime.repository.signing.signer`).
        """
        home = self.path / check_name(model)
        if staged.parent != home or not staged.name.startswith(_STAGING):
            raise ValueError(f"{staged} was not made by stage('{model}')")
        files: dict[str, dict[str, Any]] = {}
        for entry in sorted(staged.iterdir()):
            if entry.name in (MANIFEST, SIGNATURE):
                continue
            if entry.is_symlink() or not entry.is_file():
                raise ValueError(f"{entry.name}: a version holds plain files only, no directories or links")
            content = entry.read_bytes()
            files[entry.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            sync(entry)
        if not files:
            raise ValueError(f"{staged} is empty; write the engine into it before publishing")
        whole = {**manifest, "schema": SCHEMA, "model": model, "files": files}
        whole.setdefault("created", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        whole.setdefault("engine", {"kind": "onnxruntime", "precision": "fp32", "file": "model.onnx"})
        beside: dict[Path, bytes] = {}
        if config_pbtxt:
            beside[home / "config.pbtxt"] = config_pbtxt.encode()
        if labels is not None:
            beside[home / "labels.txt"] = "".join(f"{label}\n" for label in labels).encode()
        with _replaced(beside):
            number = self._appear(home, model, staged, whole, sign)
        sync(home)
        sync(self.path)
        self._unlock(staged)
        return number

    def _appear(
        self,
        home: Path,
        model: str,
        staged: Path,
        whole: dict[str, Any],
        sign: Callable[[str], bytes] | None,
    ) -> int:
        """Writes the manifest and renames, to the next number that is free; returns it."""
        number = self._last_number(model) + 1
        while True:
            if not records.number(number):  # no reader would see it
                raise ValueError(
                    f"'{model}' has no number left: a directory, live.json or history.jsonl names version "
                    f"{number - 1}; take out what is damaged"
                )
            whole["version"] = number
            whole["digest"] = digest(whole)
            _write(
                staged / MANIFEST,
                (json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(),
            )
            if sign is not None:
                _write(staged / SIGNATURE, sign(whole["digest"]))
            sync(staged)
            try:
                # rename(2) refuses a directory that is not empty, so the loser of a race tries the next
                # number
                os.rename(staged, home / str(number))
                return number
            except OSError:
                if not (home / str(number)).exists():
                    raise
                number += 1

    def abandon(self, staged: Path) -> None:
        """Removes a staged directory that will not be published."""
        shutil.rmtree(staged, ignore_errors=True)
        self._unlock(staged)
        with contextlib.suppress(OSError):  # a model that never got a version leaves nothing behind
            staged.parent.rmdir()

    def set_live(self, model: str, value: dict[str, Any]) -> None:
        """Replaces live.json atomically and durably; OSError when the disk refuses, or in `read_only`."""
        if self.read_only:
            raise OSError(errno.EROFS, "the repository is served read-only")
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        _replace(self.path / check_name(model) / "live.json", text.encode(errors="replace"))

    def append_history(self, model: str, entry: dict[str, Any]) -> None:
        """Appends one line; a torn last line (a kill while writing) is closed first."""
        if self.read_only:
            return
        with self._history:
            path = self.path / check_name(model) / "history.jsonl"
            self._append(path, entry)
            if path.stat().st_size > max(HISTORY_BYTES, 2 * self._shortened.get(path, 0)):
                self._shorten(model, path)

    @staticmethod
    def _append(path: Path, entry: dict[str, Any]) -> None:
        text = json.dumps(entry, ensure_ascii=False, default=str)
        line = text.encode(errors="replace") + b"\n"  # file names may be no Unicode
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        with open(descriptor, "ab+") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a pipe takes lines and gives none back
                raise OSError(errno.EINVAL, "not a plain file")
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _shorten(self, model: str, path: Path) -> None:
        """Makes room in a history by one rename.  The newest lines stay, and of the older ones those that
        decide something (`records.deciding`); the whole of it is once more beside it, as history.old.jsonl.
        """
        content = records.read_ends(path)
        lines = [line + b"\n" for line in content.split(b"\n") if line]
        whole = [(line, entry) for line in lines if (entry := records.transition(line)) is not None]
        decide = records.deciding([entry for _, entry in whole], set(self.versions(model)))
        room = max(HISTORY_BYTES // 4, HISTORY_BYTES // 2 - sum(len(whole[n][0]) for n in decide))
        newest = len(whole)
        while newest > 0 and (room := room - len(whole[newest - 1][0])) >= 0:
            newest -= 1
        kept = b"".join(line for n, (line, _) in enumerate(whole) if n >= newest or n in decide)
        _replace(path.with_name("history.old.jsonl"), content)
        _replace(path, kept)
        self._shortened[path] = len(kept)

    def mark_deleted(self, model: str, version: int) -> Path:
        """Takes a version out of the repository, durably, by one rename; returns where it is, for `remove`.
        What a kill leaves of it is swept at the next start.
        """
        self.check_writable()
        directory = self.directory(model, version)
        gone = directory.with_name(f"{_GONE}{version}-{uuid.uuid4().hex}")
        os.rename(directory, gone)
        sync(directory.parent)
        return gone

    def restore_deleted(self, model: str, version: int, gone: Path) -> None:
        """Undoes `mark_deleted`, as far as the disk lets it: what stays aside is swept at the next start."""
        with contextlib.suppress(OSError):
            os.rename(gone, self.directory(model, version))
            sync(gone.parent)

    def remove(self, gone: Path) -> None:
        """The rest of `mark_deleted`."""
        if gone.name.startswith(_GONE):
            _remove(gone)

    def sweep(self) -> list[Path]:
        """Removes what killed writers left behind; returns what was removed.

        A staging directory whose writer lives is locked by it and stays.
        """
        removed = []
        for path in list(self._leftovers()):
            with contextlib.suppress(OSError):  # its writer was faster, or it is not ours
                if self._swept(path):
                    removed.append(path)
        return removed

    def _swept(self, path: Path) -> bool:
        if path.name.startswith(_STAGING):
            return self._sweep_staging(path)
        if path.name.startswith(_GONE):
            return _remove(path)
        # between creation and lock or rename: a moment, so an old one has no owner
        return time.time() - path.lstat().st_mtime > 60 and _remove(path)

    def _leftovers(self) -> Iterator[Path]:
        for home in self.path.iterdir():
            if home.is_dir() and not home.is_symlink():
                with contextlib.suppress(OSError):  # gone meanwhile, or a lost+found of root's
                    for path in home.iterdir():
                        if path.name.startswith((_STAGING, _NEW, _TEMPORARY, _GONE)):
                            yield path

    def _sweep_staging(self, path: Path) -> bool:
        if path in self._locks:
            return False
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        else:
            return _remove(path)
        finally:
            os.close(descriptor)

    def _last_number(self, model: str) -> int:
        numbers = [0, *self.versions(model)]
        live = self.live(model) or {}
        recorded = [live.get("live") or 0, live.get("previous") or 0]
        return max(numbers + recorded + [records.given(entry) for entry in self.history(model)])

    def _unlock(self, staged: Path) -> None:
        descriptor = self._locks.pop(staged, None)
        if descriptor is not None:
            os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex}")
    with replace_file(path, durable_name=True, temporary=temporary) as file:
        file.write(content)


@contextlib.contextmanager
def _replaced(contents: dict[Path, bytes]) -> Iterator[None]:
    """Files with these contents; with those they had, where the body fails."""
    before = {path: path.read_bytes() if path.is_file() else None for path in contents}
    try:
        for path, content in contents.items():
            _replace(path, content)
        yield
    except BaseException:
        for path, old in before.items():
            with contextlib.suppress(OSError):
                if path.read_bytes() != contents[path]:
                    continue  # not reached yet, or another publisher's by now
                if old is None:
                    path.unlink()
                else:
                    _replace(path, old)
        raise


def _remove(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return not path.exists()
