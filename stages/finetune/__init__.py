"""Fine-tune a model."""
