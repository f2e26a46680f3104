'use strict';
// What an answer and the conversation cost, and that the weights are what they were.

const count = (number) => number.toLocaleString('en');
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? '' : 's'}`;
const seconds = (ms) => `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
const money = (dollars) => dollars.toLocaleString('en', {style: 'currency', currency: 'USD', maximumSignificantDigits: 2});
const pace = (speed) => `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`;
const short = (digest) => digest.slice(0, 12);
const weights = {first: null, changed: null, checks: 0};

// The line below an answer that has ended, for whatever reason.
function showSummary(turn) {
  const parts = [
    turn.finish === 'stopped' && 'stopped',
    turn.finish === 'length' && 'ended by the limit of tokens',
    turn.tokens && plural(turn.tokens, 'token'),
    turn.speed && pace(turn.speed),
    turn.first && `first after ${seconds(turn.wait)}`,
    turn.resent && `this turn re-sent ${plural(turn.resent, 'token')}`,
    turn.cached && `${count(turn.cached)} of the prompt from the prefix cache`,
  ].filter(Boolean).flatMap((text) => [' · ', make('span', {}, text)]).slice(1);
  const copy = turn.text ? [copier(() => turn.text)] : [];
  const button = make('button', {type: 'button', className: 'again', textContent: 'Try again', onclick: () => retry(turn)});
  const error = `${turn.error}${turn.text ? ' What had come is kept.' : ''}`;
  if (turn.error) turn.node.append(make('p', {className: 'error'}, error));
  turn.node.append(make('div', {className: 'summary'}, ...copy, button, make('p', {}, ...parts)));
  $('status').textContent = turn.error ?? (turn.finish === 'stopped' ? 'Stopped' : `Answer: ${turn.text}`);
}

function showFigure(name, text) {
  $(name).textContent = text || '–';
  for (const brief of document.querySelectorAll(`[data-show="${name}"]`)) brief.textContent = text;
}

function figures() {
  const price = settings.price.valueAsNumber;
  const share = server.context ? contextTokens() / server.context : 0;
  const last = (figure) => activeTurns().findLast((turn) => turn[figure])?.[figure];
  showFigure('context', server.context ? `${count(contextTokens())} of ${count(server.context)}` : count(contextTokens()));
  showFigure('speed', last('speed') && pace(last('speed')));
  showFigure('first', last('wait') && seconds(last('wait')));
  showFigure('cost', spent && price >= 0 ? money(price * spent / 3.6e6) : '');
  showFigure('time', spent && seconds(spent));
  showFigure('resent', plural(turns.reduce((sum, turn) => sum + (turn.resent ?? 0), 0), 'token'));
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
    showFigure('digest', `${short(weights.changed ?? now.digest)}…`);
    $('digest').title = weights.changed ?? now.digest;
    $('checked').textContent = `SHA-256 of every weight, taken at the start and ${plural(weights.checks, 'time')} since.`;
  }
  const state = weights.changed ? 'changed' : now ? 'same' : 'unknown';
  $('weights').className = state;
  const sentences = {changed: '✗ CHANGED since start', same: '✓ unchanged since start', unknown: 'could not be checked'};
  showFigure('weights', sentences[state]);
  if (!weights.changed) return;
  warn(`The weights have changed: ${short(weights.first)} at the start, then ${short(weights.changed)}. `
    + 'Answers come from another model than at first.');
}

function warn(text) {
  $('alert').textContent = text;
  $('alert').hidden = !text;
}
