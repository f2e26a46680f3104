"""Watching a run: what is recorded of it while it trains."""
