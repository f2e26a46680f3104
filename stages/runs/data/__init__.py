"""Reads and tokenizes what `--data` and `--validation` name: texts, or conversations."""
