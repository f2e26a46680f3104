'use strict';
// The turns: which of them the model sees, how each is drawn, and what a person can do with it.

const $ = (id) => document.getElementById(id);
const settings = $('settings').elements;
const server = {model: null, context: null};
let turns = [];  // {role, text, aside, ...}

// A turn set aside stays to be read but is not sent again.
const activeTurns = () => turns.filter((turn) => !turn.aside);
const contextTokens = () => activeTurns().reduce((sum, turn) => turn.prompt ? turn.prompt + (turn.tokens ?? 0) : sum, 0);

const asMessages = (some) => some.filter((turn) => turn.text || turn.calls).map(({role, text, calls, answers}) => ({
  role, content: text,
  ...(calls && {tool_calls: calls.map(({id, ...call}) => ({id, type: 'function', function: call}))}),
  ...(answers && {tool_call_id: answers.id}),
}));

function history(sent = activeTurns()) {
  const system = settings.system.value.trim();
  return [...(system ? [{role: 'system', content: system}] : []), ...asMessages(sent)];
}

// Returns the call of a tool that the conversation waits for: what is sent next is what it returned.
const openCall = () => activeTurns().at(-1)?.calls?.[0];

function addTurn(role, text, rest = {}) {
  const turn = {role, text, model: server.model, ...rest, blocks: []};
  turn.body = make('div', {className: 'text'});
  turn.foot = make('div', {className: 'foot'});
  turn.node = make('article', {className: role}, make('p', {className: 'who'}), turn.body, turn.foot);
  turns.push(turn);
  $('log').append(turn.node);
  $('empty').hidden = true;
  if (role === 'assistant') show(turn);
  else Object.assign(turn.body, {dir: 'auto', textContent: text});
  drawName(turn);
  if (role === 'user') turn.foot.append(copier(() => turn.text), makeButton('Edit', 'edit', () => edit(turn)));
  return turn;
}

// The header names the model: here stands only the name of another one, which answered before.
function drawName(turn) {
  const name = turn.node.firstChild;
  name.textContent = turn.answers ? `${turn.answers.name} returned` : turn.role === 'user' ? 'You' : turn.model;
  name.classList.toggle('unseen', turn.role === 'user' || turn.model === server.model && !turn.answers);
}

function makeButton(textContent, className, onclick) {
  return make('button', {type: 'button', textContent, className, onclick});
}

function setAside(chosen) {
  for (const turn of chosen) {
    turn.aside = true;
    turn.node.classList.add('aside');
    keepFocus(() => turn.foot.querySelector('.edit')?.remove());
  }
  document.querySelectorAll('#log > .note').forEach((note) => note.remove());
  let run = 0;
  turns.forEach((turn, place) => {
    run = turn.aside ? run + 1 : 0;
    if (!run || turns[place + 1]?.aside) return;
    const what = run === 1 ? 'turn' : `${run} turns`;
    turn.node.after(make('p', {className: 'note'}, `Set aside: the model does not see the ${what} above.`));
  });
}

// Draws the buttons and the figures below an answer that has ended, for whatever reason.
function drawFoot(turn) {
  const last = turn === turns.at(-1);
  const parts = [
    turn.finish === 'stopped' && 'stopped',
    turn.finish === 'length' && 'ended by the limit of tokens',
    turn.finish === 'stop' && !turn.text && 'an empty answer',
    turn.json && turn.text && (pretty(turn.text) ? 'valid JSON' : 'JSON that is not whole'),
    turn.forgot && `the context was full: ${plural(turn.forgot, 'turn')} set aside`,
    turn.tokens && plural(turn.tokens, 'token'),
    turn.speed && pace(turn.speed),
    turn.wait && `first after ${seconds(turn.wait)}`,
    turn.flop && `${operations(turn.flop)}, ${brief(turn.steps)} of a training step`,
    turn.resent && `this turn re-sent ${plural(turn.resent, 'token')}`,
    turn.cached && `${count(turn.cached)} of the prompt from the prefix cache`,
  ].filter(Boolean).flatMap((text) => [' · ', make('span', {}, text)]).slice(1);
  const error = `${turn.error}${turn.text ? ' What had come is kept.' : ''}`;
  turn.foot.replaceChildren(
    ...(turn.error ? [make('p', {className: 'error'}, error)] : []),
    ...(turn.text ? [copier(() => turn.text)] : []),
    ...(last && turn.text && turn.finish !== 'stop' && !turn.calls && !turn.json ? [makeButton('Continue', 'again', () => continueAnswer(turn))] : []),
    ...(last ? [makeButton('Try again', 'again', () => retry(turn))] : []),
    make('p', {className: 'figures'}, ...parts),
    ...(turn.documents ? [foundIn(turn.documents)] : []),
  );
  window.colour?.(turn);
}

// Shows which passages of documents were put before the question, and what that cost.
function foundIn({tokens, seconds: took, passages}) {
  const time = took ? `, about ${seconds(took * 1000)}` : '';
  const cost = `${plural(passages.length, 'passage')} of documents: ${plural(tokens, 'token')}${time}`;
  const texts = passages.map(({file, number, text}) => make('p', {dir: 'auto'}, make('b', {}, `${file} (${number})`), ` ${text}`));
  return make('details', {}, make('summary', {}, cost), ...texts);
}

// Draws below each answer of a conversation that is shown again. One that was under way has been stopped.
function drawFeet() {
  for (const turn of turns.filter(({role}) => role === 'assistant')) {
    if (!turn.error) turn.finish ??= 'stopped';
    drawFoot(turn);
  }
}

// Replaces a question by a field to edit it; sending it sets the turns from there on aside.
function edit(turn) {
  const field = make('textarea', {value: turn.text, dir: 'auto', ariaLabel: 'Your message', oninput: () => fitHeight(field)});
  const leave = () => {
    form.replaceWith(turn.body, turn.foot);
    turn.foot.querySelector('.edit')?.focus();
  };
  const form = make('form', {className: 'editing', onsubmit: async (event) => {
    event.preventDefault();
    if (!field.value.trim()) return;
    running?.abort();
    await ended;
    if (form.isConnected && await send(field.value, turn)) keepFocus(leave);
  }}, field, makeButton('Cancel', '', leave), make('button', {className: 'go'}, 'Send'));
  field.onkeydown = (event) => {
    submitOnEnter(event);
    if (event.key !== 'Escape') return;
    event.stopPropagation();
    leave();
  };
  turn.body.replaceWith(form);
  turn.foot.remove();
  fitHeight(field);
  field.focus();
}
