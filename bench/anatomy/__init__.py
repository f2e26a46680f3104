"""Shows what a step holds and does over time: memory, residuals, operations, and which weights move."""
