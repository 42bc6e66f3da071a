"""``python -m runtime.ctl``: versions and the guarded swap from a shell."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from runtime.client import Client, Event, Rejected

_EPILOG = """\
examples:
  python -m runtime.ctl --server 127.0.0.1:8001 status
  python -m runtime.ctl --server 127.0.0.1:8001 submit road 4
  python -m runtime.ctl --server 127.0.0.1:8001 freeze road --reason "driving"
  python -m runtime.ctl --server 127.0.0.1:8001 --json versions road

states of a version:
  SUBMITTED -> VERIFIED -> SHADOWING -> LIVE -> (RETIRED | ROLLED_BACK), or REJECTED with the check that
  refused it

exit codes:
  0 done (submit, promote: the version is live), 1 refused or no answer, 2 usage
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m runtime.ctl",
        description="Look at and steer a running Roadworthy server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--server", default="127.0.0.1:8001", metavar="HOST:PORT", help="default 127.0.0.1:8001")
    p.add_argument("--token", default="", help="sent as 'authorization: Bearer …'")
    p.add_argument("--ca", metavar="FILE", help="PEM certificate of the server's authority: connect with TLS")
    p.add_argument("--certificate", metavar="FILE", help="PEM certificate of this client (mTLS)")
    p.add_argument("--key", metavar="FILE", help="PEM key of that certificate")
    p.add_argument("--timeout", type=float, default=None, metavar="S", help="give up waiting after S seconds")
    p.add_argument(
        "--json",
        action="store_true",
        help="one JSON object (watch, submit, promote: one a line) on standard output",
    )
    sub = p.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, model: str = "needed") -> argparse.ArgumentParser:
        # The options may stand on either side of the verb.
        v = sub.add_parser(name, help=text, description=text)
        v.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        v.add_argument("--server", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if model == "needed":
            v.add_argument("model")
        elif model == "optional":
            v.add_argument("model", nargs="?", default="")
        return v

    verb("status", "what every model (or one) is doing, and the account of requests", "optional")
    verb("versions", "the versions of a model, their states and lineage")
    verb("history", "every transition of a model's versions")
    verb("submit", "offer a version to the guarded swap and follow it").add_argument("version", type=int)
    verb("promote", "make a version live after its checks, without shadowing").add_argument(
        "version", type=int
    )
    verb("rollback", "go back to the previous version")
    verb("pin", "fix the live version").add_argument("version", type=int, nargs="?", default=0)
    verb("unpin", "release the live version")
    verb("freeze", "forbid flips of a model, or of all", "optional").add_argument("--reason", default="")
    verb("unfreeze", "allow flips again", "optional")
    verb("watch", "print every event from now on", "optional")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    try:
        with Client(options.server, token=options.token, credentials=_credentials(options)) as client:
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
    verb, model = options.verb, options.model
    if verb in ("submit", "promote"):
        follow = client.submit if verb == "submit" else client.promote
        return _follow(follow(model, options.version, timeout=options.timeout), options.json)
    if verb == "watch":
        with client.watch(model) as events:
            _follow(events, options.json, want="")
        return 0
    if verb == "versions":
        return _versions(client.versions(model), options.json)
    if verb == "history":
        _follow(client.history(model), options.json, want="")
        return 0
    if verb == "rollback":
        return _follow([client.rollback(model)], options.json, want="ROLLED_BACK")
    if verb == "status":
        status = client.status(model)
    elif verb == "pin":
        status = client.pin(model, options.version)
    elif verb == "freeze":
        status = client.freeze(model, options.reason)
    else:
        status = {"unpin": client.unpin, "unfreeze": client.unfreeze}[verb](model)
    return _status(status, options.json)


def _credentials(options: Any) -> Any:
    if not options.ca:
        return None

    def read(path: str | None) -> bytes | None:
        if not path:
            return None
        with open(path, "rb") as file:
            return file.read()

    return grpc.ssl_channel_credentials(read(options.ca), read(options.key), read(options.certificate))


def _follow(events: Iterable[Event], as_json: bool, want: str = "LIVE") -> int:
    state = ""
    for event in events:
        state = event.state
        if state == "REJECTED" and want == "LIVE":
            refused = f"'{event.model}' version {event.version} is refused by the check '{event.check}'"
            print(f"runtime.ctl: {refused}: {event.reason}", file=sys.stderr)
        if as_json:
            print(json.dumps(dataclasses.asdict(event), ensure_ascii=False), flush=True)
        else:
            text = f"{event.model} {event.version:>4}  {event.state}"
            if event.check:
                text += f" ({event.check})"
            print(text + (f"  {event.reason}" if event.reason else ""), flush=True)
    return 0 if state == want else 1


def _versions(versions: list[dict[str, Any]], as_json: bool) -> int:
    if as_json:
        print(json.dumps({"versions": versions}, ensure_ascii=False))
        return 0
    table = Table("version", "state", "created", "pack", "parent", "round", "reason")
    for v in versions:
        table.add_row(
            str(v["version"]),
            v["state"],
            v["created"],
            v["pack"][:12],
            v["parent"][:12],
            v["round"],
            v["reason"],
        )
    Console().print(table)
    return 0


def _status(status: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(status, ensure_ascii=False))
        return 0
    table = Table(
        "model", "live", "previous", "candidate", "flags", "accepted", "answered", "rejected", "in flight"
    )
    for name, m in status["models"].items():
        flags = [flag for flag in ("pinned", "frozen", "watching") if m[flag]] + (
            [] if m["ready"] else [f"not ready: {m['reason']}"]
        )
        account = m["account"]
        rejected = ", ".join(f"{k} {n}" for k, n in sorted(account["rejected"].items())) or "0"
        candidate = f"{m['candidate']} {m['candidate_state']}" if m["candidate"] else "-"
        table.add_row(
            name,
            str(m["live"] or "-"),
            str(m["previous"] or "-"),
            candidate,
            ", ".join(flags),
            str(account["accepted"]),
            str(account["answered"]),
            rejected,
            str(account["in_flight"]),
        )
    Console().print(table)
    state = "draining" if status["draining"] else "serving"
    print(f"{status['server']} {status['version']}, {state}, up {status['uptime_seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
