"""A training step: full, fine-tuning, beside a write; and the experiments on the default run."""
