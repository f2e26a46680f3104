'use strict';
// The server's routes: what is posted, what streams back, and why something was refused.

// The page lies at the root of the server, which a proxy may show below a path. Its own address may hold a name and a key,
// with which fetch refuses to work; the origin holds none.
const root = location.origin + location.pathname.replace(/\/$/, '');
let key = null;  // of the server, if it needs one
// Returns whether a text can be sent as a key: else the server refuses all that comes with it, before it looks at the key.
const isKey = (text) => text.length < 4096 && !/\p{Cc}/u.test(text);
const get = async (path, how = {}) => {
  // A header holds bytes: those of the key in UTF-8, which the server compares.
  const bytes = new TextEncoder().encode(key ?? '');
  const headers = {...how.headers, ...(key && {Authorization: `Bearer ${String.fromCharCode(...bytes)}`})};
  const reply = await fetch(root + path, {...how, headers});
  if (reply.status === 401) askForKey();
  return reply;
};
const post = (path, body, signal, headers = {}) => get(path, {
  method: 'POST', headers: {'Content-Type': 'application/json', ...headers}, body: JSON.stringify(body), signal,
});

function askForKey() {
  $('refused').textContent = key ? 'The key is wrong.' : 'It goes to this server alone.';
  if (!$('lock').open) $('lock').showModal();
}

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
