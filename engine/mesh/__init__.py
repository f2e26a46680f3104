"""A mesh of devices, and the processes that share one. All of it works without a mesh and in one process."""
