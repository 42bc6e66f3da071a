"""What `runtime.ctl` shows to a person: tables and lines made of the client's plain values."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from runtime.client import Event

WIDE = 200  # columns where nobody's terminal says how many: a pipe wraps nothing


def show(table: Table) -> None:
    # No markup: brackets in a reason are brackets.
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDE).print(table)


def table(*columns: str) -> Table:
    """Columns whose name ends with ">" are aligned to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.endswith(">")
        made.add_column(column.rstrip(">"), justify="right" if right else "left", overflow="fold")
    return made


def pruned(values: dict[str, list[int]]) -> None:
    for what, numbers in values.items():
        print(f"{what}: {', '.join(map(str, numbers)) or 'none'}")


def status(values: dict[str, Any]) -> None:
    models = values["models"]
    counts = ("accepted>", "answered>", "rejected", "in flight>")
    made = table("model", "live>", "previous>", "candidate", "flags", *counts)
    for name, m in models.items():
        flags = [flag for flag in ("pinned", "frozen", "watching") if m[flag]]
        if m["frozen_reason"]:
            flags[flags.index("frozen")] = f"frozen: {m['frozen_reason']}"
        flags += [] if m["ready"] else [f"NOT READY: {m['reason']}"]
        account = m["account"]
        rejected = ", ".join(f"{k} {n}" for k, n in sorted(account["rejected"].items())) or "0"
        candidate = f"{m['candidate']} {m['candidate_state']}" if m["candidate"] else "-"
        made.add_row(
            name,
            str(m["live"] or "-"),
            str(m["previous"] or "-"),
            candidate,
            ", ".join(flags) or "-",
            str(account["accepted"]),
            str(account["answered"]),
            rejected,
            str(account["in_flight"]),
        )
    show(made)
    if models:
        made = table("model", "drift", "since", "adapter", "phase", "frames")
        for name, m in models.items():
            connected = bool(m["adapter"])
            made.add_row(
                name,
                m["drift"] or "not watched",
                ago(m["drift_since"]),
                m["adapter"] or "-",
                f"{m['phase'] or '?'} {m['progress']:.0%}" if connected else "-",
                ("kept" if m["collection"] else "not kept") if connected else "-",
            )
        show(made)
    groups(values["groups"], quiet=True)
    state = "draining" if values["draining"] else "serving"
    print(f"{values['server']} {values['version']}, {state}, up {span(values['uptime_seconds'])}")


def versions(values: list[dict[str, Any]]) -> None:
    made = table("version>", "state", "created", "pack", "parent", "round", "reason")
    for v in values:
        made.add_row(
            str(v["version"]),
            v["state"] or "-",
            v["created"],
            v["pack"][:12],
            v["parent"][:12],
            v["round"],
            v["reason"],
        )
    show(made)


def groups(values: dict[str, dict[str, Any]], *, quiet: bool = False) -> None:
    if not values:
        if not quiet:
            print("no frame groups; [groups] in the server's configuration makes one")
        return
    made = table("group", "generation>", "previous>", "members", "candidate", "flags")
    for name, g in values.items():
        flags = ["watching"] if g["watching"] else []
        flags += [] if g["ready"] else [f"NOT READY: {g['reason']}"]
        made.add_row(
            name,
            str(g["generation"] or "-"),
            str(g["previous"] or "-"),
            ", ".join(f"{member['model']} {member['live'] or '-'}" for member in g["members"]),
            f"{g['candidate']}: {g['candidate_state']}" if g["candidate"] else "-",
            ", ".join(flags) or "-",
        )
    show(made)


def drift(values: dict[str, Any]) -> None:
    if not values["state"]:
        print(f"{values['model']}: not watched: {values['reason']}")
        return
    against = "the pack's reference" if values["reference"] else "its own first frames"
    print(
        f"{values['model']} version {values['version']}: {values['state']} for {ago(values['since'], '')} "
        f"({values['reason']}), compared with {against}"
    )
    lost = ", ".join(f"{values[key]} {key}" for key in ("dropped", "ignored", "failed") if values[key])
    print(
        f"{values['frames']} answers looked at, {values['alarms']} alarms; by chance one a source in "
        f"{values['false_alarm_hours']:g} h" + (f"; {lost}" if lost else "")
    )
    made = table("source", "state", "since", "signal", "now>", "usual>", "±>", "statistic>", "alarm at>", "")
    for source in values["sources"]:
        head = [source["source"] or "(unnamed)", source["state"], ago(source["since"])]
        for signal in source["signals"]:
            made.add_row(
                *head,
                signal["name"],
                f"{signal['value']:.3f}",
                f"{signal['reference']:.3f}",
                f"{signal['deviation']:.3f}",
                f"{signal['statistic']:.2f}",
                f"{signal['threshold']:.2f}",
                "ALARM" if signal["alarmed"] else "",
            )
            head = ["", "", ""]
        if head[0]:
            made.add_row(*head, *[""] * 7)
    if values["sources"]:
        show(made)


def adaptation(values: dict[str, Any]) -> None:
    if not values["adapters"]:
        print(f"{values['model']}: no adapter is connected")
        if "last" in values:
            last = values["last"]
            gone = ago(last["disconnected"])
            print(f"the last was '{last['name']}' (process {last['pid']}), gone {gone}: {last['reason']}")
            _report(last.get("report", {}))
    commanded = "command" in values
    for adapter in values["adapters"]:
        print(
            f"{values['model']}: adapter '{adapter['name']}' (process {adapter['pid']}), connected "
            f"{ago(adapter['connected'])}, last heard {ago(adapter['reported'])}"
        )
        if adapter["commands_waiting"]:
            print(f"  commands it has not answered: {adapter['commands_waiting']}")
        _report(adapter.get("report", {}), brief=commanded)
    if commanded:
        waiting = "the adapter has not answered yet; it does so when it comes to it"
        print(waiting if values["waiting"] else "the adapter has taken it" + _because(values["command"]))


def _because(command: dict[str, Any]) -> str:
    return f": {command['reason']}" if command["reason"] else ""


def _report(report: dict[str, Any], *, brief: bool = False) -> None:
    if not report:
        return
    print(f"  phase       {progress(report)}")
    kept = report.get("collection")
    if kept:
        limit = f" of {size(kept['limit_bytes'])}" if kept["limit_bytes"] else ""
        refused = ", ".join(f"{rule} {n}" for rule, n in sorted(kept["refused"].items()))
        frames = f"{kept['kept']} frames in {size(kept['bytes'])}{limit}, {kept['dropped']} dropped"
        state = "on" if kept["on"] else "OFF"
        print(f"  collection  {state}, {frames}" + (f" ({refused})" if refused else ""))
    if brief:
        return
    budget = report.get("budget")
    if budget:
        limit = f" of {budget['seconds_limit']:.0f}" if budget["seconds_limit"] else ""
        paused = f", paused: {budget['paused']}" if budget["paused"] else ""
        print(f"  budget      {budget['seconds']:.0f}{limit} s{paused}")
    last = report.get("last")
    if last:
        version = f" version {last['version']}" if last["version"] else ""
        why = f": {last['reason']}" if last["reason"] else ""
        print(f"  last round  {last['round']} {last['state']}{version}, {ago(last['finished'])}{why}")
    health = report.get("pseudo_labels")
    if health:
        print(f"  labels      {health['labelled']:.1%} of the pixels of {health['frames']} frames")
        made = table("class", "predicted>", "labelled>", "from confidence>")
        for each in health["classes"]:
            made.add_row(
                each["name"],
                f"{each['predicted']:.1%}",
                f"{each['labelled']:.1%}",
                f"{each['threshold']:.3f}",
            )
        if health["classes"]:
            show(made)


def progress(report: dict[str, Any]) -> str:
    """One line: what an adapter is doing."""
    line = f"{report['phase'] or '?'} {report['progress']:.0%}"
    part = report.get("round")
    if part:
        steps = f" {part['step']}/{part['of']}" if part["of"] else f" {part['step']}" if part["step"] else ""
        loss = f", loss {part['loss']:.4f}" if "loss" in part else ""
        left = f", {span(part['seconds_left'])} left" if part["seconds_left"] else ""
        why = f" ({part['trigger']})" if part["trigger"] else ""
        line += f", round {part['round']}{why}: {part['stage']}{steps}{loss}{left}"
    return line + (f", {report['note']}" if report["note"] else "")


def event(each: Event, *, dated: bool = False) -> str:
    text = f"{each.model} {each.version or '-':>4}  {each.state}"
    if dated:
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(each.time))}  {text}"
    if each.check:
        text += f" ({each.check})"
    return text + (f"  {each.reason}" if each.reason else "")


def ago(when: float, tail: str = " ago") -> str:
    return f"{span(max(0.0, time.time() - when))}{tail}" if when else "-"


def span(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
