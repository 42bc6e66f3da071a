"""Other servers, started on this machine beside ours, with the same ONNX and the same client.

Each module here starts one of them as a child process and knows nothing of what is measured.
The servers live in virtual environments of their own, because their pins contradict each other;
`bench.peers.environments` finds or makes them.
"""

from __future__ import annotations
