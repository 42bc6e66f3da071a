"""Adaptation: from the frames of a vehicle's road to a judged model pack.

May import `networks`, `export` and `runtime`.  Importing `adapt` costs nothing.
"""

from common.launch import watch

watch()
