"""Writing a model in the formats of others."""
