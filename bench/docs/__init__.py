"""What READMEs hold, made by commands: trees, tables, pictures, and what commands print. Only a checkout needs it."""
