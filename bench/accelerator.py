"""Moved: `python -m bench --checks` holds the device against the processor, `python -m bench` measures it."""

import sys

if __name__ == "__main__":
    sys.exit(f"error: {__doc__}")
