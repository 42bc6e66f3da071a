"""Messages as plain values, for messages whose content is only carried, kept and shown."""

from __future__ import annotations

import math
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message


def message_to_dict(
    message: Message, *, whole: bool = False, text: int | None = None, items: int | None = None
) -> dict[str, Any]:
    """Returns {field: value}, nested; only set fields unless `whole`.  `Message(**result)` is the inverse.

    With the bounds `text` and `items`, for what comes from outside: texts are cut and freed of control
    characters (they end up on terminals), lists and maps are cut, numbers that are not finite are left out.
    """
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields if whole else [field for field, _ in message.ListFields()]:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values[field.name] = {_one(key, text): value[key] for key in sorted(value)[:items]}
        elif hasattr(value, "extend"):  # protobuf 6.30 has no is_repeated, later ones deprecate what it has
            values[field.name] = [
                message_to_dict(one, whole=whole, text=text, items=items)
                if isinstance(one, Message)
                else _one(one, text)
                for one in value[:items]
            ]
        elif field.message_type is not None:
            if message.HasField(field.name):
                values[field.name] = message_to_dict(value, whole=whole, text=text, items=items)
        elif field.has_presence and not message.HasField(field.name):
            continue
        elif text is None or not isinstance(value, float) or math.isfinite(value):
            values[field.name] = _one(value, text) if field.type == Field.TYPE_STRING else value
    return values


def _one(value: Any, limit: int | None) -> Any:
    return clean(value, limit) if limit is not None and isinstance(value, str) else value


def clean(text: str, limit: int | None = None) -> str:
    """One line that a terminal can show."""
    return "".join(c if c.isprintable() else " " for c in text[:limit])
