"""Serving first: the throttle against a played server, the process's own priorities, the line to the
server.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from adapt.loop.process_priority import Starvation, run_and_wait
from adapt.loop.server_channel import Remote
from adapt.loop.throttle import Throttle, ThrottleConfig
from tests.waits import PATIENCE, until


class Served:
    """A server whose answers take `alone` seconds, and `beside` while somebody works; 50 a second."""

    def __init__(self, alone: float, beside: float) -> None:
        self.alone, self.beside, self.now, self.working = alone, beside, 0.0, True
        self.count, self.seconds = 0.0, 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.count += 50 * seconds
        self.seconds += 50 * seconds * (self.beside if self.working else self.alone)

    def sleep(self, seconds: float) -> None:
        self.working = False
        self.pass_(seconds)
        self.working = True

    def counters(self) -> tuple[int, float]:
        return int(self.count), self.seconds


def work(served: Served, pieces: int, config: ThrottleConfig | None = None) -> Throttle:
    throttle = Throttle(
        served.counters, config or ThrottleConfig(), clock=lambda: served.now, sleep=served.sleep
    )
    for _ in range(pieces):
        served.pass_(0.5)
        throttle()
    return throttle


def test_a_server_that_suffers_gets_pauses_but_work_goes_on():
    served = Served(0.010, 0.020)
    throttle = work(served, 400)
    assert throttle.share == pytest.approx(0.1, abs=0.01)
    assert throttle.ratio == pytest.approx(2.0, abs=0.2)
    assert throttle.slept <= 0.92 * served.now, "the least share is kept"


def test_a_server_that_does_not_mind_costs_a_look_now_and_then():
    served = Served(0.010, 0.0105)
    throttle = work(served, 400)
    assert throttle.share == 1.0
    assert throttle.slept < 0.12 * served.now


def test_it_works_more_again_when_the_server_has_recovered():
    served = Served(0.010, 0.020)
    throttle = Throttle(served.counters, clock=lambda: served.now, sleep=served.sleep)
    for i in range(900):
        served.beside = 0.020 if i < 200 else 0.010
        served.pass_(0.5)
        throttle()
    assert throttle.share == 1.0


def test_without_requests_or_without_a_server_nothing_is_known():
    served = Served(0.0, 0.0)
    served.pass_ = lambda seconds: setattr(served, "now", served.now + seconds)  # type: ignore[method-assign]
    assert work(served, 100).share == 1.0

    def away():
        raise ConnectionError

    throttle = Throttle(away, clock=lambda: served.now, sleep=served.sleep)
    throttle()
    assert throttle.share == 1.0
    restarted = Served(0.010, 0.020)
    throttle = Throttle(restarted.counters, clock=lambda: restarted.now, sleep=restarted.sleep)
    restarted.pass_(5)
    throttle()
    restarted.count = restarted.seconds = 0.0
    restarted.pass_(0.5)
    throttle()
    assert throttle.share == 1.0


@pytest.mark.parametrize("wrong", [{"slow": 1.0}, {"least": 0.0}, {"requests": 0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        ThrottleConfig(**wrong)


CHILD = """
import json, os, sys
from adapt.politeness import be_polite
said = be_polite(nice=12, idle=True, cores=[min(os.sched_getaffinity(0))])
print(json.dumps([said, os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0),
sorted(os.sched_getaffinity(0))]))
try:
    be_polite(nice=0, cores=[9999])
except ValueError as error:
    print(error)
"""


def test_a_polite_process_is_what_it_says():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    said, nice, scheduler, cores = json.loads(lines[0])
    if not said["nice"].startswith("refused"):
        assert nice == 12
    if not said["scheduling"].startswith("refused"):
        assert scheduler == 5  # SCHED_IDLE
    assert len(cores) == 1
    assert "choose of those" in lines[1]


# ------------------------------------------------------------------------------------------- the line
def test_a_line_to_a_real_server_reports_obeys_and_comes_back(tmp_path, monkeypatch):
    from runtime.client import Client, Rejected
    from runtime.config import EngineConfig, ServerConfig
    from runtime.repository.repository import Repository
    from runtime.rpc import adaptation
    from runtime.server import Server
    from tests.runtime import builders

    monkeypatch.setattr(adaptation, "ANSWER", PATIENCE)
    home = Repository(tmp_path / "engines")
    builders.publish(home)
    config = ServerConfig(repository=str(home.path), port=0, metrics_port=0, engine=EngineConfig(threads=1))
    server = Server(config).start()
    port = int(server.target.rsplit(":", 1)[1])
    ours, theirs = Client(server.target), Client(server.target)
    line = Remote(ours, "road", "car-7", interval=0.05)
    try:
        line.report(phase="collect", progress=0.5, collection={"on": True, "kept": 3})
        until(lambda: theirs.adaptation("road")["adapters"])
        until(lambda: theirs.adaptation("road")["adapters"][0]["report"].get("phase") == "collect")
        said = theirs.adaptation("road")["adapters"][0]
        assert (said["name"], said["report"]["collection"]["kept"]) == ("car-7", 3)

        import threading

        answers: list = []
        asked = threading.Thread(target=lambda: answers.append(theirs.start_round("road", "why not")))
        asked.start()
        commands: list = []
        until(lambda: commands.extend(line.poll()) or commands)
        assert (commands[0].kind, commands[0].values["reason"]) == ("start_round", "why not")
        line.answer(commands[0], True)
        asked.join(PATIENCE)
        assert answers[0]["command"]["accepted"] is True
        refusals: list = []

        def cancel() -> None:
            try:
                theirs.cancel_round("road")
            except Rejected as error:
                refusals.append(error.reason)

        asked = threading.Thread(target=cancel)
        asked.start()
        until(lambda: commands.extend(line.poll()) or len(commands) > 1)
        line.answer(commands[1], False, "nothing runs")
        asked.join(PATIENCE)
        assert "nothing runs" in refusals[0]
        server.stop()
        line.report(phase="paused", note="while it was away")
        server = Server(ServerConfig(**{**vars(config), "port": port})).start()
        again = Client(server.target)
        until(lambda: again.adaptation("road")["adapters"])
        until(lambda: again.adaptation("road")["adapters"][0]["report"].get("phase") == "paused")
        again.close()
    finally:
        line.close()
        ours.close()
        theirs.close()
        server.stop()


def test_work_that_hardly_gets_the_processor_is_said_with_its_remedy():
    told = iter([(0.0, 0.0), (10.0, 80.0), (12.0, 100.0), (13.0, 120.0), (113.0, 121.0), (114.0, 300.0)])
    watch = Starvation(least=0.2, after=100.0, stat=lambda: next(told))
    assert watch() == "", "90 seconds are too few to judge"
    assert watch().startswith("work gets 11% of a core: other programs take the processor")
    assert watch() == "", "said once, not after every step"
    assert watch() == "", "100 of 102 seconds"
    assert "--priority nice" in watch()
    assert Starvation(stat=lambda: None)() == "", "a system that does not say"


def test_the_kernel_counts_what_ran_and_what_waited():
    before = run_and_wait()
    if before is None:
        pytest.skip("this system does not count what ran and what waited")
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    assert run_and_wait()[0] - before[0] >= 0.04
