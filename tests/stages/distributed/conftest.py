"""Several processes for the tests of this folder."""

from tests.stages.distributed.many_processes import start  # noqa: F401
