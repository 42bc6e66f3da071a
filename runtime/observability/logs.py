"""How the server's log is written: lines for a person, or one JSON object a line for a collector.

A record may bring fields of its own: `log.info("…", extra=fields(model="road", version=4))`.  Knows nothing
of what is logged.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

FORMATS = ("text", "json")
_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure(level: str, style: str) -> None:
    """The whole process's log, to standard error.  `style`: one of FORMATS."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def fields(**values: Any) -> dict[str, Any]:
    """For `extra`."""
    return {"fields": values}


class JsonLines(logging.Formatter):
    """{"time" (UTC, RFC 3339), "level", "logger", "message", the record's own fields, "exception"}."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
