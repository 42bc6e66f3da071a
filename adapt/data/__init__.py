"""Frames with labels: the procedural renderer and readers of real sets (``base`` has the protocol)."""
