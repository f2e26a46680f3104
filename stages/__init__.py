"""The commands, a file or a package each.

`python -m stages` lists them. A command parses flags, wires the engine, loops and prints.
"""
