"""What is in a pack, an engine version or any ONNX file: shapes, sizes, hashes, operators, parity, lineage.

    python -m export.inspect repo/road/3 --lineage

This is the command and the text that it prints; `export.describe` finds the facts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from common.cli import run_command
from common.text import one_line
from export.describe import Report, inspect, table
from export.errors import ExportError

__all__ = ["inspect", "main", "show", "show_round"]


def show(report: Report) -> str:
    """Return a report as text for a person.  Raises ExportError if its manifest has another form."""
    shower: Callable[[Report], list[str]] = {
        "pack": _show_pack,
        "version": _show_version,
        "onnx": _show_onnx,
    }[report["kind"]]
    try:
        return "\n".join(shower(report))
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ExportError(
            f"{report['path']}: its manifest is not as export.build writes it ({one_line(error)}); see --json"
        ) from error


def _show_pack(r: Report) -> list[str]:
    lines = [
        f"pack {r['name']} {r['version']}  {r['path']}",
        f"  sha256      {r['sha256']}",
        f"  parent      {r['parent'] or '-'}",
        f"  network     {r['network']} {r['arguments']}, {r['parameters']:,} parameters",
        f"  input       {r['size'][0]}x{r['size'][1]} {r['channel_order']}, mean {r['mean']}, std {r['std']}",
        f"  task        {r['task']}",
        f"  classes     {len(r['classes'])}: {', '.join(r['classes'])}",
        f"  golden      {r['golden']} frames",
        f"  replay      {r['replay']['train']} to train on, {r['replay']['holdout']} held out",
        f"  statistics  prior {r['prior'] or '-'}, reference {', '.join(r['reference']) or '-'}",
        f"  training    {r['training'] or '-'}",
        f"  licence     {r['licence'] or '-'}",
    ]
    if r["adaptation"]:
        lines.append(f"  adaptation  {json.dumps(r['adaptation'])[:200]}")
    return lines


def _show_version(r: Report) -> list[str]:
    m = r["manifest"]
    engine, pack, parity = m["engine"], table(m.get("pack")), table(m.get("parity"))
    lines = [
        f"{m['model']} version {m['version']}  {r['path']}",
        f"  files       {'intact' if r['intact'] else 'DAMAGED: ' + r['damage']}",
        f"  created     {m.get('created', '-')}",
        f"  engine      {engine.get('kind')} {engine.get('precision')}, opset {engine.get('opset')}",
        f"  pack        {pack.get('name', '-')} {pack.get('version', '')}  {str(pack.get('sha256', ''))[:12]}"
        f"  parent {str(pack.get('parent', ''))[:12] or '-'}",
    ]
    size = table(m.get("input"))
    if "height" in size:
        batch = "open" if size.get("dynamic_batch") else "fixed"
        lines.append(f"  task        {m.get('task')}, {size['height']}x{size['width']}, batch {batch}")
    names, limits = m.get("edge_classes") or [], m.get("edge_thresholds") or []
    if names:
        shown = (f"{name} {limit:g}" for name, limit in zip(names, limits, strict=False))
        lines.append(f"  edges       {len(names)}: {', '.join(shown)}")
    if parity.get("frames"):
        verdict = "passed" if parity.get("passed") else "MISSED"
        parts = []
        if parity.get("agreement") is not None:
            parts.append(f"labels {100 * parity['agreement']:.4f} %")
            parts.append(f"confidence {parity['confidence_mean']:.4f} of 255")
        if "bits_equal" in parity:
            parts.append(f"bit fields {100 * parity['bits_equal']:.4f} %")
            parts.append(f"edges {parity['edges_max_difference']} of 255 at most")
        where = f"{parity['frames']} frames ({parity.get('golden')})"
        lines.append(f"  parity      {verdict}: {', '.join(parts)}, {where}")
    for name, entry in sorted(m["files"].items()):
        lines.append(f"  {name:<16}{entry['bytes']:>12,} bytes  {entry['sha256'][:12]}")
    if r.get("live") is not None:
        lines.append(f"  live        version {r['live'].get('live')}, previous {r['live'].get('previous')}")
    for depth, entry in enumerate(r.get("lineage", [])):
        where = (
            f"engine version {entry['engine_version']}"
            if "engine_version" in entry
            else "not in this repository"
        )
        name = f"{entry.get('name') or 'unknown'} {entry.get('version') or ''}".strip()
        lines.append(
            f"  {'lineage' if not depth else '':<10}  {'  ' * depth}{name} {entry['sha256'][:12]} ({where})"
        )
    for row in r.get("rounds", []):
        lines.append(f"  round       {show_round(row)}"[:200])
    for entry in r.get("history", []):
        lines.append(f"  history     {json.dumps(entry)[:160]}")
    if "onnx" in r:
        lines += _show_onnx(r["onnx"])
    if plan := engine.get("plan"):
        count = len(plan.get("refittable") or ())
        lines.append(f"  plan        {plan.get('library')}, {count} weights can be refitted")
    if found := r.get("plan_profile"):
        timing = f"not timed: {found['absent']}" if "absent" in found else "ms a run"
        lines.append(f"  layers      {timing}")
        lines += [f"    {row['layer']:<56}{row['milliseconds']:>10.4f}" for row in found.get("layers_ms", [])]
    return lines


def show_round(row: Report) -> str:
    """Return one line: the origin of a version, what its gate measured, and what became of it."""
    parts = [f"version {row['version']}", row["state"] or "never submitted"]
    parts += [part for part in (row["check"], row["reason"]) if part]
    if "damage" in row:
        return ", ".join([*parts, f"damaged: {row['damage']}"])
    if not row["round"]:
        return ", ".join([*parts, "the released pack" if not row["parent"] else "no round"])
    parts.append(f"round {str(row['round'])[:12]} ({row['chosen']}), gate {row['gate'] or 'unknown'}")
    before, after = row["parent_measures"], row["candidate_measures"]
    for key, name in (("source", "source mIoU"), ("flip", "mirrored")):
        if before[key] is not None and after[key] is not None:
            parts.append(f"{name} {100 * before[key]:.1f} -> {100 * after[key]:.1f}")
    if row["distance"] is not None:
        parts.append(f"moved {100 * row['distance']:.1f}%")
    return ", ".join(parts)


def _show_onnx(r: Report) -> list[str]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in r["opsets"].items())
    lines = [
        f"onnx {r['path']}",
        f"  graph       {r['nodes']} nodes, {r['parameters']:,} parameters, {r['precision']}",
        f"  size        {r['bytes']:,} bytes",
        f"  opset       {opsets}; IR {r['ir_version']}; by {r['producer'] or '-'}",
    ]
    for side in ("inputs", "outputs"):
        for value in r[side]:
            lines.append(f"  {side[:-1]:<10}  {value['name']}: {value['type']} {value['shape']}")
    if r["external"]:
        lines.append(f"  external    {len(r['external'])} tensors in other files, first {r['external'][0]!r}")
    lines.append("  operators   " + ", ".join(f"{op} {n}" for op, n in r["operators"].items()))
    lines.append(f"  refit       {'by name' if r['refittable'] else 'no: build again'}")
    errors, warnings = r["tensorrt"]["errors"], r["tensorrt"]["warnings"]
    verdict = "its parser refuses:" if errors else "nothing in it that its parser is known to refuse"
    lines.append(f"  tensorrt    {verdict}")
    lines += [f"    error: {text}" for text in errors] + [f"    warning: {text}" for text in warnings]
    if "profile" in r:
        lines.append(f"  profile     {r['profile']['ms']} ms a run on one thread")
        lines += [f"    {op:<24}{ms:>10.3f} ms" for op, ms in r["profile"]["operators_ms"].items()]
    return lines


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m export.inspect",
        description="Show what is in a model pack, an engine version or any ONNX file: shapes, types, sizes, "
        "hashes, operators, the parity report, whether it can be refitted, and what of it TensorRT's parser "
        "is known to refuse.",
        epilog="""examples:
  python -m export.inspect packs/city
  python -m export.inspect repo/road/3 --lineage
  python -m export.inspect somebody.onnx --profile --json

exit codes: 0 read and intact, 1 unreadable or damaged (one line on stderr says why), 2 wrong usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("path", metavar="PACK|VERSION_DIR|FILE.onnx")
    result.add_argument(
        "--lineage", action="store_true", help="where a version's weights come from, and its history"
    )
    timed = "run it and show the time of each operator, and of each layer of a TensorRT plan (a plan is code)"
    result.add_argument("--profile", action="store_true", help=timed)
    given = "with --profile: run it on these arrays, one for each input, as numpy.savez writes them"
    result.add_argument("--inputs", type=Path, metavar="FILE.npz", help=given)
    result.add_argument("--json", action="store_true", help="print one JSON object")
    return result


def main(argv: list[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(argv)
    if args.inputs and not args.profile:
        command.error("--inputs is for --profile; nothing else is run")
    return run_command(lambda: _run(args), (ExportError,))


def _run(args: argparse.Namespace) -> int:
    report = inspect(args.path, lineage=args.lineage, profile=args.profile, inputs=args.inputs)
    print(json.dumps(report) if args.json else show(report))
    if report["kind"] == "version" and not report["intact"]:
        raise ExportError(f"{report['path']}: {report['damage']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
