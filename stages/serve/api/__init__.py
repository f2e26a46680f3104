"""The HTTP API: OpenAI's routes between the guard and the engine."""
