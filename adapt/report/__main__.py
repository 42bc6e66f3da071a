"""``python -m adapt.report``: the HTML report of a finished round."""

from __future__ import annotations

import argparse
import sys

from common.cli import run_command

EPILOG = """\
examples:
  python -m adapt.report adapt-road/round-0001
  python -m adapt.report adapt-road/round-0001 --out /tmp/round.html

exit codes: 0 written, 1 no finished round there or nothing could be written (one line on stderr), 2 usage
"""


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.report")


def _command(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m adapt.report",
        description="Write the report of a round as one HTML file: pictures before and after, pseudo-labels, "
        "thresholds, every decision of the gate, the swap, the lineage. It holds frames of the road.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="ROUND_DIR", help="folder of a round: WORKDIR/round-0001")
    parser.add_argument("--out", metavar="FILE", help="where to write (ROUND_DIR/report.html)")
    arguments = parser.parse_args(argv)
    from adapt.report.round import ReportError, write

    try:
        print(write(arguments.folder, arguments.out))
    except (ReportError, OSError) as error:
        print(f"adapt.report: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
