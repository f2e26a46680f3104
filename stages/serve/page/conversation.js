'use strict';
// The conversation: what is sent, what streams back, and what becomes of an answer that is cut short.

const $ = (id) => document.getElementById(id);
// The page's own address may hold a name and a key, with which fetch refuses to work; the origin holds none.
const at = (path) => new URL(path, location.origin);
const post = (path, body, signal) => fetch(at(path), {
  method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body), signal,
});
const settings = $('settings').elements;
const server = {model: null, context: null};
let turns = [];  // {role, text, aside, ...}: the conversation, which is stored nowhere else
let running = null;  // what stops the answer under way
let spent = 0;  // ms the server worked for it

// A turn set aside stays to be read but is not sent again.
const activeTurns = () => turns.filter((turn) => !turn.aside);
const contextTokens = () => activeTurns().reduce((sum, turn) => turn.prompt ? turn.prompt + (turn.tokens ?? 0) : sum, 0);

function history() {
  const system = settings.system.value.trim();
  return [...(system ? [{role: 'system', content: system}] : []), ...activeTurns().map(({role, text}) => ({role, content: text}))];
}

function addTurn(role, text) {
  const turn = {role, text, blocks: [], chunks: 0, body: make('div', {className: 'text'})};
  const who = role === 'user' ? make('p', {className: 'unseen'}, 'You') : make('p', {className: 'who'}, server.model);
  turn.node = make('article', {className: role}, who, turn.body);
  turn.body.textContent = text;
  turns.push(turn);
  $('log').append(turn.node);
  $('empty').hidden = true;
  return turn;
}

function setAside(turn) {
  turn.aside = true;
  if (turn.text) turn.node.firstChild.append(' · set aside');
  turn.node.classList.add('aside');
}

function send(text) {
  if (running || !server.model || !text.trim()) return;
  if (!$('settings').checkValidity()) {
    rail(true);
    $('settings').reportValidity();
    return;
  }
  // After a question that got no answer another one would be the second in a row, which templates refuse.
  if (activeTurns().at(-1)?.role === 'user') setAside(activeTurns().at(-1));
  addTurn('user', text);
  $('ask').value = '';
  fit();
  answer(contextTokens());
}

function retry(turn) {
  if (running) return;
  setAside(turn);
  answer(Infinity);
}

// `before`: how many tokens the server had been sent or had said in earlier turns.
async function answer(before) {
  document.querySelectorAll('.again').forEach((button) => button.remove());
  const messages = history();
  const request = {
    model: server.model, messages, stream: true, stream_options: {include_usage: true},
    temperature: settings.temperature.valueAsNumber, top_p: settings.top_p.valueAsNumber,
    max_tokens: settings.max_tokens.valueAsNumber, ...(settings.seed.value && {seed: settings.seed.valueAsNumber}),
  };
  const turn = addTurn('assistant', '');
  const stop = running = new AbortController();
  busy(turn, true);
  pin();
  turn.prompt = await countTokens({messages}, stop.signal);
  figures();
  // What does not fit the server refuses, so that nothing is cut unsaid; here the limit is a person's, and means at most.
  if (turn.prompt < server.context) request.max_tokens = Math.min(request.max_tokens, server.context - turn.prompt);
  turn.began = performance.now();
  try {
    const reply = await post('/v1/chat/completions', request, stop.signal);
    if (!reply.ok) throw new Error(await reason(reply));
    turn.started = true;
    for await (const event of events(reply.body)) addChunk(turn, event);
    if (!turn.finish) throw new Error('The connection ended before the answer was complete.');
  } catch (error) {
    if (stop.signal.aborted) turn.finish = 'stopped';
    else turn.error = error instanceof TypeError ? 'The connection to the server is gone.' : error.message;
  }
  if (!turns.includes(turn)) return;  // a new conversation has begun meanwhile
  const low = isLow();
  running = null;
  spent += performance.now() - turn.began;
  show(turn);
  busy(turn, false);
  if (!turn.text) setAside(turn);
  if (turn.started) await measure(turn, before);
  showSummary(turn);
  figures();
  if (low) pin();
  await attest();
}

function addChunk(turn, event) {
  if (event.error) throw new Error(event.error.message);
  const choice = event.choices?.[0];
  turn.usage = event.usage ?? turn.usage;
  turn.finish = choice?.finish_reason ?? turn.finish;
  if (!choice?.delta?.content) return;
  turn.text += choice.delta.content;
  turn.chunks += 1;
  turn.last = performance.now();
  if (!turn.first) {
    turn.first = turn.last;
    turn.wait = turn.first - turn.began;
    figures();
  }
  turn.frame ??= requestAnimationFrame(() => {
    turn.frame = null;
    const low = isLow();
    show(turn);
    if (low) pin();
  });
}

async function reason(reply) {
  const body = await reply.json().catch(() => null);
  const wait = reply.headers.get('Retry-After');
  return (body?.error?.message ?? `The server answered ${reply.status}.`) + (wait ? ` Try again in ${wait} s.` : '');
}

// Server-sent events -> the JSON of each, up to [DONE].
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let partial = ''; ;) {
    const {done, value} = await reader.read();
    if (done) return;
    const lines = (partial + value).split(/\r?\n/);
    partial = lines.pop();
    for (const line of lines.filter((line) => line.startsWith('data:'))) {
      if (line.slice(5).trim() === '[DONE]') return;
      yield JSON.parse(line.slice(5));
    }
  }
}

// Of an answer that was cut short the server sent no figures.
async function measure(turn, before) {
  const text = {prompt: turn.text, add_special_tokens: false};
  turn.prompt = turn.usage?.prompt_tokens ?? turn.prompt;
  turn.tokens = turn.usage?.completion_tokens ?? (turn.text && await countTokens(text));
  turn.resent = Math.min(before, turn.prompt);
  turn.cached = turn.usage?.prompt_tokens_details?.cached_tokens ?? 0;
  // The first piece comes when the clock starts, so its tokens are not counted: pieces hold about equally many.
  const speed = turn.tokens * (1 - 1 / turn.chunks) / (turn.last - turn.first) * 1000;
  turn.speed = Number.isFinite(speed) ? speed : 0;
}

// How many tokens a text or a conversation is; 0 when the server does not say.
async function countTokens(body, signal) {
  const reply = await post('/tokenize', {model: server.model, ...body}, signal).catch(() => null);
  return reply?.ok ? (await reply.json()).count : 0;
}
