"""Models, adapters, checkpoints and named assets on disk; model_loader.py loads a model by name or path.

Every reader raises UserError, in a sentence, for a file that is missing, damaged, or holds what is
not understood here.
"""
