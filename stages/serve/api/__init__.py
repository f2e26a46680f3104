"""The HTTP API: the routes of several dialects between guard and engine, all by one way.

The path of one chat request, from the socket to the compiled program and back:

1. server.HttpProtocol          bytes -> ASGI (uvicorn and h11; ours are the time limits)
2. guard.Guard                  Host, Origin, key -> namespace; an id, and a line in the log; an error -> its reply
3. app.Api                      path and method -> Route; a Call reads bytes as its type, ChatRequest; a place is reserved
4. create_chat_completion       ChatRequest -> Prompts, and a ChatWriter; below it:
5. tokenizer_pool.TokenizerPool messages -> token ids, in a worker thread
6. generation.generate          Prompts and options of sampling -> Requests with SamplingParams
7. EngineThread.submit          Request -> the engine thread
8. inference.engine.Engine.step Sequence, scheduled in a Decode -> compiled programs -> SampledTokens -> Event
9. generation.Generation        Event -> CompletionText (stop strings) -> Piece, on the event loop
10. generation.Writer          Piece -> ChatWriter -> ChatReply, or ChatChunk -> bytes

A dialect is one file: the type of its body, the types of its replies, its writer, and a handler as in 4. All else is shared.
State is in four: Generation, Choice, CompletionText, ChatWriter.
"""
