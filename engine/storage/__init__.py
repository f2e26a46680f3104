"""What lies on disk: checkpoints, digests of weights, named assets."""
