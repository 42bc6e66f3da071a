"""An adapter that says what a test wants."""

from __future__ import annotations

import os
import queue
import threading

from runtime.client import Client, Rejected, RpcError
from tests.waits import PATIENCE


class Adapter:
    """An adapter that answers every command by `says` = (accepted, reason); None: not at all."""

    def __init__(self, target, model="road", name="garage", says=(True, ""), **first):
        self.client = Client(target)
        self.says = says
        self.got = []
        self._out = queue.Queue()
        self.report(model=model, name=name, pid=os.getpid(), **first)
        self.stream = self.client.adapter(iter(self._out.get, None))
        self.error = None
        self.welcome = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            for command in self.stream:
                if "welcome" in command:
                    self.welcome.set()
                    continue
                self.got.append(command)
                if self.says is not None:
                    accepted, reason = self.says
                    self.report(result={"id": command["id"], "accepted": accepted, "reason": reason})
        except (Rejected, RpcError) as error:
            self.error = error

    def report(self, **parts):
        self._out.put(parts)

    def close(self):
        self._out.put(None)
        self._thread.join(0.5)
        self.stream.close()
        self.client.close()

    def __enter__(self):
        assert self.welcome.wait(PATIENCE), self.error
        return self

    def __exit__(self, *_):
        self.close()
