"""Throughput and latency of the server."""
