"""Trained pack to engine version: graph, static check, parity report, publication.

May import `networks` and `runtime`; knows nothing of adaptation.  Importing `export` costs nothing.
"""

from common.launch import watch

watch()
