'use strict';
// Draws the cost of the conversation, and checks that the weights are those of the start.

const count = (number) => number.toLocaleString('en');
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? '' : 's'}`;
const seconds = (ms) => `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
const money = (dollars) => dollars.toLocaleString('en', {style: 'currency', currency: 'USD', maximumSignificantDigits: 2});
const pace = (speed) => `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`;
const brief = (number) => number.toLocaleString('en', {maximumSignificantDigits: 2});
const operations = (flop) => {
  const thousands = Math.min(Math.floor(Math.log10(flop) / 3), 6);
  return `${(flop / 1000 ** thousands).toPrecision(3)} ${' kMGTPE'[thousands]}FLOP`;
};
const short = (digest) => digest.slice(0, 12);
const weights = {checks: 0};  // and the digest at first, and that of a change

function showFigure(name, text) {
  $(name).textContent = text || '–';
  for (const brief of document.querySelectorAll(`[data-show="${name}"]`)) brief.textContent = text;
}

function drawFigures() {
  const price = settings.price.valueAsNumber;
  const share = server.context ? contextTokens() / server.context : 0;
  showFigure('context', count(contextTokens()) + (server.context ? ` of ${count(server.context)}` : ''));
  showFigure('cost', spent && price >= 0 ? money(price * spent / 3.6e6) : '');
  showFigure('time', spent && seconds(spent));
  showFigure('resent', plural(turns.reduce((sum, turn) => sum + (turn.resent ?? 0), 0), 'token'));
  const call = openCall();
  $('ask').placeholder = call ? `What ${call.name} returned` : 'Write a message';
  $('meter').ariaValueNow = Math.round(share * 100);
  for (const meter of document.querySelectorAll('.meter')) {
    meter.firstChild.style.width = `${Math.min(share, 1) * 100}%`;
    meter.classList.toggle('near', share > 0.9);
  }
}

// Shows what serving has computed so far, beside what it took to train the model where its run says that.
async function drawServed() {
  const {data} = await get('/v1/models').then((reply) => reply.json()).catch(() => ({}));
  const {served_flops: served, training_flops: training} = data?.[0] ?? {};
  const share = training ? `, ${brief(100 * served / training)}% of the ${operations(training)} of training` : '';
  showFigure('served', served && operations(served) + share);
}

async function checkWeights() {
  const now = await get('/v1/attestation').then((reply) => reply.ok ? reply.json() : null).catch(() => null);
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
  warn('weights', `The weights have changed: ${short(weights.first)} at the start, then ${short(weights.changed)}. `
    + 'Answers come from another model than at first.');
}
