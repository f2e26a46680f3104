"""The stage table: its rows, its claims, its terminal output."""
