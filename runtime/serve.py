"""``python -m runtime.serve``: serve a repository over gRPC until told to stop."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# Read once, when gRPC is imported: its core has lines of its own for a port that is taken; ours says it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from runtime import config as configuration
from runtime.errors import ConfigError
from runtime.observability import logs
from runtime.process import allocator
from runtime.server import Server

_EPILOG = """\
examples:
  python -m runtime.serve --repository engines
  python -m runtime.serve --repository engines --port 0 --metrics-port 0 --config server.toml

signals:
  HUP         read the configuration file again: [guard], [shadow], [watch], [swap], [drift],
              keep_versions, the tokens and the certificates of [security] take effect at once
  TERM, INT   drain: health says NOT_SERVING, new requests are refused with UNAVAILABLE, what is in flight
  finishes

configuration:
  one TOML table per section ([engine], [queue], [guard], [shadow], [watch], [swap], [tap],
  [drift], [tracing], [groups], [security], [shared_memory]);
  the options of the command line win over the file.  Every key with its default: docs/serving.md

exit codes:
  0 stopped by a signal and drained, 1 could not start or did not drain in time, 2 usage
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m runtime.serve",
        description="Serve the models of an engine repository over KServe v2 gRPC, with the guarded swap. "
        "Prints 'ready grpc=HOST:PORT metrics=HOST:PORT' on standard error when it answers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--repository", metavar="DIR", help="engine repository (docs/architecture.md has its layout)"
    )
    p.add_argument(
        "--host", help="name or address (IPv4, IPv6) to listen on, or unix:PATH (default 127.0.0.1)"
    )
    p.add_argument("--port", type=int, help="gRPC port; 0 = any free one (default 8001)")
    p.add_argument(
        "--metrics-port", type=int, help="Prometheus port; 0 = any free one, -1 = none (default 8002)"
    )
    p.add_argument("--config", metavar="FILE.toml", help="settings")
    p.add_argument(
        "--read-only",
        action="store_true",
        default=None,
        help="serve what is live and change nothing: beside the one server that has the repository",
    )
    p.add_argument(
        "--allow-client-shm",
        choices=("auto", "on", "off"),
        help="whether clients may register shared memory, of the system and of CUDA (shared_memory.allow); "
        "auto = where only this machine can connect (default auto)",
    )
    p.add_argument(
        "--log",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="log level (default info)",
    )
    p.add_argument(
        "--log-format",
        default="text",
        choices=logs.FORMATS,
        help="text, or json: one object a line, with model, version, state, check of swaps (default text)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    logs.configure(options.log, options.log_format)
    keys = ("repository", "host", "port", "metrics_port", "read_only")
    overrides = {key: getattr(options, key) for key in keys}
    try:
        config = _settings(options, overrides)
        if not config.repository:
            p.error("--repository is needed (or 'repository' in the configuration file)")
        _check_repository(Path(config.repository))
        allocator.tune_allocator()
        _allow_descriptors()
        server = Server(config)
        stop = threading.Event()
        wake = threading.Semaphore(0)

        def end(*_: object) -> None:
            stop.set()
            wake.release()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        signal.signal(signal.SIGHUP, lambda *_: wake.release())
        server.start()
    except ConfigError as error:
        print(f"runtime.serve: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or config.repository
        print(
            f"runtime.serve: {str(where)!r} cannot be used: {error.strerror or error}; "
            "check the path and its permissions",
            file=sys.stderr,
        )
        return 1
    if not server.service.models.hosts() and not config.models:
        logging.warning(
            "repository '%s' holds no version yet; publish one with export.build", config.repository
        )
    print(f"ready grpc={server.target} metrics={server.metrics_target}", file=sys.stderr, flush=True)
    for status in server.service.admin.status():
        what = f"version {status.live} is live" if status.ready else f"NOT READY: {status.reason}"
        logging.info("%s: %s", status.model, what)
    while True:
        wake.acquire()
        if stop.is_set():
            break
        _read_again(server, options, overrides)
    logging.info("draining")
    _end_for_sure(server.config.drain + STOPPING)
    return 0 if server.stop() else 1


STOPPING = 60.0  # seconds after `drain` in which the server has stopped, or the process ends all the same


def _end_for_sure(seconds: float) -> None:
    """Ends the process after `seconds` although a thread inside a library does not let go of the server."""

    def end() -> None:
        logging.error("the server has not stopped within %.0f s: the process ends now", seconds)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def run() -> NoReturn:
    """The command: `main`, and then the end of the process without Python's finalisation.

    Everything is stopped by then.  Threads of gRPC and of the engine library may still be inside C++ code.
    Python's finalisation would end them there, which aborts the process or leaves a lock held for ever.
    """
    try:
        code: int | str | None = main()
    except SystemExit as error:
        code = error.code
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))  # sys.exit("text") is 1


_DESCRIPTORS = 16384  # shared-memory regions alone may take 2048; 1024 is what a shell gives


def _allow_descriptors() -> None:
    """As many open files as this needs, where the system's hard limit allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_repository(path: Path) -> None:
    """Raises ConfigError: a server on a mistyped path would answer nothing and look well."""
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise ConfigError(f"repository {str(path)!r} {what}; make one with python -m export.build")


def _settings(options: argparse.Namespace, overrides: dict[str, Any]) -> configuration.ServerConfig:
    """The configuration file, where there is one, with the options that win over it.  Raises ConfigError."""
    if options.config:
        config = configuration.load(options.config, **overrides)
    else:
        given = {key: value for key, value in overrides.items() if value is not None}
        config = dataclasses.replace(configuration.ServerConfig(), **given)
    if options.allow_client_shm is None:
        return config
    memory = dataclasses.replace(config.shared_memory, allow=options.allow_client_shm)
    return dataclasses.replace(config, shared_memory=memory)


def _read_again(server: Server, options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """SIGHUP.  A file that is wrong changes nothing."""
    if not options.config:
        logging.warning("HUP: there is no configuration file to read again (--config)")
        return
    try:
        needs_start = server.configure(_settings(options, overrides))
    except ConfigError as error:
        logging.error("HUP: %s; nothing was changed", error)
        return
    logging.info("HUP: configuration read again")
    if needs_start:
        logging.warning("HUP: these changes need a new start: %s", ", ".join(needs_start))


if __name__ == "__main__":
    run()
