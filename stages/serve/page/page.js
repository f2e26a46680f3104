'use strict';
// Scrolling, the keyboard and its focus, what is shown when, and the first words with the server.

const TRIES = [
  'What is the capital of Portugal, and what is it known for?',
  'Explain in three sentences what a language model does.',
  'Write a Python function that reverses a string.',
];
const narrow = matchMedia('(max-width: 62rem)');
const warnings = {};
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

// Shows what an answer waits for, as the server's comment says it: `place 3 in the queue`, `reading 8 of 9 tokens`; else nothing.
function showWait(turn, wait = '') {
  turn.node.querySelector('.wait')?.remove();
  const place = Number(/^place (\d+)/.exec(wait)?.[1] ?? 0);
  const text = place > 1 ? `Number ${count(place)} in the queue` : place ? 'Next in the queue'
    : /^reading/.test(wait) ? `R${wait.slice(1).replace(/\d+/g, (digits) => count(Number(digits)))}` : '';
  if (!text) return;
  const atEnd = isAtEnd();
  turn.body.after(make('p', {className: 'wait'}, text));
  if (atEnd) scrollToEnd();
  if (!/^Reading/.test($('status').textContent)) $('status').textContent = text;  // is read aloud once, not at each step
}

function warn(about, text) {
  warnings[about] = text;
  $('alert').textContent = Object.values(warnings).filter(Boolean).join(' ');
  $('alert').hidden = !$('alert').textContent;
}

// Opens or closes the figures and settings: beside the conversation on a wide screen, in its place on a narrow one.
function showSettings(open) {
  keepFocus(() => document.body.classList.toggle('open', open), $('open'));
  $('open').textContent = open ? 'Close' : 'Menu';
  $('open').ariaExpanded = open;
}

// Ends the answer under way, and keeps what had come of it.
function leave() {
  running?.abort();
  running = null;
  const last = turns.at(-1);
  if (!last) return;
  setBusy(last, false);
  showWait(last);
  save();
}

function newConversation() {
  showConversation({id: newId(), turns: [], spent: 0}, 'New conversation');
}

// Shows a conversation in place of this one. An answer that was under way when it was kept was stopped.
function showConversation(talk, status) {
  leave();
  turns = [];
  $('log').replaceChildren();
  $('empty').hidden = false;
  ({id, changed = 0} = talk);
  deleted = null;
  spent = Number(talk.spent) || 0;
  for (const {role, text, ...rest} of talk.turns) addTurn(role, String(text), rest);
  drawFeet();
  setAside(turns.filter((turn) => turn.aside));
  $('status').textContent = status;
  if (narrow.matches) showSettings(false);
  drawFigures();
  save();
  scrollToEnd();
  $('ask').focus();
}

async function connect() {
  try {
    const health = await get('/health');
    if (!health.ok) {
      const {status} = await health.json();
      throw new Error(status === 'warming' ? 'The model is being loaded.' : `Its state: ${status}.`);
    }
    const reply = await get('/v1/models');
    if (reply.status === 401) return;  // the key is asked for, and this begins again
    if (!reply.ok) throw new Error(await reason(reply));
    const {data} = await reply.json();
    const model = data.find((each) => each.id === (server.model ?? server.wanted)) ?? data[0];
    settings.model.replaceChildren(...data.map((each) => make('option', {}, each.id)));
    settings.model.value = model.id;
    settings.model.parentNode.hidden = data.length < 2;
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
  save();
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
  checkJson();
  server.model = settings.model.value || server.model;
  turns.forEach(drawName);
  drawFigures();
  save();
};
$('stop').onclick = () => running?.abort();
$('new').onclick = newConversation;
$('undo').lastElementChild.onclick = undo;
$('search').oninput = drawList;
$('export').onclick = () => library('export.js').then(() => exportList());
$('lock').oncancel = () => warn('server', 'This server needs an API key: reload the page to give it.');
$('unlock').onsubmit = (event) => {
  event.preventDefault();
  const typed = $('unlock').elements.key.value;
  if (!isKey(typed)) {
    $('refused').textContent = 'That is no key: it is too long, or holds a control character.';
    return;
  }
  key = typed;
  try {
    sessionStorage.setItem(`${KEY} key`, key);
  } catch {}  // then a reload asks again
  $('unlock').reset();
  $('lock').close();
  connect();
};
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
onstorage = drawList;  // another tab has saved
restore();
connect();
