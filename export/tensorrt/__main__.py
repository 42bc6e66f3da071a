"""The command `python -m export.tensorrt`."""

from export.tensorrt.builder import main

if __name__ == "__main__":
    raise SystemExit(main())
