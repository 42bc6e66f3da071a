"""The main job end to end on rendered streets: ``python -m bench.demo`` (docs/demo.md)."""
