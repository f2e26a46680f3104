'use strict';
// The chapters of the page. Each function fills one section from the state, or says in a sentence what the recording lacks.

const law = (...names) => make('p', {className: 'law'}, 'Held by ', names.flatMap((name, at) => [at ? ' and ' : '', make('code', {}, name)]));

// Fills a section. Without contents it says why it is empty; on a live page, where more may come, it is hidden.
function fill(id, lack, contents) {
  $(id).closest('section').hidden = !contents && Boolean(state.recording.live);
  $(id).replaceChildren(...(contents ?? [make('p', {className: 'absent'}, lack)]));
}
const lacks = () => (state.recording.live ? 'The first frame is on its way.' : isAnswering() ? 'Nothing was asked in this recording.'
  : `This recording has no frame of this life: ${LIVES[chosen()].name}.`);

function drawWeights() {
  const {of, frame} = shown();
  const {title, lead, say: sentence, laws} = LIVES[chosen()];
  $('weights-title').textContent = title;
  $('weights-lead').textContent = lead;
  $('changed').textContent = '';
  $('changed-of').textContent = frame ? '' : lacks();
  $('changed-more').replaceChildren();
  drawModel();
  if (!frame) return $('weights').replaceChildren();
  const {begin} = of;
  if (isAnswering()) {
    const {changed, of: all, asked, before, after} = answers();
    $('changed').textContent = count(changed);
    $('changed-of').textContent = `of ${count(all)} weights changed in ${count(asked)} answers`;
    $('changed-more').append('SHA-256 before ', make('code', {id: 'before'}, before), make('br'), 'SHA-256 after ', make('code', {id: 'after'}, after));
  } else {
    const {trainable, params} = begin;
    const frozen = params - trainable;
    const what = !frozen ? 'weights' : state.way === 'lora' ? 'numbers in the strips' : 'weights that train';
    const late = state.frame > 4 && frame.changed < trainable;
    $('changed').textContent = count(frame.changed);
    $('changed-of').textContent = `of ${count(trainable)} ${what} changed since the frame before`;
    $('changed-more').append(frozen ? `${count(frame.frozen_changed)} of ${count(frozen)} frozen weights changed. ` : '',
      state.frame ? '' : 'There is no frame before this one. ', late ? 'The others hold the very number that they held. ' : '',
      'SHA-256 ', make('code', {}, `${frame.digest.slice(0, 16)}…`));
  }
  $('weights').replaceChildren(say(sentence), ...(isAnswering() ? [] : [say(['Why some stand still in the first frames: ', WHY[0].toLowerCase(), WHY.slice(1)])]), law(...laws),
    asTable('every tensor at this frame', $('backward').textContent, ['tensor', 'shape', 'trains', 'full colour at', 'gradient norm'], () => begin.tensors.map(({path, shape, trainable}) => [
      path, shape.join(' × '), trainable && !isAnswering() ? 'yes' : 'no', round(frame.limits[path]), isAnswering() ? '–' : round(frame.gradient_norms?.[path])])));
}

const card = (title, ...contents) => make('div', {className: 'card'}, make('h3', {}, title), contents);
const exchange = ({prompt, text}) => [make('b', {}, prompt), '\n', text];

function drawText() {
  const of = life();
  const frame = frames()[state.frame];
  $('text-title').textContent = isAnswering() ? 'It answers, and is the same model afterwards' : state.life === 'train' ? 'From noise to words' : 'The same beginning, before and after';
  if (!frame) return fill('text', lacks());
  if (isAnswering()) {
    const {asked, tokens, seconds, answers: all} = answers();
    return fill('text', '', [make('p', {className: 'sample'}, exchange(frame)), say(`One of ${count(asked)} answers: ${count(tokens)} tokens in ${round(seconds)} seconds.`),
      asTable('answers', 'What was asked, and what was answered.', ['number', '.question', '.answer'], all.map((each, at) => [at + 1, each.prompt, each.text]))]);
  }
  fill('text', '', [
    ...(of.after === undefined ? [] : [make('div', {className: 'panels two'}, card('Before fine-tuning', make('p', {}, of.before ?? '–')), card('After it', make('p', {}, of.after)))]),
    make('p', {className: 'sample'}, make('b', {}, of.begin.prompt ?? ''), state.life === 'train' ? '' : '\n', frame.sample ?? ''),
    say('The model is given the grey beginning and writes on, always with the token that it finds most likely. The beginning is the same in every frame; the weights alone differ.'),
    asTable('the text of every frame', 'The text after each recorded step.', ['step', '.text'], of.frames.map((each) => [each.step, each.sample]))]);
}

let curves = [];
const NAMES = {loss: 'error (loss)', grad_norm: 'gradient norm', learning_rate_factor: 'learning rate, of its largest', tokens_per_second: 'tokens a second', quick_val_bits_per_byte: 'bits per byte, on other text'};

// Small multiples of all that the run wrote down. A frame moves only their dots.
function drawCurves() {
  const {steps = [], validation = []} = (!isAnswering() && life()) || {};
  const series = {};
  for (const {event, step, seconds, ...values} of [...steps, ...validation]) {
    for (const [name, value] of Object.entries(values)) if (finite(value)) (series[name] ??= []).push([step, value]);
  }
  curves = Object.entries(series).filter(([, points]) => points.some((point) => point[1])).map(([name, points]) => {
    const value = make('b');
    const title = NAMES[name] ?? name.replaceAll('_', ' ');
    return {points, value, title, figure: make('figure', {}, make('h3', {}, title, value))};
  });
  $('curves').closest('section').hidden = !curves.length;
  $('curves').replaceChildren(make('div', {className: 'panels'}, curves.map((curve) => curve.figure)),
    say('From left to right are the steps; the dot is at the frame that is shown. Bits per byte say how well the model guesses a text that it never trains on: fewer are better.'),
    asTable('every recorded line', 'What the run wrote down.', ['step', ...curves.map((curve) => curve.title)], () => [...new Set([...steps, ...validation].map((event) => event.step))].sort((a, b) => a - b)
      .map((step) => [step, ...curves.map((curve) => round(curve.points.find((point) => point[0] === step)?.[1]))])));
  for (const curve of curves) {
    curve.chart = curveChart(curve.points, curve.figure.clientWidth || 300, 140, `${curve.title}, from ${round(curve.points[0][1])} to ${round(curve.points.at(-1)[1])}.`);
    curve.figure.append(curve.chart);
  }
}

function moveCurves() {
  const step = state.recording.live ? Infinity : frames()[state.frame]?.step;
  for (const curve of curves) curve.value.textContent = round(curve.chart.show(step));
}

let memories = [];

// The life that is shown beside the other side of the thesis: a training step beside answering, or a fine-tuning step beside training.
function drawMemory() {
  const all = Object.entries({...state.recording.lives, answer: answers()}).filter(([, each]) => each?.memory).map(([name, each]) => [name, each.memory]);
  memories = [];
  if (!all.length) return fill('memory', 'The memory of a step was not recorded.');
  const top = Math.max(...all.flatMap(([, memory]) => sums(memory)));
  const cache = (isAnswering() && answers()?.cache_bytes) || [];
  const names = {train: ['train', 'answer'], answer: cache.length ? ['answer'] : ['train', 'answer']}[chosen()] ?? [chosen(), 'train'];
  const side = all.filter(([name]) => names.includes(name)).sort(([name]) => (name === chosen() ? -1 : 1));
  const of = side.length || cache.length ? side : all.slice(0, 1);
  const peak = (memory) => si(Math.max(...sums(memory)), 'B');
  const panel = (title, note) => make('figure', {}, make('h3', {}, title, make('b', {}, note)));
  const panels = of.map(([name, memory]) => panel(LIVES[name].name, `peak ${peak(memory)}`));
  if (cache.length) panels.push(panel('KV cache of one request', si(Math.max(...cache), 'B')));
  const kinds = Object.keys(KINDS).filter((kind) => of.some(([, memory]) => memory.bytes[kind]?.some(Boolean)));
  fill('memory', '', [make('div', {className: 'panels two'}, panels), legend(kinds.map((kind) => [KINDS[kind], make('strong', {}, kind), `: ${KIND_WORDS[kind]}`])),
    say(isAnswering() ? 'Answering holds the weights and a KV cache, which grows by the same few bytes with every token and is dropped when the answer ends.'
      : 'In training, what each layer computes piles up on the way forward and is eaten in reverse order on the way back; answering keeps none of it. All pictures of a step have one height scale, and are drawn from the program that the compiler, XLA, made.'),
    law('tests/counting/test_memory.py', 'tests/laws/test_forward_only.py'),
    asTable('what is held at the peak', 'Memory at the peak of one step.', ['life', ...Object.keys(KINDS), 'peak'], () => all.map(([name, memory]) => {
      const total = sums(memory);
      const at = total.indexOf(Math.max(...total));
      return [LIVES[name].name, ...Object.keys(KINDS).map((kind) => si(memory.bytes[kind]?.[at], 'B')), peak(memory)];
    }))]);
  const width = panels[0].clientWidth || 300;
  memories = of.map(([, memory]) => memoryChart(memory, top, width));
  if (cache.length) {
    const last = Math.ceil(cache.length * 1.1) + 1;
    const chart = curveChart([...cache, 0].map((bytes, at) => [at + 1, bytes]).concat([[last, 0]]), width, 240, 'The KV cache grows with each token and is dropped at the end.', (bytes) => si(bytes, 'B'));
    memories.push({node: chart, show: (phase) => chart.show(phase * last)});
  }
  memories.forEach((chart, at) => panels[at].append(chart.node ?? chart));
}

const BARS = {counted_ratio: 'blue', time_ratio: 'amber'};

function drawCost() {
  const {cost = [], predicted = [], price, watts} = state.recording;
  if (!cost.length) return fill('cost', 'The cost of a token was not measured in this recording.');
  const name = (row) => LIVES[row.stage].name;
  const onPaper = (row) => predicted[LIVES[row.stage].predicted];
  const longest = Math.max(...cost.flatMap((row) => [row.counted_ratio, row.time_ratio]), ...predicted);
  const share = (ratio) => `${100 * ratio / longest}%`;
  const bars = make('div', {className: 'bars', role: 'img', ariaLabel: 'Operations and seconds of a token, beside those of answering, as in the table below.'}, cost.map((row) => make('div', {}, make('span', {}, name(row)),
    make('div', {}, Object.entries(BARS).map(([key, colour]) => {
      const bar = make('i', {style: `color: var(--${colour}); width: ${share(row[key] ?? 0)}`});
      return make('p', {}, bar, `${times(row[key])} ×`);
    }), make('u', {style: `left: ${share(onPaper(row))}`})))));
  const bill = make('div');
  const field = (id, text, value) => make('label', {}, text, make('input', {id, type: 'number', min: 0, step: 'any', value: value ?? '', placeholder: 'not known', oninput: drawBill}));
  const inputs = make('div', {className: 'prices'}, field('price', 'Dollars an hour of this machine', price), field('watts', 'Watts that it draws', watts));
  function drawBill() {
    const [dollars, draws] = [...inputs.querySelectorAll('input')].map((input) => (input.value === '' || input.valueAsNumber < 0 ? NaN : input.valueAsNumber));
    const million = (row, each) => round(row.seconds_per_token * 1e6 / 3600 * each);
    bill.replaceChildren(table(`What one token costs: operations (multiplications and additions) and seconds, both measured; × is beside answering. On paper it is ${predicted.join(' : ')}. Dollars and watt-hours are for a million tokens.`,
      ['life', '.passes', 'operations', '×', 'seconds', '×', 'on paper', 'memory', 'dollars', 'watt-hours'], cost.map((row) => [name(row), row.passes, si(row.flops_per_token, ''), times(row.counted_ratio),
        si(row.seconds_per_token, 's'), times(row.time_ratio), onPaper(row), si(row.bytes, 'B'), million(row, dollars), million(row, draws)])));
  }
  drawBill();
  fill('cost', '', [bars, legend([['blue', 'operations, counted'], ['amber', 'seconds, measured'], ['ink', 'on paper']]),
    say('Forward is one, and backward is two more: one to find how the error changes with each layer’s input, one for the weights themselves. A frozen half spares half of both, LoRA nearly all of the second. The update and reading from memory come on top, so that seconds are not quite operations.'),
    law('tests/counting/test_flops.py', 'tests/counting/test_xla.py'), inputs, bill]);
}

// Two requests side by side. The context of the first can be edited, and it can be closed.
function drawRequests() {
  const all = answers()?.independent ?? [];
  if (!all.length) return fill('requests', 'No requests were asked side by side in this recording.');
  const [first, second] = all.filter((each) => !each.edited);
  const states = {'Edit its context': all.find((each) => each.edited), 'Close it': {prompt: '', text: 'Closed: its text and its KV cache are gone. Nothing of it is left in the model, and the other request never saw it.'}};
  const node = make('p', {ariaLive: 'polite'});
  const buttons = Object.entries(states).filter(([, request]) => request).map(([text, request]) => make('button', {type: 'button', onclick: ({target}) => {
    const on = target.ariaPressed !== 'true';
    for (const button of buttons) button.ariaPressed = on && button === target;
    show(on ? request : first);
  }}, text));
  const show = (request) => node.replaceChildren(...exchange(request));
  show(first);
  fill('requests', '', [make('div', {className: 'panels two'}, card('One request', node, make('div', {className: 'buttons small'}, buttons)), second ? card('Another one, at the same time', make('p', {}, exchange(second))) : ''),
    say('The same weights answer both at the same time, and neither knows of the other: change the words that one sends, and its answer changes; close it, and it is gone.'),
    law('tests/laws/test_forward_only.py', 'tests/promises/test_no_leaks.py'),
    asTable('all requests', 'What was sent, and what came back.', ['request', '.sent', '.answer'], all.map((each, at) => [each.edited ? '1, edited' : at + 1, each.prompt, each.text]))]);
}

function drawMade() {
  const {circumstances = {}, lives, live} = state.recording;
  const plain = (value) => (value && typeof value === 'object' ? Object.entries(value).map(([name, each]) => `${name} ${plain(each)}`).join(', ') : value);
  $('questions').replaceChildren(...questions().map(([question, answer]) => make('div', {}, make('dt', {}, question), make('dd', {}, rich(answer)))));
  fill('made', '', [make('p', {className: 'say'}, live ? 'This page is fed by a run that goes on now.' : 'Every figure is of one recording of one real model. The page computes nothing anew and asks no network.'),
    ...(live ? [] : [make('p', {className: 'say'}, make('a', {href: 'train.html'}, 'Train it here'), ', in the file beside this page: a model of 202,176 weights learns a text of yours.')]),
    make('pre', {}, Object.values(lives).map((each) => each?.command ?? each?.begin?.command).filter(Boolean).join('\n')),
    make('p', {className: 'quiet'}, Object.entries(circumstances).map(([name, value]) => `${name.replaceAll('_', ' ')}: ${plain(value)}`).join(' · '))]);
}
