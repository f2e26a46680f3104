"""The HTTP API: OpenAI's routes between guard and engine.

The path of one chat request, from the socket to the compiled program and back:

1. server.HttpProtocol          bytes -> ASGI (uvicorn and h11; ours are the time limits)
2. guard.Guard                  Host, Origin, key -> namespace; an id, and a line in the log; an error -> its reply
3. app.Api                      path and method -> completions.chat_completions
4. requests.read_body           bytes -> ChatRequest
5. completions.generate         reserves a place, or refuses; below it:
6. tokenizer_pool.TokenizerPool messages -> token ids, in a worker thread
7. EngineThread.submit          Request with SamplingParams -> the engine thread
8. inference.engine.Engine.step   Sequence, scheduled in a Decode -> compiled programs -> SampledTokens -> Event
9. completions.Generation       Event -> CompletionText (stop strings) -> Piece, on the event loop
10. completions.ChatWriter       Piece -> ChatReply, or ChatChunk -> bytes (json_reply, or send_events)

State is in four: Generation, Choice, CompletionText, ChatWriter.
"""
