"""Checks of an engine's answers: what each task's outputs must look like, and how two answers differ."""
