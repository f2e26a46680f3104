'use strict';
// The chapters of the page. Each function fills one section from the state, or says in a sentence what the recording lacks.

// A text in which **words** stand out.
const rich = (text) => text.split('**').map((part, at) => (at % 2 ? make('b', {}, part) : part));

// The tests that prove a picture, by name; the code of each opens below it, and stays open when the picture is drawn again.
const law = (...names) => opened[names] ??= make('div', {className: 'law'}, 'Proved by ', names.map((name) => {
  const code = state.recording.laws?.[name];
  const shown = make('code', {}, name);
  return code ? make('details', {}, make('summary', {}, shown), make('pre', {tabIndex: 0}, code)) : shown;
}));

// Fills a section. Without contents it says why it is empty; on a live page, where they may still come, it is hidden.
function fill(id, lack, ...contents) {
  $(id).closest('section').hidden = !contents.length && Boolean(state.recording.live);
  $(id).replaceChildren(...(contents.length ? contents : [make('p', {className: 'absent'}, lack)]));
}
function lack() {
  if (state.recording.live) return life()?.measure || life()?.end ? SAY.unseen : 'The first frame is on its way.';
  if (isAnswering()) return 'Nothing was asked in this recording.';
  return `This recording has no frame of this life: ${LIVES[chosen()].name}.`;
}

// What changed, in numbers: the count, what it is of, and more.
function counter(begin, frame) {
  if (!frame) return ['', lack(), []];
  if (isAnswering()) {
    const {asked, before, after, changed, of} = answers();
    return [count(changed), `of ${count(of)} weights changed in ${count(asked)} answers`,
      ['SHA-256 before ', make('code', {id: 'before'}, before), make('br'), 'SHA-256 after ', make('code', {id: 'after'}, after)]];
  }
  const frozen = begin.params - begin.trainable;
  const what = !frozen ? 'weights' : state.way === 'lora' ? 'numbers in the strips' : 'weights that train';
  return [count(frame.changed), `of ${count(begin.trainable)} ${what} changed since the frame before`, [
    state.frame ? '' : 'There is no frame before this one. ',
    state.frame > 4 && frame.changed < begin.trainable ? `The others stand still: ${frozen ? '' : 'their token did not occur, or '}their move was too small to change any bit. ` : '',
    frozen ? `${count(frame.frozen_changed)} of ${count(frozen)} frozen weights changed. ` : '',
    'Fingerprint of all bits (SHA‑256) ', make('code', {}, `${frame.digest.slice(0, 16)}…`)]];
}

function drawWeights() {
  const {of, index, frame} = shown();
  const {title, lead, say: sentence, laws} = LIVES[chosen()];
  const [changed, outOf, more] = counter(of?.begin, frame);
  for (const [id, text] of Object.entries({'weights-title': title, 'weights-lead': lead, changed, 'changed-of': outOf})) $(id).textContent = text;
  $('changed-more').replaceChildren(...more);
  drawModel();
  if (!frame) return $('weights').replaceChildren();
  const norms = normsOf(of, index);
  const row = ({path, shape, trainable}) => {
    const trains = trainable && !isAnswering();
    return [path, shape.join(' × '), trains ? 'yes' : 'no', trains ? count(frame.changed_in?.[path] ?? 0) : '0',
      round(frame.limits[path]), trains ? round(norms[path]) : '–'];
  };
  $('weights').replaceChildren(say(sentence), isAnswering() ? '' : say(STILL), law(...laws),
    asTable('every matrix at this frame', $('backward').textContent,
      ['matrix', 'shape', 'trains', 'changed', 'full colour at', 'gradient norm'], () => of.begin.tensors.map(row)));
}

const card = (title, ...contents) => make('div', {className: 'card'}, make('h3', {}, title), contents);
const exchange = ({prompt, text}) => [make('b', {}, prompt), /^\s/.test(text) ? '' : '\n', text];

function drawText() {
  const frame = frames()[state.frame];
  const isTraining = state.life === 'train';
  $('text-title').textContent = isAnswering() ? 'It answers, and is the same model afterwards'
    : isTraining ? 'From noise to words' : 'The same question, before and after';
  if (!frame) return fill('text', lack());
  if (isAnswering()) {
    const {asked, tokens, seconds, answers: all} = answers();
    return fill('text', '', make('p', {className: 'sample'}, exchange(frame)),
      say(`${all.length} of ${count(asked)} answers can be read here; all are ${count(tokens)} tokens, written in ${round(seconds)} seconds.`));
  }
  const {begin, frames: all} = life();
  const text = frame.sample ?? '';
  fill('text', '',
    make('div', {className: 'panels two'},
      make('p', {className: 'sample'}, make('b', {}, begin.prompt ?? ''), isTraining ? text : `\n${text.trim()}`),
      isTraining ? '' : card('Before', make('p', {}, all[0].sample?.trim() ?? '–'))),
    say(SAY.text), law(RECORDED[1]),
    asTable('the text of every frame', 'The text after each recorded step.', ['step', '.text'],
      () => all.map(({step, sample}) => [step, sample])));
}

let curves = [];
const NAMES = {
  loss: 'error (loss)', grad_norm: 'gradient norm', learning_rate_factor: 'next learning rate, of its largest',
  tokens_per_second: 'tokens a second', quick_val_bits_per_byte: 'bits per byte, on other text',
  val_nats_per_token: 'error on other text',
};

// Small multiples of all that the run wrote down. Another frame moves only their dots.
function drawCurves() {
  const {steps = [], validation = []} = (!isAnswering() && life()) || {};
  const series = {};
  for (const {event, step, seconds, ...values} of [...steps, ...validation]) {
    for (const [name, value] of Object.entries(values)) if (finite(value)) (series[name] ??= new Map()).set(step, value);
  }
  curves = Object.entries(series).filter(([, points]) => [...points.values()].some(Boolean)).map(([name, points]) => {
    const [title, value] = [NAMES[name] ?? name.replaceAll('_', ' '), make('b')];
    return {title, value, points, figure: make('figure', {}, make('h3', {}, title, value))};
  });
  $('curves').closest('section').hidden = !curves.length;
  const [first, last] = [0, -1].map((at) => [...series.loss?.values() ?? []].at(at));
  $('curves-title').textContent = first > last ? `The error falls from ${times(first)} to ${times(last)}` : 'The run in numbers';
  const rows = () => [...new Set(curves.flatMap((curve) => [...curve.points.keys()]))].sort((a, b) => a - b)
    .map((step) => [step, ...curves.map((curve) => round(curve.points.get(step)))]);
  $('curves').replaceChildren(
    make('div', {className: 'panels'}, curves.map((curve) => curve.figure)), say(SAY.curves),
    asTable('the recorded lines', 'What the run wrote down; of a long run, some of its lines.', ['step', ...curves.map((curve) => curve.title)], rows));
  for (const curve of curves) {
    curve.chart = curveChart([...curve.points], curve.figure.clientWidth || 300, 140, `${curve.title} over the steps`);
    curve.figure.append(curve.chart);
  }
  moveCurves();
}

function moveCurves() {
  const step = state.recording.live ? Infinity : frames()[state.frame]?.step;
  for (const curve of curves) curve.value.textContent = round(curve.chart.show(step));
}

let memories = [];

// A step of the life that is shown beside the other side: training beside answering, fine-tuning beside training, and answering
// beside the KV cache of a request.
function drawMemory() {
  const steps = {...state.recording.lives, answer: answers()};
  const all = Object.keys(LIVES).filter((name) => steps[name]?.memory);
  memories = [];
  if (!all.length) return fill('memory', 'The memory of a step was not recorded.');
  const memory = (name) => steps[name].memory;
  const top = (name) => Math.max(...sums(memory(name)));
  const cache = (isAnswering() && answers()?.cache_bytes) || [];
  const beside = cache.length ? null : state.life === 'train' ? 'answer' : 'train';
  const pair = [chosen(), beside].filter((name) => all.includes(name));
  const panel = (title, note) => make('figure', {}, make('h3', {}, title, make('b', {}, note)));
  const panels = pair.map((name) => panel(LIVES[name].name, `peak ${si(top(name), 'B')}`));
  if (cache.length) panels.push(panel('KV cache of one request', si(Math.max(...cache), 'B')));
  fill('memory', '', make('div', {className: 'panels two'}, panels),
    memoryLegend(pair.map(memory)), say(isAnswering() ? SAY.cache : SAY.step),
    law('tests/bench/test_memory.py::test_training_climbs_through_forward_and_comes_down_through_backward',
      'tests/bench/test_memory.py::test_inference_keeps_nothing'),
    peakTable('Memory at the peak of one step.', all.map((name) => [LIVES[name].name, memory(name)])));
  const width = panels[0]?.clientWidth || 300;
  memories = pair.map((name) => memoryChart(memory(name), Math.max(...all.map(top)), width));
  if (cache.length) memories.push(cacheChart(cache, width));
  memories.forEach((chart, at) => panels[at].append(chart));
}

// The KV cache of one request: it grows with each token, and is dropped at the end.
function cacheChart(cache, width) {
  const points = [...cache.map((bytes, at) => [at + 1, bytes]), [cache.length + 1, 0], [Math.ceil(cache.length * 1.1) + 1, 0]];
  const chart = curveChart(points, width, 240, 'The KV cache after each token', (bytes) => si(bytes, 'B'));
  const {show} = chart;
  chart.show = (phase) => show(phase * points.at(-1)[0]);
  return chart;
}

function drawCost() {
  const {cost = [], predicted = [], flags} = state.recording;
  if (!cost.length) return fill('cost', 'The cost of a token was not measured in this recording.');
  const name = (row) => LIVES[row.stage].name;
  const rule = (row) => predicted[LIVES[row.stage].predicted];
  const bar = (ratio, colour) => ({parts: [[colour, ratio ?? 0]], text: `${times(ratio)} ×`});
  const bill = make('div');
  const field = (id, text) => make('label', {}, text, make('input',
    {id, type: 'number', min: 0, step: 'any', value: flags?.[id] ?? '', placeholder: 'not known', oninput: drawBill}));
  const inputs = make('div', {className: 'prices'}, field('price', 'Dollars an hour of this machine'), field('watts', 'Watts that it draws'));
  function drawBill() {
    const hourly = [...inputs.querySelectorAll('input')].map((input) => input.valueAsNumber);
    const million = (row) => hourly.map((each) => round(row.seconds_per_token * 1e6 / 3600 * each));
    bill.replaceChildren(table(SAY.bill,
      ['life', '.passes', 'operations', '×', 'seconds', '×', 'rule of thumb', 'dollars', 'watt-hours'],
      cost.map((row) => [name(row), row.passes, si(row.flops_per_token, ''), times(row.counted_ratio),
        si(row.seconds_per_token, 's'), times(row.time_ratio), rule(row) ?? '–', ...million(row)])));
  }
  drawBill();
  fill('cost', '',
    barChart('The cost of a token, as in the table below', cost.map((row) =>
      ({name: name(row), bars: [bar(row.counted_ratio, 'blue'), bar(row.time_ratio, 'amber')], mark: rule(row)}))),
    legend([['blue', 'operations, counted'], ['amber', 'seconds, measured'], ['ink', 'rule of thumb']]), say(SAY.cost),
    law('tests/counting/test_flops.py::test_forward_is_a_third_of_training', 'tests/bench/test_lives.py::test_costs_are_near_what_counting_predicts'),
    inputs, bill);
}

// Two requests side by side. The context of the first can be edited, and it can be closed.
function drawRequests() {
  const all = answers()?.independent ?? [];
  if (!all.length) return fill('requests', 'No requests were asked side by side in this recording.');
  const [first, second] = all.filter((each) => !each.edited);
  const edited = all.find((each) => each.edited);
  const node = make('p', {ariaLive: 'polite'}, exchange(first));
  const button = (text, request) => make('button', {type: 'button', ariaPressed: false, onclick: ({target}) => {
    const on = target.ariaPressed === 'false';
    for (const each of buttons) each.ariaPressed = on && each === target;
    node.replaceChildren(...exchange(on ? request : first));
  }}, text);
  const buttons = [button('Edit its context', edited), button('Close it', {prompt: '', text: SAY.closed})];
  fill('requests', '',
    make('div', {className: 'panels two'}, card('One request', node, make('div', {className: 'buttons small'}, buttons)),
      card('Another one, at the same time', make('p', {}, exchange(second)))),
    say(SAY.requests + (answers().same_alone ? SAY.alone : '')), law(SERVED, ASKED));
}

function drawMade() {
  const {machine, commit, date, load, versions, lives, live} = state.recording;
  $('questions').replaceChildren(...questions().map(([question, answer]) =>
    make('div', {}, make('dt', {}, question), make('dd', {}, rich(answer)))));
  if (live) return fill('made', ''); // its command is above
  fill('made', '', make('pre', {}, Object.values(lives).map((each) => each?.command ?? each?.begin?.command).filter(Boolean).join('\n')),
    make('p', {className: 'quiet'}, inline({machine, commit, date, load, versions})));
}
