"""Several processes for the tests of this folder."""

from many_processes import start  # noqa: F401
