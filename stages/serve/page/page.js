'use strict';
// The page itself: scrolling, the keyboard, what is shown when, and the first words with the server.

const TRIES = [
  'What is the capital of Portugal, and what is it known for?',
  'Explain in three sentences what a language model does.',
  'Write a Python function that reverses a string.',
];
const isLow = () => $('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight < 60;
const pin = () => { $('scroll').scrollTop = $('scroll').scrollHeight; };
const fit = () => {
  $('ask').style.height = 'auto';
  $('ask').style.height = `${$('ask').scrollHeight}px`;
};

function busy(turn, yes) {
  turn.node.setAttribute('aria-busy', yes);
  $('send').hidden = yes;
  $('stop').hidden = !yes;
  if (yes) $('status').textContent = 'Answering';
}

// On a narrow screen the figures and settings take the conversation's place; on a wide one they are always there.
function rail(open) {
  document.body.classList.toggle('settings', open);
  $('open').textContent = open ? 'Back' : 'Settings';
  $('open').ariaExpanded = open;
}

function newConversation() {
  running?.abort();
  running = null;
  turns = [];
  spent = 0;
  $('log').replaceChildren();
  $('empty').hidden = false;
  $('send').hidden = false;
  $('stop').hidden = true;
  $('status').textContent = 'New conversation';
  rail(false);
  figures();
  $('ask').focus();
}

async function connect() {
  try {
    const reply = await fetch(at('/v1/models'));
    if (!reply.ok) throw new Error(await reason(reply));
    const [model] = (await reply.json()).data;
    Object.assign(server, {model: model.id, context: model.max_model_len});
    settings.price.value ||= model.price_per_hour ?? '';
    settings.max_tokens.value = Math.min(settings.max_tokens.value, Math.floor(server.context / 2));
  } catch (error) {
    warn(`The server is not ready. ${error instanceof TypeError ? 'It does not answer.' : error.message} Trying again…`);
    setTimeout(connect, 2000);
    return;
  }
  warn('');
  $('model').textContent = $('model').title = server.model;
  document.title = `${server.model} · Thrice`;
  $('send').disabled = false;
  figures();
  await attest();
}

for (const text of TRIES) $('tries').append(make('button', {type: 'button', textContent: text, onclick: () => send(text)}));
$('form').onsubmit = (event) => {
  event.preventDefault();
  send($('ask').value);
};
$('settings').onsubmit = (event) => event.preventDefault();
$('settings').oninput = figures;
$('stop').onclick = () => {
  running?.abort();
  $('ask').focus();
};
$('new').onclick = newConversation;
$('open').onclick = () => rail(!document.body.classList.contains('settings'));
$('ask').oninput = fit;
$('ask').onkeydown = (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send($('ask').value);
};
document.onkeydown = (event) => {
  if (event.key !== 'Escape') return;
  if (running) running.abort();
  else rail(false);
};
connect();
