"""The server: the routes of several APIs on an event loop, and a thread behind it that steps the engine."""
