"""Storage: models, adapters, checkpoints and named assets on disk, and the finder from a name or path to a model."""
