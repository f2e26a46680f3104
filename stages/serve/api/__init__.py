"""The HTTP API: OpenAI's routes between guard and engine.

The path of one chat request, from the socket to the compiled program and back:

1.  server.HttpProtocol          bytes -> ASGI (uvicorn and h11; ours are the time limits)
2.  access_log.AccessLog         an id, and a line when it has ended
    guard.Guard                  Host, Origin, key -> namespace; starlette finds the route
3.  completions.chat_completions
4.  body.read_body               bytes -> ChatRequest
5.  generation.generate          reserves places; below it:
6.  tokenizer_pool.TokenizerPool messages -> token ids, in a worker thread
7.  EngineThread.submit          Request with SamplingParams -> the engine thread
8.  inference.slots.Slots.step   Sequence, scheduled in a Decode -> compiled programs -> SampledTokens -> Event
9.  EngineThread._deliver        Event -> the event loop
10. generation.Generation.pieces Event -> CompletionText (stop strings) -> Piece
11. completions.ChatWriter       Piece -> ChatReply, or ChatChunk (by generation.Writer)
12. generation.send_events       ChatChunk -> bytes (or errors.json_reply, ChatReply -> bytes)

State is in four: Generation, Choice, CompletionText, ChatWriter.
"""
