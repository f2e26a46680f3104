"""The command line, without jax: commands, flags, console, signals."""
