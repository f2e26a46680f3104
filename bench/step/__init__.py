"""A training step: full, fine-tuning, on a mesh, beside a write; and the experiments on the default run."""
