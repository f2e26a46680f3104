'use strict';
// Conversations stay in this browser alone: each under a key of its own, and this tab's over a reload of it.

const KEY = 'thrice';
const MOST = 200;  // conversations; the oldest go first, also where the storage is full
const FIELDS = ('role text model aside finish error prompt tokens resent cached wait speed flop steps forgot calls answers json documents')
  .split(' ');
const newId = () => `${Math.random()}`;
let id = newId();
let changed = 0;  // when something was last sent
let deleted = null;

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;  // not ours
  }
}

// Returns the conversations of this browser, the newest first: of all that it keeps here, only they have turns.
function conversations() {
  return Object.values(localStorage).map(parse).filter((each) => Array.isArray(each?.turns))
    .sort((a, b) => b.changed - a.changed);
}

const keyOf = (talk) => `${KEY} talk ${talk.id}`;

function put(talk) {
  const others = conversations().filter((each) => each.id !== talk.id);
  for (const oldest of others.splice(MOST - 1)) localStorage.removeItem(keyOf(oldest));
  for (;;) {
    try {
      return localStorage.setItem(keyOf(talk), JSON.stringify(talk));
    } catch (full) {
      if (!others.length) throw full;
      localStorage.removeItem(keyOf(others.pop()));
    }
  }
}

// Returns whether another tab has gone on with this conversation.
const isOlder = () => parse(localStorage.getItem(keyOf({id})))?.changed > changed;

function save() {
  const talk = {id, changed, spent, turns: turns.map((turn) => Object.fromEntries(FIELDS.map((f) => [f, turn[f]])))};
  const chosen = [...settings].filter((field) => field.value !== field.defaultValue).map(({name, value}) => [name, value]);
  const folded = !document.body.classList.contains('open') && !narrow.matches;
  try {
    sessionStorage.setItem(KEY, JSON.stringify(talk));
    localStorage.setItem(KEY, JSON.stringify({settings: Object.fromEntries(chosen), folded}));
    if (turns.length && !isOlder()) put(talk);
    drawList();
    warn('storage', '');
  } catch {
    warn('storage', 'This browser keeps no more of the conversation: its storage is full or off. A reload loses the rest.');
  }
}

// Keeps what is typed but not sent, over a reload of this tab.
function setDraft(text) {
  $('ask').value = text;
  fitHeight($('ask'));
  try {
    sessionStorage.setItem(`${KEY} draft`, text);
  } catch {}  // `save` says so
}

// Returns the conversations that hold what is searched for.
function found() {
  const words = $('search').value.trim().toLowerCase();
  return conversations().filter(({turns}) => turns.some(({text}) => `${text}`.toLowerCase().includes(words)));
}

function drawList() {
  const rows = found().map((talk) => {
    const title = `${talk.turns[0]?.text}`.slice(0, 80);
    const open = makeButton(title, '', () => showConversation(talk, 'Conversation opened'));
    open.ariaCurrent = talk.id === id;
    return make('li', {}, open, make('button', {
      type: 'button', textContent: 'Delete', ariaLabel: `Delete ${title}`, onclick: () => remove(talk),
    }));
  });
  keepFocus(() => $('list').replaceChildren(...rows), $('search'));
  $('export').disabled = !rows.length;
  $('undo').hidden = !deleted;
}

function remove(talk) {
  if (talk.id === id) newConversation();  // which keeps this one as it is now
  deleted = parse(localStorage.getItem(keyOf(talk)));
  localStorage.removeItem(keyOf(talk));
  drawList();
  $('undo').lastElementChild.focus();
}

// Brings back the conversation that was deleted last.
function undo() {
  put(deleted);
  showConversation(deleted, 'The conversation is back');
}

// Draws what was kept: this tab's conversation, or the newest in a tab that is new.
function restore() {
  let kept = null;
  try {
    kept = parse(localStorage.getItem(KEY));
    const stored = sessionStorage.getItem(`${KEY} key`);
    if (stored && isKey(stored)) key = stored;
    for (const [name, value] of Object.entries(kept?.settings ?? {})) if (settings[name]) settings[name].value = value;
    server.wanted = kept?.settings?.model;
  } catch {}  // turned off, or not ours
  showSettings(!narrow.matches && !kept?.folded);
  try {
    const talk = parse(sessionStorage.getItem(KEY)) ?? conversations()[0];
    if (talk) showConversation(talk, '');
    setDraft(sessionStorage.getItem(`${KEY} draft`) ?? '');
    drawList();
  } catch {}
}
