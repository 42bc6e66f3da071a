"""``python -m bench.demo``: the main job end to end, with a table and a report (what ``make demo`` runs)."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

EPILOG = """\
what happens, for each seed:
  a vehicle streams rendered streets of another domain at a served engine; the adapter collects frames from
  the live service, adapts the network without labels, builds a refreshed engine and submits it; the server
  tries it in the shadow of live traffic and swaps it in; then, and only then, both versions are scored on
  held-out streets

examples:
  python -m bench.demo                          one seed, report in out/demo
  python -m bench.demo --seeds 3 --out out/demo
  python -m bench.demo --domain night --json

exit codes:
  0 every seed ended with the refreshed version live and no request lost
  1 something failed, a request was lost, or a version was refused (one line on stderr says what)
  2 wrong usage
"""


def parser() -> argparse.ArgumentParser:
    from adapt.data.street.scenes import DOMAINS
    from bench.demo.run import PACK, Settings

    default = Settings()
    p = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description="Build, serve, drive, collect, adapt, swap and score on rendered streets; writes "
        "report.html and summary.json.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds, from --first on (1)")
    p.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (0)")
    p.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="everything is written here"
    )
    p.add_argument(
        "--pack", type=Path, default=PACK, metavar="PACK", help="the released pack (packs/street-day)"
    )
    p.add_argument(
        "--domain",
        choices=[d for d in DOMAINS if d != "day"],
        default=default.domain,
        help="what the vehicle drives into (%(default)s)",
    )
    p.add_argument(
        "--rate", type=float, default=default.rate, metavar="FPS", help="frames a second (%(default)g)"
    )
    p.add_argument(
        "--frames", type=int, default=default.frames, metavar="N", help="frames to collect (%(default)s)"
    )
    p.add_argument("--portions", default=default.portions, help="portions of the self-training (%(default)s)")
    p.add_argument(
        "--heldout", type=int, default=default.heldout, metavar="N", help="frames to score (%(default)s)"
    )
    p.add_argument("--threads", type=int, default=default.threads, metavar="N", help="of torch (%(default)s)")
    p.add_argument("--json", action="store_true", help="print the summary on stdout instead of the table")
    return p


def libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "onnxruntime", "grpcio", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def show(content: dict[str, Any], out: Path) -> None:
    """The tables on standard output."""
    from rich.console import Console
    from rich.table import Table

    from bench.demo.report import PHASES

    console = Console()

    def pct(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    def ms(value: float | None) -> str:
        return "–" if value is None else f"{value:.0f}"

    table = Table(title=f"IoU on held-out {content['domain']} streets, % (mean of {len(content['seeds'])})")
    for name in ("class", "by day", "before", "after", "labelled bound"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for i, name in enumerate(content["classes"]):
        table.add_row(name, *(pct(content["iou"][k][i]) for k in ("source", "before", "after", "upper")))
    mean, spread = content["mean"], content["spread"]
    table.add_section()
    keys = ("miou_source", "miou_before", "miou_after", "miou_upper")
    several = len(content["seeds"]) > 1
    table.add_row(
        "mIoU", *(pct(mean[k]) + (f" ± {pct(spread[k])}" if several else "") for k in keys), style="bold"
    )
    console.print(table)
    table = Table(title="Serving while adapting and swapping")
    for name in ("seed", "sent", "answered", "rejected", "failed", "versions", "swap s", "whole run s"):
        table.add_column(name, justify="right")
    for r in content["seeds"]:
        table.add_row(
            *(str(r[k]) for k in ("seed", "sent", "answered", "rejected", "failed")),
            ", ".join(map(str, r["versions_seen"])),
            "–" if r["swap_seconds"] is None else f"{r['swap_seconds']:.2f}",
            f"{r['seconds']['all']:.0f}",
        )
    console.print(table)
    table = Table(title="Latency seen by the vehicle, ms" + (" (mean over the seeds)" if several else ""))
    for name in ("phase", "p50", "p99"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for key, words in PHASES:
        table.add_row(words, ms(mean[f"p50_ms_{key}"]), ms(mean[f"p99_ms_{key}"]))
    console.print(table)
    console.print(f"report   {out / 'report.html'}\nsummary  {out / 'summary.json'}")


def problems(content: dict[str, Any]) -> list[str]:
    """Why the demo did not do its job; empty when it did."""
    found = []
    for r in content["seeds"]:
        name = f"seed {r['seed']}"
        if not r["swapped"]:
            refused = [c["reason"] for c in r["round"]["gate"]["checks"] if not c["passed"]]
            refused += [e["reason"] for e in r["events"] if e["state"] == "REJECTED"]
            found.append(
                f"{name}: the refreshed version did not go live ({'; '.join(refused) or 'no reason known'})"
            )
        if r["failed"] or r["sent"] != r["answered"] + r["rejected"]:
            found.append(
                f"{name}: {r['sent'] - r['answered'] - r['rejected']} of {r['sent']} requests were lost"
            )
    return found


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    if a.seeds < 1:
        parser().error("--seeds: at least 1")
    from bench.demo import report
    from bench.demo.run import DemoError, Settings, run_seed
    from common.files import write_json
    from common.progress import ProgressBars
    from export.errors import ExportError
    from networks.pack import PackError, load_pack
    from runtime.client import Rejected, RpcError

    settings = replace(
        Settings(),
        domain=a.domain,
        rate=a.rate,
        frames=a.frames,
        portions=a.portions,
        heldout=a.heldout,
        threads=a.threads,
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # either must end the children too
        signal.signal(number, _interrupt)
    began = time.monotonic()
    runs: list[dict[str, Any]] = []
    try:
        pack = load_pack(a.pack)
        a.out.mkdir(parents=True, exist_ok=True)
        for seed in range(a.first, a.first + a.seeds):
            with ProgressBars() as bars:
                runs.append(run_seed(seed, a.out.resolve(), settings, bars, a.pack.resolve()))
        facts = {
            "domain": a.domain,
            "command": f"make demo SEEDS={a.seeds}"
            if len(sys.argv) < 2
            else "python -m bench.demo " + " ".join(sys.argv[1:]),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 1),
            "machine": f"{len(os.sched_getaffinity(0))} vCPU, {platform.machine()}, CPU only",
            "pack": f"{pack.spec.name} {pack.spec.version}, sha256 {pack.sha256}",
            "training": pack.spec.training,
            "settings": asdict(settings),
            "libraries": libraries(),
        }
        content = report.summary(runs, facts)
        write_json(a.out / "summary.json", content, allow_nan=False)
        (a.out / "report.html").write_text(report.render(content, runs), encoding="utf-8")
    except (DemoError, PackError, ExportError, Rejected, OSError) as error:
        print(f"demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except RpcError as error:  # the server went away in the middle of the scoring
        print(
            f"demo: the server did not answer ({error}): see server.err under {a.out}".replace("\n", " "),
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; its processes have been ended", file=sys.stderr)
        return 1
    if a.json:
        import json

        print(json.dumps(content))
    else:
        show(content, a.out)
    wrong = problems(content)
    for line in wrong:
        print(f"demo: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
