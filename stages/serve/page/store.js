'use strict';
// The conversation outlives a reload, in this browser alone: this tab's own, and the newest for a tab that is opened later.

const KEY = 'thrice';
const FIELDS = 'role text model aside finish error prompt tokens resent cached wait speed forgot'.split(' ');

function save() {
  const chosen = [...settings].filter((field) => field.value !== field.defaultValue).map(({name, value}) => [name, value]);
  const kept = JSON.stringify({
    spent, settings: Object.fromEntries(chosen), folded: !document.body.classList.contains('open') && !narrow.matches,
    turns: turns.map((turn) => Object.fromEntries(FIELDS.map((name) => [name, turn[name]]))),
  });
  try {
    sessionStorage.setItem(KEY, kept);
    localStorage.setItem(KEY, kept);
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

// Draws what was kept. An answer that was under way then has been stopped by it.
function restore() {
  let kept = null;
  try {
    kept = JSON.parse(sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY));
    for (const [name, value] of Object.entries(kept?.settings ?? {})) settings[name].value = value;
    for (const {role, text, ...rest} of kept?.turns ?? []) addTurn(role, String(text), rest);
    setDraft(sessionStorage.getItem(`${KEY} draft`) ?? '');
  } catch {}  // turned off, or not ours
  spent = Number(kept?.spent) || 0;
  drawFeet();
  setAside(turns.filter((turn) => turn.aside));
  showSettings(!narrow.matches && !kept?.folded);
  scrollToEnd();
}
