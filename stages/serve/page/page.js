'use strict';
// The page itself: scrolling, the keyboard and its focus, what is shown when, and the first words with the server.

const TRIES = [
  'What is the capital of Portugal, and what is it known for?',
  'Explain in three sentences what a language model does.',
  'Write a Python function that reverses a string.',
];
const narrow = matchMedia('(max-width: 62rem)');
const warnings = {};
let closed = null;  // the conversation before this one
const isAtEnd = () => $('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight < 60;
const scrollToEnd = () => { $('scroll').scrollTop = $('scroll').scrollHeight; };
const fitHeight = (field) => {
  field.style.height = 'auto';
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
};

// Makes a change that may take away what has the focus, which then goes where one writes; on a screen that is touched it goes
// to the conversation, as a field would open a keyboard over the answer.
function keepFocus(change, next = matchMedia('(pointer: coarse)').matches ? $('scroll') : $('ask')) {
  const focused = document.activeElement;
  change();
  if (!focused || focused === document.body || focused.checkVisibility({visibilityProperty: true})) return;
  next.focus({preventScroll: true});
}

function setBusy(turn, isBusy) {
  turn.node.setAttribute('aria-busy', isBusy);
  $('send').hidden = isBusy;
  $('stop').hidden = !isBusy;
  if (isBusy) $('status').textContent = 'Answering';
}

// Shows what an answer waits for, as the server's comment says it: `place 3 in the queue`, `waiting for ...`; else nothing.
function showWait(turn, wait = '') {
  turn.node.querySelector('.wait')?.remove();
  const place = Number(/^place (\d+)/.exec(wait)?.[1] ?? 0);
  const text = place > 1 ? `Number ${count(place)} in the queue` : place ? 'Next in the queue'
    : /^waiting for/.test(wait) ? `W${wait.slice(1)}, which are loaded once after a start` : '';
  if (!text) return;
  const atEnd = isAtEnd();
  turn.body.after(make('p', {className: 'wait'}, text));
  if (atEnd) scrollToEnd();
  $('status').textContent = text;
}

function warn(about, text) {
  warnings[about] = text;
  $('alert').textContent = Object.values(warnings).filter(Boolean).join(' ');
  $('alert').hidden = !$('alert').textContent;
}

// Opens or closes the figures and settings: beside the conversation on a wide screen, in its place on a narrow one.
function showSettings(open) {
  keepFocus(() => document.body.classList.toggle('open', open), $('open'));
  $('open').textContent = open ? 'Close' : 'Settings';
  $('open').ariaExpanded = open;
}

// Empties the page; until something is sent, the conversation before can be brought back from this tab's memory.
function newConversation() {
  running?.abort();
  running = null;
  const last = turns.at(-1);
  if (last) {
    setBusy(last, false);
    showWait(last);
    closed = {turns, spent, nodes: [...$('log').childNodes]};
  }
  $('undo').hidden = !closed;
  showConversation({turns: [], spent: 0, nodes: []}, 'New conversation');
}

function undo() {
  const before = closed;
  closed = null;
  showConversation(before, 'The conversation is back');
  drawFeet();
  scrollToEnd();
}

function showConversation(shown, status) {
  ({turns, spent} = shown);
  $('log').replaceChildren(...shown.nodes);
  $('empty').hidden = turns.length > 0;
  $('status').textContent = status;
  if (narrow.matches) showSettings(false);
  drawFigures();
  save();
  $('ask').focus();
}

async function connect() {
  try {
    const health = await fetch(at('/health'));
    if (!health.ok) throw new Error(`Its state: ${(await health.json()).status}.`);
    const reply = await fetch(at('/v1/models'));
    if (!reply.ok) throw new Error(await reason(reply));
    const [model] = (await reply.json()).data;
    Object.assign(server, {model: model.id, context: model.max_model_len});
    settings.price.defaultValue = model.price_per_hour ?? '';
    for (const name of ['temperature', 'top_p']) settings[name].defaultValue = model.default_sampling[name];
    settings.max_tokens.defaultValue = Math.min(settings.max_tokens.defaultValue, Math.floor(server.context / 2));
  } catch (error) {
    const why = error instanceof TypeError ? 'It does not answer.' : error.message;
    warn('server', `The server is not ready. ${why} Trying again…`);
    setTimeout(connect, 2000);
    return;
  }
  warn('server', '');
  $('model').textContent = server.model;
  document.title = `${server.model} · Thrice`;
  turns.forEach(drawName);
  $('send').disabled = false;
  drawFigures();
  await checkWeights();
}

function submitOnEnter(event) {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
}

for (const text of TRIES) $('tries').append(makeButton(text, '', () => send(text)));
$('form').onsubmit = async (event) => {
  event.preventDefault();
  const text = $('ask').value;
  if (await send(text)) setDraft($('ask').value.replace(text, ''));  // more may have been typed meanwhile
};
$('settings').onsubmit = (event) => event.preventDefault();
$('settings').oninput = () => {
  drawFigures();
  save();
};
$('stop').onclick = () => running?.abort();
$('new').onclick = newConversation;
$('undo').lastElementChild.onclick = undo;
$('open').onclick = () => {
  showSettings(!document.body.classList.contains('open'));
  save();
};
$('ask').oninput = () => {
  warn('length', '');
  setDraft($('ask').value);
};
$('ask').onkeydown = submitOnEnter;
document.onkeydown = (event) => {
  if (event.key !== 'Escape') return;
  if (running) running.abort();
  else if (narrow.matches) showSettings(false);
};
narrow.onchange = () => showSettings(!narrow.matches);
onpagehide = () => running && save();
restore();
connect();
