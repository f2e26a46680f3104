"""The server: one engine thread that owns the slots, one event loop that never waits for it, and OpenAI's routes between."""
