"""``python -m runtime.ctl``: versions, the guarded swap, drift and adaptation from a shell."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc

from common import files
from runtime import tables
from runtime.client import Client, Event, Rejected, Stream, token
from runtime.client.token import VARIABLE

PATIENCE = 10.0  # seconds that the server may take to answer, unless --timeout says otherwise

_EPILOG = """\
examples:
  python -m runtime.ctl --server 127.0.0.1:8001 status
  python -m runtime.ctl --server 127.0.0.1:8001 submit road 4
  python -m runtime.ctl --server 127.0.0.1:8001 freeze road --reason "driving"
  python -m runtime.ctl --server 127.0.0.1:8001 start-round road --reason "first snow"
  python -m runtime.ctl --server 127.0.0.1:8001 submit-group front road=4 edges=7
  python -m runtime.ctl --server 127.0.0.1:8001 --json versions road

states of a version:
  SUBMITTED -> VERIFIED -> SHADOWING -> LIVE -> (RETIRED | ROLLED_BACK), or REJECTED with the check that
  refused it

exit codes:
  0 done (submit, promote, reset, submit-group: live), 1 refused or no answer, 2 usage
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m runtime.ctl",
        description="Look at and steer a running Roadworthy server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--server", default="127.0.0.1:8001", metavar="HOST:PORT", help="default 127.0.0.1:8001")
    secret = p.add_mutually_exclusive_group()
    secret.add_argument(
        "--token-file",
        metavar="FILE",
        help=f"file with the token, sent as 'authorization: Bearer …'; without it, {VARIABLE} is sent",
    )
    secret.add_argument("--token", default="", help="the token itself; 'ps' shows it on the whole machine")
    p.add_argument("--ca", metavar="FILE", help="PEM certificate of the server's authority: connect with TLS")
    p.add_argument("--certificate", metavar="FILE", help="PEM certificate of this client (mTLS)")
    p.add_argument("--key", metavar="FILE", help="PEM key of that certificate")
    p.add_argument(
        "--timeout",
        type=_seconds,
        default=None,
        metavar="S",
        help=f"give up after S seconds (default {PATIENCE:g}; swaps and watching take their time)",
    )
    p.add_argument(
        "--json",
        action="store_true",
        help="JSON on standard output: one object, or one a line where there are many (events, reports)",
    )
    sub = p.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, what: str = "model", *, optional: bool = False) -> argparse.ArgumentParser:
        # The options may stand on either side of the verb.
        v = sub.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        v.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        v.add_argument("--server", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        v.add_argument("--timeout", type=_seconds, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        about = {
            "model": "name of the model, as status lists it",
            "group": "name of the frame group, as groups lists it",
        }[what]
        if optional:
            v.add_argument(what, nargs="?", default="", help=f"{about}; all without it")
        else:
            v.add_argument(what, help=about)
        return v

    def version(v: argparse.ArgumentParser) -> None:
        v.add_argument("version", type=int, help="its number, as versions lists it")

    def reason(v: argparse.ArgumentParser) -> None:
        v.add_argument("--reason", default="", help="why, for those who read it later (500 characters)")

    verb("status", "what every model (or one) is doing, and the account of requests", optional=True)
    verb("versions", "the versions of a model, their states and lineage")
    verb("history", "every transition of a model's versions, oldest first")
    version(verb("submit", "offer a version to the guarded swap and follow it"))
    version(verb("promote", "make a version live after its checks, without shadowing"))
    verb("rollback", "go back to the previous version")
    verb("reset", "go back to the released pack: the newest version that no round of adaptation made")
    verb("prune", "delete old versions that rounds of adaptation made").add_argument(
        "--keep", type=int, default=0, metavar="N", help="how many stay, the newest (default: keep_versions)"
    )
    verb("pin", "fix the live version").add_argument(
        "version", type=int, nargs="?", default=0, help="its number, to be sure"
    )
    verb("unpin", "release the live version")
    reason(verb("freeze", "forbid flips of a model, or of all", optional=True))
    verb("unfreeze", "allow flips again", optional=True)
    verb("watch", "print every event from now on", optional=True)

    verb("groups", "the frame groups, their generations and members", "group", optional=True)
    members = verb("submit-group", "offer versions of several members to the guarded swap as one", "group")
    members.add_argument(
        "members", nargs="+", type=_member, metavar="MODEL=VERSION", help="members that are to change"
    )
    verb("rollback-group", "every member back to the generation before", "group")

    verb("drift", "how far what a model sees is from what it was made for, by camera and signal")
    verb("adaptation", "what a model's adapter is doing: phase, frames kept, pseudo-labels, the last round")
    reason(verb("start-round", "tell the adapter to begin a round of adaptation now"))
    verb("cancel-round", "tell the adapter to give up its round")
    verb("watch-round", "print the adapter's reports as they come")
    switch = verb("collection", "tell the adapter to keep frames, or not to")
    switch.add_argument("switch", choices=("on", "off"))
    return p


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.token:
        print(f"runtime.ctl: 'ps' shows --token; use --token-file or {VARIABLE}", file=sys.stderr)
    try:
        with Client(
            options.server,
            token=token.given(options.token, options.token_file),
            credentials=_credentials(options),
            deadline=options.timeout or PATIENCE,
        ) as client:
            return _run(client, options)
    except Rejected as refusal:
        print(f"runtime.ctl: {refusal}", file=sys.stderr)
    except grpc.RpcError as error:
        print(
            f"runtime.ctl: {options.server}: {error.code().name}: {error.details()}; is the server running?",
            file=sys.stderr,
        )
    except (OSError, ValueError) as error:  # a number that no message holds, a file that is not there
        print(f"runtime.ctl: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 1
    return 1


def _run(client: Client, options: Any) -> int:
    verb, as_json = options.verb, options.json
    model = getattr(options, "model", "")
    swaps: dict[str, Callable[[], Iterable[Event]]] = {
        "submit": lambda: client.submit(model, options.version, timeout=options.timeout),
        "promote": lambda: client.promote(model, options.version, timeout=options.timeout),
        "reset": lambda: client.reset(model, timeout=options.timeout),
        "submit-group": lambda: client.submit_group(
            options.group, dict(options.members), timeout=options.timeout
        ),
    }
    looks: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        "status": (lambda: client.status(model), tables.status),
        "versions": (lambda: client.versions(model), tables.versions),
        "prune": (lambda: client.prune(model, options.keep), tables.pruned),
        "pin": (lambda: client.pin(model, options.version), tables.status),
        "unpin": (lambda: client.unpin(model), tables.status),
        "freeze": (lambda: client.freeze(model, options.reason), tables.status),
        "unfreeze": (lambda: client.unfreeze(model), tables.status),
        "groups": (lambda: client.groups(options.group), tables.groups),
        "drift": (lambda: client.drift(model), tables.drift),
        "adaptation": (lambda: client.adaptation(model), tables.adaptation),
        "start-round": (lambda: client.start_round(model, options.reason), tables.adaptation),
        "cancel-round": (lambda: client.cancel_round(model), tables.adaptation),
        "collection": (lambda: client.set_collection(model, options.switch == "on"), tables.adaptation),
    }
    if verb in swaps:
        return _follow(swaps[verb](), as_json, want="LIVE")
    if verb in looks:
        ask, show = looks[verb]
        values = ask()
        named = {"versions": values} if verb == "versions" else values
        print(json.dumps(named, ensure_ascii=False)) if as_json else show(values)
        return 0
    if verb == "watch":
        with client.watch(model) as events, _limited(events, options.timeout):
            return _follow(events, as_json, dated=True)
    if verb == "watch-round":
        with client.watch_round(model) as reports, _limited(reports, options.timeout):
            if not client.adaptation(model)["adapters"]:
                print(f"runtime.ctl: no adapter of '{model}' is connected; waiting for one", file=sys.stderr)
            for report in reports:
                line = json.dumps(report, ensure_ascii=False) if as_json else tables.progress(report)
                print(line, flush=True)
        return 0
    if verb == "history":
        return _follow(client.history(model), as_json, dated=True)
    if verb == "rollback-group":
        return _follow(client.rollback_group(options.group), as_json)
    assert verb == "rollback"
    return _follow([client.rollback(model)], as_json)


def _follow(events: Iterable[Event], as_json: bool, *, want: str = "", dated: bool = False) -> int:
    """Prints events; with `want`, exit code 0 only if that is the last one's state."""
    last = None
    for last in events:
        if as_json:
            print(json.dumps(dataclasses.asdict(last), ensure_ascii=False), flush=True)
        else:
            print(tables.event(last, dated=dated), flush=True)
    if want and last is not None and last.state == "REJECTED":
        what = f"'{last.model}'" + (f" version {last.version}" if last.version else "")
        print(f"runtime.ctl: {what} is refused by the check '{last.check}': {last.reason}", file=sys.stderr)
    return 0 if not want or (last is not None and last.state == want) else 1


@contextlib.contextmanager
def _limited(stream: Stream[Any], seconds: float | None) -> Iterator[None]:
    """Ends a stream that is watched after `seconds`, None = when somebody ends it."""
    timer = threading.Timer(seconds or 0.0, stream.close)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _credentials(options: Any) -> Any:
    """None without TLS.  Raises ValueError: half of a pair, or no authority; OSError: no such file."""
    if not (options.ca or options.certificate or options.key):
        return None
    if bool(options.certificate) != bool(options.key):
        raise ValueError("--certificate and --key belong together; give both")

    def read(path: str | None) -> bytes | None:
        if not path:
            return None
        return files.read_file(path)

    return grpc.ssl_channel_credentials(read(options.ca), read(options.key), read(options.certificate))


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def _member(text: str) -> tuple[str, int]:
    model, sign, number = text.rpartition("=")
    if not sign or not model or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}': must be MODEL=VERSION, as road=4")
    return model, int(number)


if __name__ == "__main__":
    sys.exit(main())
