"""The priorities of a process of our own, and the warning if it hardly runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from adapt.loop.process_priority import CpuStarvationMonitor, run_and_wait

CHILD = """
import json, os, sys
from adapt.loop.process_priority import lower_priority
said = lower_priority(nice=12, idle=True, cores=[min(os.sched_getaffinity(0))])
print(json.dumps([said, os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0),
sorted(os.sched_getaffinity(0))]))
try:
    lower_priority(nice=0, cores=[9999])
except ValueError as error:
    print(error)
"""


def test_the_priority_is_what_the_result_names():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    said, nice, scheduler, cores = json.loads(lines[0])
    if not said["nice"].startswith("refused"):
        assert nice == 12
    if not said["scheduling"].startswith("refused"):
        assert scheduler == 5  # SCHED_IDLE
    assert len(cores) == 1
    assert "choose of those" in lines[1]


def test_work_that_hardly_gets_the_processor_is_said_with_its_remedy():
    told = iter([(0.0, 0.0), (10.0, 80.0), (12.0, 100.0), (13.0, 120.0), (113.0, 121.0), (114.0, 300.0)])
    watch = CpuStarvationMonitor(least=0.2, after=100.0, stat=lambda: next(told))
    assert watch() == "", "90 seconds are too few to judge"
    assert watch().startswith("work gets 11% of a core: other programs take the processor")
    assert watch() == "", "said once, not after every step"
    assert watch() == "", "100 of 102 seconds"
    assert "--priority nice" in watch()
    assert CpuStarvationMonitor(stat=lambda: None)() == "", "a system that does not say"


def test_the_kernel_counts_what_ran_and_what_waited():
    before = run_and_wait()
    if before is None:
        pytest.skip("this system does not count what ran and what waited")
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    assert run_and_wait()[0] - before[0] >= 0.04
