'use strict';
// What an answer and the conversation cost, and that the weights are what they were.

const count = (number) => number.toLocaleString('en');
const some = (number, noun) => `${count(number)} ${noun}${number === 1 ? '' : 's'}`;
const took = (ms) => `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
const money = (dollars) => dollars.toLocaleString('en', {style: 'currency', currency: 'USD', maximumSignificantDigits: 2});
const pace = (speed) => `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`;
const short = (digest) => digest.slice(0, 12);
const weights = {first: null, changed: null, checks: 0};

// The line below an answer that has ended, for whatever reason.
function under(turn) {
  const told = [
    turn.finish === 'stopped' && 'stopped',
    turn.finish === 'length' && 'ended by the limit of tokens',
    turn.tokens && some(turn.tokens, 'token'),
    turn.speed && pace(turn.speed),
    turn.first && `first after ${took(turn.wait)}`,
    turn.resent && `this turn re-sent ${some(turn.resent, 'token')}`,
    turn.cached && `${count(turn.cached)} of the prompt from the prefix cache`,
  ].filter(Boolean).flatMap((text) => [' · ', make('span', {}, text)]).slice(1);
  const copy = turn.text ? [copier(() => turn.text)] : [];
  const retry = make('button', {type: 'button', className: 'again', textContent: 'Try again', onclick: () => again(turn)});
  const trouble = `${turn.trouble}${turn.text ? ' What had come is kept.' : ''}`;
  if (turn.trouble) turn.node.append(make('p', {className: 'trouble'}, trouble));
  turn.node.append(make('div', {className: 'under'}, ...copy, retry, make('p', {}, ...told)));
  $('status').textContent = turn.trouble ?? (turn.finish === 'stopped' ? 'Stopped' : `Answer: ${turn.text}`);
}

function tell(name, text) {
  $(name).textContent = text || '–';
  for (const brief of document.querySelectorAll(`[data-show="${name}"]`)) brief.textContent = text;
}

function figures() {
  const price = settings.price.valueAsNumber;
  const share = served.context ? used() / served.context : 0;
  const last = (figure) => kept().findLast((turn) => turn[figure])?.[figure];
  tell('context', served.context ? `${count(used())} of ${count(served.context)}` : count(used()));
  tell('speed', last('speed') && pace(last('speed')));
  tell('first', last('wait') && took(last('wait')));
  tell('cost', spent && price >= 0 ? money(price * spent / 3.6e6) : '');
  tell('worked', spent && took(spent));
  tell('resent', some(turns.reduce((sum, turn) => sum + (turn.resent ?? 0), 0), 'token'));
  $('meter').ariaValueNow = Math.round(share * 100);
  for (const meter of document.querySelectorAll('.meter')) {
    meter.firstChild.style.width = `${Math.min(share, 1) * 100}%`;
    meter.classList.toggle('near', share > 0.9);
  }
}

async function attest() {
  const now = await fetch(at('/v1/attestation')).then((reply) => reply.ok ? reply.json() : null).catch(() => null);
  if (now) {
    weights.first ??= now.digest_at_load;
    weights.checks += 1;
    if (now.digest !== weights.first) weights.changed ??= now.digest;
    tell('digest', `${short(weights.changed ?? now.digest)}…`);
    $('digest').title = weights.changed ?? now.digest;
    $('checked').textContent = `SHA-256 of every weight, taken at the start and ${some(weights.checks, 'time')} since.`;
  }
  const state = weights.changed ? 'changed' : now ? 'same' : 'unknown';
  $('weights').className = state;
  const told = {changed: '✗ CHANGED since start', same: '✓ unchanged since start', unknown: 'could not be checked'};
  tell('weights', told[state]);
  if (!weights.changed) return;
  loud(`The weights have changed: ${short(weights.first)} at the start, then ${short(weights.changed)}. `
    + 'Answers come from another model than at first.');
}

function loud(text) {
  $('loud').textContent = text;
  $('loud').hidden = !text;
}
