'use strict';
// The server's routes: what is posted, what streams back, and why something was refused.

// The page's own address may hold a name and a key, with which fetch refuses to work; the origin holds none.
const at = (path) => new URL(path, location.origin);
const post = (path, body, signal) => fetch(at(path), {
  method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body), signal,
});

async function reason(reply) {
  const body = await reply.json().catch(() => null);
  const wait = reply.headers.get('Retry-After');
  const message = body?.error?.message ?? `The server answered ${reply.status}.`;
  return wait && !message.includes('Try again') ? `${message} Try again in ${wait} s.` : message;
}

// Yields the JSON of each server-sent event, up to [DONE]; {wait} for a comment, which says what an answer waits for.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let partial = ''; ;) {
    const {done, value} = await reader.read();
    if (done) return;
    const lines = (partial + value).split(/\r?\n/);
    partial = lines.pop();
    for (const line of lines) {
      if (line.startsWith(': ')) yield {wait: line.slice(2)};
      if (!line.startsWith('data:')) continue;
      if (line.slice(5).trim() === '[DONE]') return;
      yield JSON.parse(line.slice(5));
    }
  }
}

// Returns the tokens of a text or a conversation; 0 when the server does not say.
async function countTokens(body, signal) {
  try {
    const reply = await post('/tokenize', {model: server.model, ...body}, signal);
    return reply.ok ? (await reply.json()).count : 0;
  } catch {
    return 0;
  }
}
