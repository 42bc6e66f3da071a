"""The wire: KServe v2 (``inference``) and the control service (``roadworthy.v1``)."""
