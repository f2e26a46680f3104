'use strict';
// One answer: room is made for it, it streams, goes on after a cut, and ends with its figures.

const SPARE = 0.75;  // of what fits: a full context is emptied to there, so that the next turns find their prefix in the cache
let running = null;  // what stops the answer under way
let ended = Promise.resolve();  // when it has ended
let spent = 0;  // ms the server worked for the conversation

// Whether an answer can begin now; a setting that cannot be sent is shown.
function isReady() {
  if (running || !server.model) return false;
  if ($('settings').checkValidity()) return true;
  rail(true);
  $('settings').reportValidity();
  return false;
}

// Asks, in the place of a turn that was `edited`, if any; false when that cannot be now.
function send(text, edited = null) {
  if (!text.trim() || !isReady()) return false;
  if (edited) setAside(turns.slice(turns.indexOf(edited)));
  // After a question that got no answer another one would be the second in a row, which templates refuse.
  const active = activeTurns();
  const asked = active.findLastIndex((turn) => turn.role === 'user');
  if (asked >= 0 && !active.slice(asked + 1).some((turn) => turn.text)) setAside(active.slice(asked));
  addTurn('user', text);
  ended = write(contextTokens());
  return true;
}

function retry(turn) {
  if (!isReady()) return;
  setAside([turn]);
  ended = write(Infinity);
}

function goOn(turn) {
  if (isReady()) ended = write(Infinity, turn);
}

// `before`: how many tokens the server had been sent or had said in earlier turns. `cut`: the answer to go on with, if any.
async function write(before, cut = null) {
  const stop = running = new AbortController();
  const turn = cut ?? addTurn('assistant', '');
  const clock = {began: performance.now(), pieces: 0};
  const earlier = cut ? turn.tokens ?? 0 : 0;  // tokens of it that are there
  Object.assign(turn, {clock, finish: null, error: null, usage: null, speed: 0, wait: 0});
  keepFocus(() => {
    document.querySelectorAll('.again').forEach((button) => button.remove());
    turn.foot.replaceChildren();
    busy(turn, true);
  });
  pin();
  const request = () => ({
    model: server.model, messages: history(), ...(cut && {add_generation_prompt: false, continue_final_message: true}),
  });
  const prompt = await makeRoom(turn, request, stop.signal);
  turn.prompt = Math.max(0, prompt - earlier);
  figures();
  save();
  try {
    const reply = await post('/v1/chat/completions', {
      ...request(), stream: true, stream_options: {include_usage: true},
      temperature: settings.temperature.valueAsNumber, top_p: settings.top_p.valueAsNumber,
      max_tokens: settings.max_tokens.valueAsNumber, ...(settings.seed.value && {seed: settings.seed.valueAsNumber}),
    }, stop.signal);
    if (!reply.ok) throw new Error(await reason(reply));
    clock.answered = true;
    for await (const event of events(reply.body)) addChunk(turn, event);
    if (!turn.finish) throw new Error('The connection ended before the answer was complete.');
  } catch (error) {
    if (stop.signal.aborted) turn.finish = 'stopped';
    else turn.error = error instanceof TypeError ? 'The connection to the server is gone.' : error.message;
  }
  if (!turns.includes(turn)) return;  // a new conversation has begun meanwhile
  const low = isLow();
  running = null;
  spent += performance.now() - clock.began;
  show(turn);
  showPlace(turn, 0);
  keepFocus(() => busy(turn, false));
  if (clock.answered) await measure(turn, before, earlier);
  drawFoot(turn);
  $('status').textContent = turn.error ?? (turn.finish === 'stopped' ? 'Stopped' : `Answer: ${turn.text}`);
  figures();
  save();
  if (low) pin();
  await attest();
}

// Counts what is to be sent. If that leaves too little for an answer, sets the oldest turns aside, down to the last question.
async function makeRoom(turn, request, signal) {
  let prompt = await countTokens(request(), signal);
  const most = server.context - Math.min(settings.max_tokens.valueAsNumber, server.context / 4);
  turn.forgot = 0;
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
  if (event.place !== undefined) showPlace(turn, event.place);
  if (event.error) throw new Error(event.error.message);
  const choice = event.choices?.[0];
  turn.usage = event.usage ?? turn.usage;
  turn.finish = choice?.finish_reason ?? turn.finish;
  if (!choice?.delta?.content) return;
  turn.text += choice.delta.content;
  turn.clock.pieces += 1;
  turn.clock.last = performance.now();
  if (!turn.clock.first) {
    turn.clock.first = turn.clock.last;
    turn.wait = turn.clock.first - turn.clock.began;
    showPlace(turn, 0);
  }
  turn.frame ??= requestAnimationFrame(() => {
    turn.frame = null;
    const low = isLow();
    show(turn);
    if (low) pin();
  });
}

// Of an answer that was cut short the server sent no figures.
async function measure(turn, before, earlier) {
  const {pieces, first, last} = turn.clock;
  const text = {prompt: turn.text, add_special_tokens: false};
  if (turn.usage) turn.prompt = Math.max(0, turn.usage.prompt_tokens - earlier);
  turn.tokens = turn.usage ? earlier + turn.usage.completion_tokens : turn.text && await countTokens(text);
  turn.resent = Math.min(before, turn.prompt + earlier);
  turn.cached = turn.usage?.prompt_tokens_details?.cached_tokens ?? 0;
  // The first piece comes when the clock starts, so its tokens are not counted: pieces hold about equally many.
  const speed = (turn.tokens - earlier) * (1 - 1 / pieces) / (last - first) * 1000;
  turn.speed = Number.isFinite(speed) ? speed : 0;
}
