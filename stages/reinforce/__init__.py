"""Learn from rewards."""
