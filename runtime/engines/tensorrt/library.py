"""TensorRT's Python module, opened safely, and what the runner and the builder both need of it.

Knows which versions we are written for and how the library reports failure: it answers False or None and
says why only to the logger.  Hence one recording logger, and one `check` through which every such answer
goes.  The module itself is imported by `tensorrt()`, after the CUDA probe, and by nothing else.
"""

from __future__ import annotations

import _thread
import importlib
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from runtime.engines.cuda import context

if TYPE_CHECKING:
    import tensorrt as trt

P = ParamSpec("P")
T = TypeVar("T")

OLDEST = (10, 12)  # strongly typed networks with everything we need of them
RTX = "tensorrt-rtx"


class TensorRTError(RuntimeError):
    """TensorRT is absent, too old, or refused something: what, why, and what to do, in one line."""


@dataclass(frozen=True)
class Library:
    """An imported TensorRT.  `name` is "tensorrt", or "tensorrt-rtx" for NVIDIA's RTX sibling."""

    name: str
    module: ModuleType
    version: tuple[int, ...]

    @property
    def text(self) -> str:
        return f"{self.name} {'.'.join(map(str, self.version))}"


def version_of(text: str) -> tuple[int, ...]:
    """ "11.4.0.106" -> (11, 4, 0, 106); a suffix such as ".post1" is dropped."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def library_of(module: ModuleType) -> Library:
    """Which TensorRT a module is.  RTX is told by the module's own name, whatever it was imported as."""
    name = RTX if module.__name__.startswith("tensorrt_rtx") else "tensorrt"
    return Library(name, module, version_of(str(getattr(module, "__version__", "0"))))


def tensorrt() -> Library:
    """The installed TensorRT, once a CUDA device is known to be there.

    Raises TensorRTError: no device, no module, or older than `OLDEST`.
    """
    try:
        context.probe()
    except context.CudaError as error:
        raise TensorRTError(f"TensorRT cannot be used: {error}") from None
    try:
        module = importlib.import_module("tensorrt")
    except ImportError as error:
        raise TensorRTError(
            f"TensorRT's Python module cannot be imported ({error}): pip install tensorrt-cu13, "
            "or use the engine kind 'onnxruntime'"
        ) from None
    library = library_of(module)
    if library.name == "tensorrt" and library.version[:2] < OLDEST:
        raise TensorRTError(
            f"{library.text} is too old: {'.'.join(map(str, OLDEST))} or newer is needed; "
            "pip install --upgrade tensorrt-cu13"
        )
    return library


class Log:
    """What TensorRT said: the last lines, and the errors among them.  Safe from any thread.

    All logs hear everything (see `logger`); a line keeps the thread it was said on, which is how an engine
    tells its own errors from another's.
    """

    def __init__(self, keep: int = 200) -> None:
        self._lines: deque[tuple[str, str, int]] = deque(maxlen=keep)
        self._lock = threading.Lock()

    def add(self, severity: str, message: str) -> None:
        with self._lock:
            self._lines.append((severity, " ".join(message.split()), threading.get_ident()))

    def lines(self, *severities: str, here: bool = False) -> list[str]:
        """Oldest first; `here`: those said on this thread."""
        me = threading.get_ident()
        with self._lock:
            return [
                line
                for severity, line, thread in self._lines
                if (not severities or severity in severities) and (not here or thread == me)
            ]

    def errors(self, *, here: bool = False) -> list[str]:
        return self.lines("ERROR", "INTERNAL_ERROR", here=here)

    def why(self) -> str:
        """The last error of this thread, or of any, or what to say when there was none."""
        errors = self.errors(here=True) or self.errors()
        return errors[-1] if errors else "TensorRT gave no reason"


_loggers: dict[ModuleType, tuple[trt.ILogger, list[weakref.ref[Log]]]] = {}
_loggers_lock = threading.Lock()


def logger(library: Library, log: Log) -> trt.ILogger:
    """THE TensorRT logger of this process, which from now on writes into `log` too, as long as that lives.

    One, and for ever: TensorRT takes the logger of the first builder, runtime or refitter for all that exist
    beside it and ignores theirs, so a logger of one's own would go with the first engine that is swapped out
    while the others still write to it.
    """
    with _loggers_lock:
        if library.module not in _loggers:
            listening: list[weakref.ref[Log]] = []
            _loggers[library.module] = _recording(library, listening), listening
        made, logs = _loggers[library.module]
        # At once, and no set: another thread may be saying something, and an error there ends the process.
        logs[:] = [*(one for one in logs if one() not in (None, log)), weakref.ref(log)]
    return made


def _recording(library: Library, logs: list[weakref.ref[Log]]) -> trt.ILogger:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.module

    class Recording(trt.ILogger):  # type: ignore[misc]  # Any where the stubs are not made
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            # Nothing may be raised into TensorRT, which may end the process for it.
            try:
                if severity <= trt.ILogger.WARNING:  # INFO and VERBOSE are thousands of lines a build
                    for one in tuple(logs):
                        if (log := one()) is not None:
                            log.add(severity.name, msg)
            except KeyboardInterrupt:
                _thread.interrupt_main()  # Ctrl-C: raised again as soon as TensorRT has returned
            except BaseException:
                return  # one line of a log is lost; there is no other place to report it

    return Recording()


def construct(
    make: Callable[P, T], what: str, remedy: str, log: Log, *arguments: P.args, **named: P.kwargs
) -> T:
    """A TensorRT object, `make(*arguments)`.  If its factory gives nothing, the binding raises TypeError.

    Raises TensorRTError.
    """
    try:
        return make(*arguments, **named)
    except TypeError as error:
        raise TensorRTError(f"{what} ({error}): {log.why()}; {remedy}") from error


def open_runtime(library: Library, log: Log, *, host_code: bool) -> trt.Runtime:
    """A Runtime that may be used; `log` is one that is new.  Raises TensorRTError."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.module
    remedy = "check the driver with `nvidia-smi`"
    runtime: trt.Runtime = construct(trt.Runtime, "no runtime", remedy, log, logger(library, log))
    if errors := log.errors(here=True):
        # A Runtime that logged an error looks alive and kills the process at its next call.
        raise TensorRTError(f"{library.text} cannot start: {errors[0]}; {remedy}")
    runtime.engine_host_code_allowed = host_code
    return runtime


#: What pybind11 makes of a C++ exception, or of an argument that it does not take.
BINDING_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, MemoryError)


def ask(
    call: Callable[P, T | Literal[False] | None],
    what: str,
    remedy: str,
    log: Log,
    *arguments: P.args,
    **named: P.kwargs,
) -> T:
    """`check(call(*arguments), …)` for a call that may also raise: bindings differ in which way they refuse.

    Raises TensorRTError.  Give a method and its arguments, no lambda: an error's traceback would hold what a
    lambda encloses, and TensorRT's objects must die on their own thread.
    """
    try:
        answer = call(*arguments, **named)
    except TensorRTError:
        raise
    except BINDING_ERRORS as error:
        said = log.errors(here=True)
        reason = " ".join(str(error).split()) + (f" ({said[-1]})" if said else "")
        raise TensorRTError(f"{what}: {reason}; {remedy}") from error
    return check(answer, what, remedy, log)


def check(answer: T | Literal[False] | None, what: str, remedy: str, log: Log) -> T:
    """`answer`, unless it is TensorRT's way of saying no (False, None, or an index of -1).

    Raises TensorRTError: what failed, TensorRT's own reason, and what to do next.
    """
    index = answer if type(answer) is int else 0
    if answer is None or answer is False or index < 0:
        raise TensorRTError(f"{what}: {log.why()}; {remedy}")
    return answer
