"""Settings of the server process: thread priority and memory allocator."""
