"""The HTTP API: the routes of several dialects between guard and engine, all by one way.

The path of one chat request, from the socket to the compiled program and back:

1. server.HttpProtocol          bytes -> ASGI (uvicorn and h11; ours are the time limits)
2. guard.Guard                  Host, Origin, key -> namespace; a line in the log; an error -> its reply
3. app.Api                      path and method -> Route; an ApiCall reads a ChatRequest; its place is held
4. create_chat_completion       ChatRequest.job -> a Job, which holds a ChatPrompt; and a ChatWriter
5. generation.run               Job, Writer -> a Generation of Choices, by way of 6 and 7
6. tokenizer_pool.TokenizerPool ChatPrompt -> PromptTokens, in a worker thread
7. jobs.make_requests           Job and PromptTokens -> Requests with SamplingParams
8. generation.Generation        the response: submits the Requests to the EngineThread
9. inference.engine.Engine.step Sequence, scheduled in a Decode -> compiled programs -> SampledTokens -> Event
10. generation.Generation       Event -> CompletionText (stop strings) -> Piece, on the event loop
11. writer.Writer               Piece -> ChatWriter -> ChatReply, or ChatChunk -> bytes

A dialect is one file and its rows in `routes.ROUTES`: the type of its body, with a `job`; the types of
its replies; its writer; and a handler as in 4. All else is shared. What changes while a request is
answered: Generation, its Choices with their CompletionText and CallParser, the Writer; and in the
engine the Sequence.
"""
