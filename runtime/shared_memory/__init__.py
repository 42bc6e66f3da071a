"""Shared-memory regions of clients, on the host and on a CUDA device."""
