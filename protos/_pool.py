"""A private descriptor pool for the generated stubs.

tritonclient, kserve and mlserver each register the package ``inference`` in protobuf's
default pool, with files of other names; a second registration of the same symbols there
is an error.  Ours therefore never enters the default pool, and any of them can be
imported beside us in one process.
"""

from __future__ import annotations

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
