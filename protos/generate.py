"""Regenerates the committed stubs: ``python -m protos.generate``.

Runs the compiler of grpcio-tools over ``protos/*.proto`` and adapts what it writes in
three ways, each of them needed and none of them touching the wire:

* the default descriptor pool becomes ours (see ``protos/_pool.py``);
* the generated version check goes, because the descriptors are plain data that every
  protobuf from 6.30 to 7 reads, while the check pins them to the compiler's release;
* likewise the check of the grpcio release in the service stubs.

``--check`` writes nothing and exits 1 when the committed stubs differ.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("model_config.proto", "inference.proto", "roadworthy.proto")
SERVICES = ("inference.proto", "roadworthy.proto")


def generate(out: Path) -> dict[str, str]:
    """Compiles the .proto files in the scratch directory `out`; returns {file name: adapted text}."""
    from grpc_tools import protoc

    include = HERE.parent
    arguments = [
        "protoc",
        f"-I{include}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
    ]
    if protoc.main([*arguments, *(f"protos/{name}" for name in SOURCES)]) != 0:
        raise RuntimeError("protoc failed; its message is above; correct the .proto file and run again")
    texts: dict[str, str] = {}
    for name in SOURCES:
        stem = name.removesuffix(".proto")
        texts[f"{stem}_pb2.py"] = _adapt_messages((out / "protos" / f"{stem}_pb2.py").read_text())
        texts[f"{stem}_pb2.pyi"] = (out / "protos" / f"{stem}_pb2.pyi").read_text()
        if name in SERVICES:
            texts[f"{stem}_pb2_grpc.py"] = _adapt_services(
                (out / "protos" / f"{stem}_pb2_grpc.py").read_text()
            )
    return texts


def _adapt_messages(text: str) -> str:
    text = re.sub(r"# Protobuf Python Version: .*\n", "", text)
    text = re.sub(r"from google\.protobuf import runtime_version as _runtime_version\n", "", text)
    text = re.sub(r"_runtime_version\.ValidateProtobufRuntimeVersion\((?:.|\n)*?\)\n", "", text)
    text = text.replace(
        "from google.protobuf import descriptor_pool as _descriptor_pool\n",
        "from protos._pool import POOL as _pool\n",
    )
    return text.replace("_descriptor_pool.Default()", "_pool")


def _adapt_services(text: str) -> str:
    start = text.index("GRPC_GENERATED_VERSION = ")
    end = text.index("\n\n", text.index("if _version_not_supported:"))
    return text[:start].replace("import warnings\n", "") + text[end:].lstrip("\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m protos.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 written (or equal, with --check), 1 different, or the compiler failed, 2 usage",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare only; exit 1 when the committed stubs differ"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        texts = generate(Path(scratch))
    different = [name for name, text in texts.items() if not _same(HERE / name, text)]
    if options.check:
        for name in different:
            print(
                f"protos/{name} differs from what the compiler writes; run python -m protos.generate",
                file=sys.stderr,
            )
        return 1 if different else 0
    for name in different:
        (HERE / name).write_text(texts[name])
    print(f"{len(different)} of {len(texts)} files changed", file=sys.stderr)
    return 0


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
