"""The server: one thread that alone steps the engine, one event loop that never waits for it, and OpenAI's routes between."""
