"""Shows what a step holds and does over time: memory, residuals and operations."""
