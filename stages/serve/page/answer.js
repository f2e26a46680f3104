'use strict';
// Gets one answer: makes room in the context, streams it, continues one that was cut short, and counts its tokens and time.

const SPARE = 0.75;  // a full context is emptied to this share, so that the next turns find their prefix in the prefix cache
let running = null;  // the AbortController of the answer under way
let ended = Promise.resolve();  // resolves when the answer under way has ended
let spent = 0;  // ms the server worked for the conversation

// Returns whether an answer can begin now; shows a setting that cannot be sent.
function isReady() {
  if (running || !server.model) return false;
  checkJson();
  if ($('settings').checkValidity()) return true;
  showSettings(true);
  $('settings').reportValidity();
  return false;
}

function checkJson() {
  for (const field of [settings.schema, settings.tools]) {
    field.setCustomValidity(field.value.trim() && !pretty(field.value) ? 'This is not JSON.' : '');
  }
}

// Returns the value of JSON, undefined for none.
const fromJson = (text) => text.trim() ? JSON.parse(text) : undefined;
// Takes tools as OpenAI has them, or only their functions.
const asTools = (tools) => [tools].flat().map((tool) => tool.function ? tool : {type: 'function', function: tool});

// Sends a question, in place of the turn `edited`, if any. Returns false when no answer can begin: nothing has changed then.
async function send(text, edited = null) {
  if (!text.trim() || !isReady()) return false;
  if (3 * text.length > server.context) {  // a character is hardly ever more than 3 tokens
    const stop = running = new AbortController();
    const problem = await lengthProblem({messages: history([{role: 'user', text}])}, stop.signal);
    if (running !== stop) return false;
    running = null;
    warn('length', problem);
    if (problem || stop.signal.aborted) return false;
  }
  if (edited) setAside(turns.slice(turns.indexOf(edited)));
  // After a question that got no answer another one would be the second in a row, which templates refuse.
  const active = activeTurns();
  const question = active.findLastIndex((turn) => turn.role === 'user');
  if (question >= 0 && !active.slice(question + 1).some((turn) => turn.text || turn.calls)) setAside(active.slice(question));
  const call = openCall();
  addTurn(call ? 'tool' : 'user', text, {answers: call});
  ended = streamAnswer(contextTokens());
  return true;
}

function retry(turn) {
  if (!isReady()) return;
  setAside([turn]);
  ended = streamAnswer(Infinity);
}

function continueAnswer(turn) {
  if (isReady()) ended = streamAnswer(Infinity, turn);
}

// Streams an answer into a new turn, or into `cut`, one to continue. `before`: tokens of earlier turns, sent again.
async function streamAnswer(before, cut = null) {
  const stop = running = new AbortController();
  try {
    if (isOlder()) id = newId();  // both tabs' turns are kept
  } catch {}  // `save` says it
  changed = Date.now();
  const turn = cut ?? addTurn('assistant', '');
  const clock = {began: performance.now(), pieces: 0};
  const earlier = cut ? turn.tokens ?? 0 : 0;  // tokens that the answer has already
  const {schema, tools} = Object.fromEntries(['schema', 'tools'].map((name) => [name, fromJson(settings[name].value)]));
  Object.assign(turn, {clock, finish: null, error: null, usage: null, speed: 0, wait: 0, json: Boolean(schema)});
  keepFocus(() => {
    document.querySelectorAll('.again').forEach((button) => button.remove());
    turn.foot.replaceChildren();
    setBusy(turn, true);
  });
  scrollToEnd();
  const request = (sent) => ({
    model: server.model, messages: history(sent), ...(tools && {tools: asTools(tools)}),
    ...(cut && {add_generation_prompt: false, continue_final_message: true}),
  });
  try {
    turn.prompt = Math.max(0, await makeRoom(turn, request, stop.signal) - earlier);
    drawFigures();
    save();
    const reply = await post('/v1/chat/completions', {
      ...request(), stream: true, stream_options: {include_usage: true},
      temperature: settings.temperature.valueAsNumber, top_p: settings.top_p.valueAsNumber,
      max_tokens: settings.max_tokens.valueAsNumber, ...(settings.seed.value && {seed: settings.seed.valueAsNumber}),
      ...(tools && {parallel_tool_calls: false}),
      ...(schema && {response_format: {type: 'json_schema', json_schema: {name: 'answer', schema}}}),
    }, stop.signal, {'X-Usage-Cost': '1'});
    if (!reply.ok) throw new Error(await reason(reply));
    clock.answered = true;
    for await (const event of events(reply.body)) addChunk(turn, event);
    if (!turn.finish) throw new Error('The connection ended before the answer was complete.');
  } catch (error) {
    if (stop.signal.aborted) turn.finish = 'stopped';
    else turn.error = error instanceof TypeError ? 'The connection to the server is gone.' : error.message;
  }
  if (!turns.includes(turn)) return;  // a new conversation has begun meanwhile
  const atEnd = isAtEnd();
  running = null;
  spent += performance.now() - clock.began;
  show(turn);
  showWait(turn);
  keepFocus(() => setBusy(turn, false));
  if (clock.answered) await setFigures(turn, before, earlier);
  drawFoot(turn);
  $('status').textContent = turn.error ?? (turn.finish === 'stopped' ? 'Stopped' : `Answer: ${asMarkdown(turn)}`);
  drawFigures();
  save();
  if (atEnd) scrollToEnd();
  await checkWeights();
  await drawServed();
}

// Returns why messages cannot be answered even without those before them; empty if they can.
async function lengthProblem(request, signal) {
  const tokens = await countTokens(request, signal);
  return tokens < server.context ? '' : `${plural(tokens, 'token')} are too many for this model: at most `
    + `${count(server.context - 1)} leave room for an answer. Nothing was sent.`;
}

// Returns the tokens of the prompt. Where they leave too little for an answer, sets the oldest turns aside first; throws, and
// sets none aside, when that would not be enough.
async function makeRoom(turn, request, signal) {
  let prompt = await countTokens(request(), signal);
  const most = server.context - Math.min(settings.max_tokens.valueAsNumber, server.context / 4);
  turn.forgot = 0;
  if (prompt > most) {
    const active = activeTurns();
    const problem = await lengthProblem(request(active.slice(active.findLastIndex((each) => each.role === 'user'))), signal);
    if (problem) throw new Error(problem);
  }
  for (let full = prompt > most; full && prompt > most * SPARE;) {
    const active = activeTurns();
    const next = active.findIndex((each, place) => place && each.role === 'user');
    if (next < 0) break;
    setAside(active.slice(0, next));
    turn.forgot += next;
    prompt = await countTokens(request(), signal);
  }
  return prompt;
}

function addChunk(turn, event) {
  if (event.wait) showWait(turn, event.wait);
  if (event.error) throw new Error(event.error.message);
  const choice = event.choices?.[0];
  turn.usage = event.usage ?? turn.usage;
  turn.documents = event.documents ?? turn.documents;
  turn.finish = choice?.finish_reason ?? turn.finish;
  const {content, tool_calls: calls} = choice?.delta ?? {};
  if (!content && !calls) return;
  turn.text += content ?? '';
  for (const {index, id, function: {name, arguments: part}} of calls ?? []) {
    turn.calls ??= [];
    if (id) turn.calls[index] = {id, name, arguments: ''};
    turn.calls[index].arguments += part;
  }
  turn.clock.pieces += 1;
  turn.clock.last = performance.now();
  if (!turn.clock.first) {
    turn.clock.first = turn.clock.last;
    turn.wait = turn.clock.first - turn.clock.began;
  }
  showWait(turn);
  turn.frame ??= setTimeout(() => {  // drawing takes the processor that answers, so not with every frame
    turn.frame = null;
    const atEnd = isAtEnd();
    show(turn);
    if (atEnd) scrollToEnd();
  }, 80);
}

// Sets the counts and speed of an answer that has ended. The server sends no usage for one that was cut short.
async function setFigures(turn, before, earlier) {
  const {pieces, first, last} = turn.clock;
  const text = {prompt: turn.text, add_special_tokens: false};
  if (turn.usage) turn.prompt = Math.max(0, turn.usage.prompt_tokens - earlier);
  turn.tokens = turn.usage ? earlier + turn.usage.completion_tokens : turn.text && await countTokens(text);
  turn.resent = Math.min(before, turn.prompt + earlier);
  turn.cached = turn.usage?.prompt_tokens_details?.cached_tokens ?? 0;
  turn.flop = turn.usage?.cost?.flop ?? 0;
  turn.steps = turn.usage?.cost?.training_steps ?? 0;
  // The first piece comes when the clock starts, so its tokens are not counted: pieces hold about equally many.
  const speed = (turn.tokens - earlier) * (1 - 1 / pieces) / (last - first) * 1000;
  turn.speed = Number.isFinite(speed) ? speed : 0;
}
