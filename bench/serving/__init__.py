"""Load and latency of the server."""
