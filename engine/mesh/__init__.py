"""A mesh of devices and the processes that share it: its shape, which axis cuts what, arrays laid out over it."""
