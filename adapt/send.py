"""``python -m adapt.send``: send frames of a folder, a video or a recording, as a camera does.

Without torch.  The answers are counted, not kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from common.cli import run_command

EPILOG = """\
examples:
  # five frames a second of a folder, round and round, for adapt.run to learn from
  python -m adapt.send frames/ --server 127.0.0.1:8001 --model road --rate 5 --loop
  # a video as camera "front", as fast as it is answered
  python -m adapt.send front=drive.mp4 --server 127.0.0.1:8001 --model road --rate 0

From Python:
  from runtime.client import Client
  with Client("127.0.0.1:8001") as client:
      answer = client.infer("road", frame, source="front")    # frame: uint8 [H,W,3] RGB

exit codes: 0 every frame was answered, 1 some were not, or failed (one line on stderr says why), 2 wrong
usage, 130 interrupted (Ctrl-C)
"""
CONTACT = 10.0  # seconds in which the server must answer once


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m adapt.send",
        description="Send frames to a served model at a steady rate, as a camera would.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("source", metavar="[CAMERA=]PATH", help="a folder of pictures, a video, or MCAP[#TOPIC]")
    p.add_argument("--server", required=True, metavar="HOST:PORT", help="the live service")
    p.add_argument("--model", required=True, help="the served model")
    p.add_argument("--rate", type=float, default=5.0, metavar="F", help="frames a second; 0: no pause (5)")
    p.add_argument("--frames", type=int, default=0, metavar="N", help="end after N frames (0: all)")
    p.add_argument("--loop", action="store_true", help="begin again at the end, until Ctrl-C or --frames")
    p.add_argument("--timeout", type=float, default=10.0, metavar="S", help="for an answer (10)")
    p.add_argument("--token-file", type=Path, metavar="FILE", help="token for the server (role infer)")
    p.add_argument("--ca", type=Path, metavar="PEM", help="certificate authority of the server: TLS")
    p.add_argument("--json", action="store_true", help="print the counts as one JSON object on stdout")
    return p


def input_size(server: str, model: str, token: str, credentials: Any) -> tuple[int, int] | None:
    """(H, W) that the model takes, or None if it takes any.  Raises grpc.RpcError."""
    import grpc

    from protos import inference_pb2, inference_pb2_grpc

    opened = (
        grpc.insecure_channel(server) if credentials is None else grpc.secure_channel(server, credentials)
    )
    with opened as channel:
        stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        told = stub.ModelMetadata(
            inference_pb2.ModelMetadataRequest(name=model),
            timeout=CONTACT,
            wait_for_ready=True,
            metadata=(("authorization", f"Bearer {token}"),) if token else (),
        )
    shape = list(told.inputs[0].shape) if told.inputs else []
    if len(shape) < 3 or shape[-1] != 3:
        raise ValueError(f"model {model!r} takes {shape}, not frames [H,W,3]: send it what it takes")
    height, width = int(shape[-3]), int(shape[-2])
    return (height, width) if height > 0 and width > 0 else None


def send(arguments: argparse.Namespace) -> dict[str, int]:
    """Send as told; {"sent", "answered", "refused"}.

    Raises SourceError, ValueError, OSError, and grpc.RpcError while no frame was answered.
    """
    import grpc

    from adapt.data.base import resize_frame
    from adapt.sources import SourceError, open_source
    from runtime.client import Client, Rejected

    credentials = None
    if arguments.ca is not None:
        credentials = grpc.ssl_channel_credentials(arguments.ca.read_bytes())
    token = arguments.token_file.read_text(encoding="utf-8").strip() if arguments.token_file else ""
    open_source(arguments.source).close()  # a path that is not there is said before the server is asked
    size = input_size(arguments.server, arguments.model, token, credentials)
    count = {"sent": 0, "answered": 0, "refused": 0}
    said: set[str] = set()
    begin = time.monotonic()
    with Client(arguments.server, token=token, credentials=credentials) as client:
        while True:
            before = count["sent"]
            source = open_source(arguments.source)
            while (captured := source.get(0.0)) is not None:
                if arguments.rate:
                    time.sleep(max(0.0, begin + count["sent"] / arguments.rate - time.monotonic()))
                frame = captured.frame if size is None else resize_frame(captured.frame, size)
                count["sent"] += 1
                try:
                    client.infer(arguments.model, frame, source=captured.source, timeout=arguments.timeout)
                    count["answered"] += 1
                except Rejected as error:
                    count["refused"] += 1
                    if error.reason not in said and len(said) < 10:
                        said.add(error.reason)
                        print(f"adapt.send: frame {count['sent']}: {error.reason}", file=sys.stderr)
                except grpc.RpcError:
                    if not count["answered"]:
                        raise
                    count["refused"] += 1
                if arguments.frames and count["sent"] >= arguments.frames:
                    source.close()
                    return count
            if count["sent"] == before:
                raise SourceError(f"source {arguments.source} gave no frame: is there a picture in it?")
            if not arguments.loop:
                return count


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.send")


def _command(argv: list[str] | None) -> int:
    command = parser()
    arguments = command.parse_args(argv)
    if not 0 <= arguments.rate <= 10_000 or not 0 < arguments.timeout < 86_400 or arguments.frames < 0:
        command.error("--rate and --frames must not be negative, --timeout must be above 0")
    import grpc

    from adapt.sources import SourceError

    try:
        count = send(arguments)
    except grpc.RpcError as error:
        details: Any = error
        code = details.code().name if hasattr(details, "code") else type(error).__name__
        reason = details.details() if hasattr(details, "details") else ""
        words = f"server {arguments.server!r}: {code}: {reason}; start runtime.serve or correct --server"
        print(f"adapt.send: {' '.join(words.split())}", file=sys.stderr)
        return 1
    except (SourceError, ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename!r} cannot be used: {error.strerror}; check the path"
        print(f"adapt.send: {' '.join(text.split())}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(count))
    else:
        print(f"{count['sent']} frames sent, {count['answered']} answered, {count['refused']} refused")
    return 0 if count["answered"] == count["sent"] else 1


if __name__ == "__main__":
    sys.exit(main())
