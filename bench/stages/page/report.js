'use strict';
// The chapters of the stage table's page, from the document that `python -m bench` writes. A chapter without numbers is left out.

const report = readDocument();
const rows = (report?.rows ?? []).filter(({name}) => name);
const row = (name) => rows.find((each) => each.name === name);
const flops = (each) => each.flops_per_token ?? {};
const trained = rows.find((each) => flops(each).dw > 0);
const served = rows.filter((each) => each.stage === 'decode' && each.slots > 0 && each.seconds_per_token > 0);
const isPositive = (...numbers) => numbers.every((number) => finite(number) && number > 0);
const COUNTED = [['forward', 'blue', 'forward'], ['dx', 'amber', 'backward to the inputs (dX)'], ['dw', 'rust', 'backward to the weights (dW)'], ['optimizer', 'grey', 'optimizer']];
const capital = (text) => text[0].toUpperCase() + text.slice(1);

// Adds a chapter; an array in `contents` is spread. A function in it is called with the width that there is, once it can be known.
function chapter(title, ...contents) {
  const section = make('section', {}, make('h2', {}, title));
  document.querySelector('main').append(section);
  for (const each of contents.flat()) section.append(typeof each === 'function' ? each(section.clientWidth || 640) : each);
}
const example = (text) => say(make('b', {}, 'An example. '), text);

// Buttons of which one is pressed, and what `draw` makes of that one's name below them.
function switchOf(options, draw) {
  const below = make('div');
  const buttons = options.map(([name, text]) => make('button', {type: 'button', ariaPressed: false, onclick: () => choose(name)}, text));
  function choose(name) {
    buttons.forEach((button, at) => { button.ariaPressed = options[at][0] === name; });
    below.replaceChildren(...[draw(name)].flat());
  }
  choose(options[0][0]);
  return [make('div', {className: 'buttons small ways', role: 'group', ariaLabel: 'Which is shown'}, buttons), below];
}

function glance() {
  const priced = served.filter((each) => isPositive(each.usd_per_million_tokens)).sort((a, b) => a.usd_per_million_tokens - b.usd_per_million_tokens);
  const figures = [
    [trained?.flop_ratio_to_forward, times, `times the operations of a forward pass: ${trained?.name}`],
    [trained?.time_ratio_to_forward, times, 'times its time, optimizer included'],
    [trained && served[0] && served[0].seconds_per_token / trained.seconds_per_token, times, `times the time of a token trained on: ${served[0]?.name}`],
    [priced[0]?.usd_per_million_tokens, money, `a million tokens: ${priced[0]?.name}; ${priced.at(-1)?.name}: ${money(priced.at(-1)?.usd_per_million_tokens)}`],
  ].filter(([number]) => isPositive(number));
  if (figures.length) document.querySelector('main').append(make('dl', {className: 'glance'}, figures.map(([number, write, text]) => make('div', {}, make('dt', {}, text), make('dd', {}, write(number))))));
}

function memoryOverTime() {
  const programs = Object.entries(report.memory ?? {});
  if (!programs.length) return;
  const peaks = programs.map(([, memory]) => Math.max(...sums(memory)));
  const figures = programs.map(([name], at) => make('figure', {}, make('h3', {}, name, make('b', {}, `peak ${si(peaks[at], 'B')}`))));
  chapter('Training climbs and comes down; inference is flat', make('div', {className: 'panels two'}, figures),
    memoryLegend(programs.map(([, memory]) => memory)),
    say('From left to right a program runs once; the height is the memory that it holds at that moment, to one scale in all pictures. What forward keeps for backward (residuals) piles up and is eaten in reverse; the update then changes the weights. Inference is forward alone, and keeps nothing. Beside each weight that trains lie the optimizer’s two numbers; frozen weights, and those of inference, are there in the type of the computation alone.'),
    peakTable('Read from the program that XLA, the compiler, made, and its own assignment of memory.', programs));
  const charts = programs.map(([, memory], at) => memoryChart(memory, Math.max(...peaks), figures[at].clientWidth || 300));
  charts.forEach((chart, at) => figures[at].append(chart));
}

function operations() {
  const bars = rows.filter((each) => isPositive(flops(each).formula, each.flop_ratio_to_forward)).map((each) => {
    const unit = flops(each).formula / each.flop_ratio_to_forward;
    return {name: each.name, bars: [{text: `${times(each.flop_ratio_to_forward)} ×`, parts: COUNTED.map(([key, colour]) => [colour, (flops(each)[key] ?? 0) / unit])}]};
  });
  if (!bars.length) return;
  chapter(trained ? `Training takes ${times(trained.flop_ratio_to_forward)} times the operations of a forward pass` : 'The operations of each stage',
    barChart('Operations of each stage, as in the table of stages', bars), legend(COUNTED.map(([, colour, name]) => [colour, name])),
    say('Operations for one token, in forward passes. What a stage adds to its forward pass is how the error changes with what each layer was given (dX) and with its weights (dW). The optimizer works once a step on each weight that trains; over a step’s tokens it hardly shows.'));
}

function layers() {
  const ways = rows.filter((each) => each.layers?.length);
  if (!ways.length) return;
  const draw = (name) => {
    const {layers: all} = row(name);
    const bars = all.map((parts, at) => ({name: at === all.length - 1 ? 'head' : `block ${at}`, bars: [{text: si(parts[0] + parts[1] + parts[2], 'FLOP'), parts: parts.map((size, pass) => [COUNTED[pass][1], size])}]}));
    return [barChart(`Operations by layer: ${name}`, bars.reverse())];
  };
  chapter('Backward skips what lies below the lowest weight that trains', ...switchOf(ways.map((each) => [each.name, each.name]), draw),
    legend(COUNTED.slice(0, 3).map(([, colour, name]) => [colour, name])),
    say('Layer by layer, the head on top, the first block at the bottom. What is frozen needs no dW; below the lowest weight that trains nothing is computed going back.'));
}

const CEILINGS = {float32: 'f32_gflops', int8: 'int8_gflops'};

function roofline() {
  const {ceilings = {}, model = {}} = report;
  const [peak, bandwidth] = [1e9 * ceilings[CEILINGS[model.dtype] ?? 'bf16_gflops'], 1e9 * ceilings.read_gbs];
  const points = rows.filter((each) => each.stage !== 'by hand' && !each.series && isPositive(flops(each).formula, each.bytes_per_token, each.seconds_per_token))
    .map((each) => ({each, at: [flops(each).formula / each.bytes_per_token, flops(each).formula / each.seconds_per_token]})).sort((a, b) => a.at[0] - b.at[0]);
  if (!isPositive(peak, bandwidth) || !points.length) return;
  const corner = peak / bandwidth;
  const limit = (intensity) => Math.min(peak, intensity * bandwidth);
  const across = {name: 'operations for each byte', format: (value) => round(value), ...widen([corner, ...points.map(({at}) => at[0])], 3)};
  const up = {name: 'operations a second', format: (value) => si(value, ''), ...widen([peak, limit(across.low), ...points.map(({at}) => at[1])], 2)};
  const dots = points.map(({each, at}, number) => ({at, kind: flops(each).dw || flops(each).dx ? 'both' : 'way0', text: String(number + 1)}));
  const roof = [across.low, corner, across.high].map((intensity) => [intensity, limit(intensity)]);
  const lone = points[0];
  chapter(lone.at[0] < corner && points.at(-1).at[0] > corner ? 'Decoding waits for memory, training for the processor' : 'How near each stage comes to what the machine can do',
    (width) => logChart(width, 'Operations a second against operations for each byte', across, up, {lines: [{points: roof, kind: 'roof'}], dots}),
    legend([['rust', 'forward and backward'], ['blue', 'forward alone']]),
    example(`${capital(lone.each.name)} makes ${round(lone.at[0])} operations of each byte that must come from memory. Memory brings ${si(bandwidth, 'B/s')}, so at most ${si(limit(lone.at[0]), 'FLOP/s')} (operations a second) are possible; ${si(lone.at[1], 'FLOP/s')} were measured, ${percent(lone.at[1] / limit(lone.at[0]))} of it. Right of the corner, at ${round(corner)} operations a byte, the processor’s own ${si(peak, 'FLOP/s')} are the limit.`),
    table('The numbers in the picture. Operations and bytes are counted by formula; both limits are the best seen on this machine. Above its limit is what finds its weights in the processor’s cache.',
      ['stage', 'operations a byte', 'measured', 'share of its limit'], points.map(({each, at}, number) => [`${number + 1}. ${each.name}`, round(at[0]), si(at[1], 'FLOP/s'), percent(at[1] / limit(at[0]))])));
}

function decoding() {
  const series = Object.entries(Object.groupBy(served, (each) => each.series ?? 'decode')).map(([name, all]) => [name, all.sort((a, b) => a.slots - b.slots)]);
  if (!series.length || served.length < 2) return;
  const first = series[0][1];
  const {ceilings = {}} = report;
  const slots = [...new Set(served.map((each) => each.slots))].sort((a, b) => a - b);
  const [low, high] = [slots[0] / 1.15, slots.at(-1) * 1.3];
  const lines = series.map(([, all], at) => ({kind: `way${at}`, points: all.map((each) => [each.slots, each.seconds_per_token])}));
  const names = series.map(([name], at) => [`way${at}`, name]);
  const level = (seconds, kind, name) => {
    if (!isPositive(seconds)) return;
    lines.push({kind, points: [[low, seconds], [high, seconds]]});
    names.push([kind, name]);
  };
  level(trained?.seconds_per_token, 'reference', `a token trained on (${trained?.name})`);
  // What a token makes the memory read is a share of the weights, and its own: by the fewest and the most slots.
  const [few, many] = [first[0], first.at(-1)];
  if (isPositive(ceilings.read_gbs, few.bytes_per_token, many.bytes_per_token) && many.slots > few.slots) {
    const shared = Math.max(0, (few.bytes_per_token - many.bytes_per_token) / (1 / few.slots - 1 / many.slots));
    const own = Math.max(0, few.bytes_per_token - shared / few.slots);
    lines.push({kind: 'memory', points: [low, ...slots, high].map((count) => [count, (shared / count + own) / (1e9 * ceilings.read_gbs)])});
    names.push(['memory', `its bytes at ${round(ceilings.read_gbs)} GB/s`]);
  }
  const across = {name: 'requests decoded together', low, high, format: count, ticks: slots};
  const up = {name: 'time for a token', format: (value) => si(value, 's'), ...widen(lines.flatMap(({points}) => points.map((point) => point[1])))};
  const dots = series.flatMap(([, all], at) => all.map((each) => ({kind: `way${at}`, at: [each.slots, each.seconds_per_token], text: si(each.seconds_per_token, 's')})));
  const gain = few.seconds_per_token / many.seconds_per_token;
  chapter(`Decoded with ${many.slots - 1} others, a token takes ${times(1 / gain)} of its time alone`,
    (width) => logChart(width, 'The time for a token against the requests decoded together', across, up, {lines, dots}), lineKey(names),
    example(`Alone, a token takes ${si(few.seconds_per_token, 's')}; among ${many.slots}, ${si(many.seconds_per_token, 's')}. That is ${round(many.slots / few.slots)} times the requests at once, and ${round(gain)} times the tokens a second: a lone request pays for reading every weight to make one token, and requests decoded together share that read, until their products take the time.`));
}

function lifetime() {
  const params = report.model?.params;
  const costs = served.filter((each) => isPositive(each.usd_per_million_tokens));
  if (!costs.length || !isPositive(params, trained?.usd_per_million_tokens)) return;
  const tokens = 20 * params;
  const once = trained.usd_per_million_tokens * tokens / 1e6;
  const meets = costs.map((each) => once / each.usd_per_million_tokens * 1e6);
  const across = {name: 'tokens served', low: 10 ** Math.floor(Math.log10(Math.min(...meets) / 20)), high: 10 ** Math.ceil(Math.log10(5 * Math.max(...meets))), format: inWords};
  const line = (each) => [across.low, across.high].map((count) => [count, each.usd_per_million_tokens * count / 1e6]);
  const lines = [{kind: 'reference', points: [[across.low, once], [across.high, once]]}, ...costs.map((each, at) => ({kind: `way${at % 5}`, points: line(each)}))];
  const up = {name: 'dollars', format: money, ...widen(lines.flatMap(({points}) => points.map((point) => point[1])), 1.3)};
  chapter(`Serving has cost as much as training after ${inWords(Math.min(...meets))} to ${inWords(Math.max(...meets))} tokens`,
    (width) => logChart(width, 'Dollars against tokens served', across, up, {lines, dots: meets.map((count) => ({at: [count, once], kind: 'ring'}))}),
    lineKey([['reference', `${trained.name}, once: ${money(once)} for ${inWords(tokens)} tokens, 20 for each parameter`], ...costs.map((each, at) => [`way${at % 5}`, each.name])]),
    example(`Training costs ${money(once)} once. ${capital(costs[0].name)} costs ${money(costs[0].usd_per_million_tokens)} for a million tokens, so after ${inWords(meets[0])} tokens it has cost as much; after ten times as many, ten times as much. The ratio is the same whatever an hour costs.`));
}

function learning() {
  const {readings = [], text = [], other = [], letters, other_letters: others, moved = {}} = report.learning ?? {};
  if (!readings.length) return;
  const [last, best] = [readings.length - 1, other.indexOf(Math.min(...other))];
  const lines = [[text, 'way0'], [other, 'reference']].map(([errors, kind]) => ({kind, points: readings.map((reading, at) => [reading, errors[at]])}));
  const dots = lines.flatMap(({points, kind}) => points.map((at) => ({at, kind: kind === 'way0' ? kind : 'both', text: at[0] === readings[last] && times(at[1])})));
  const across = {name: 'times that the text was read', low: 0.9, high: 1.1 * readings[last], format: count, ticks: readings};
  const up = {name: 'error for a letter, in nats', format: times, ...widen([...text, ...other], 1.2)};
  chapter(best < last ? 'Read too often, a text is learned by heart' : 'Read again, a text is known better',
    (width) => logChart(width, 'The error against the times that the text was read', across, up, {lines, dots}),
    lineKey([['way0', `the text that is read: ${count(letters)} letters`], ['reference', `${count(others)} letters of the same kind that are never read`]]),
    example(`After one reading the model’s error on a new text is ${times(other[0])}, after ${readings[last]} readings ${times(other[last])}. On the text itself it is ${times(text[last])} then. ${best === last
      ? 'What this model learns helps with both.'
      : `On the new text the model is best after ${readings[best]}, with ${times(other[best])}: at first it learns how such texts are written, which helps with all of them; then it learns these sentences by heart, which helps with no other. That is overfitting, and why a part of every text is held out: to see when to stop.`}`));
  const stages = ['pre-training', '1', String(readings[last])].map((stage) => [stage, moved[stage] ?? {}]);
  const colours = ['blue', 'amber', 'rust'];
  const [far, once, often] = stages.map(([, shares]) => shares['all weights']);
  const share = (number) => `${round(100 * number, 2)}%`;
  chapter(`Pre-training moved the weights by ${share(far)}, fine-tuning by ${share(once)} in one reading`,
    barChart('How far the weights moved, by kind', Object.keys(stages[0][1]).map((kind) => ({name: kind, bars: stages.map(([, shares], at) => ({text: share(shares[kind]), parts: [[colours[at], shares[kind]]]}))}))),
    legend(stages.map(([stage], at) => [colours[at], at ? `fine-tuning, its text read ${stage === '1' ? 'once' : `${stage} times`}` : 'pre-training, from random weights'])),
    say(`All weights of a kind are one long list of numbers, and such a list has a length, as an arrow has. A bar is the length of the change, as a share of the list’s length afterwards; a list that began at zero has changed by 100%. Fine-tuning goes on with the weights of pre-training: read ${readings[last]} times, its text moved all weights by ${share(often)}. Pre-training was short here, ${count(report.learning.pretrained)} letters.`));
}

function claims() {
  const all = report.claims ?? [];
  const verdict = (text) => String(text ?? '').match(/^\w+/)?.[0].toLowerCase() ?? 'partly';
  if (!all.length) return;
  const hold = all.filter((claim) => verdict(claim.verdict) === 'true').length;
  chapter(`Sentence by sentence: of ${all.length} common claims ${hold} ${hold === 1 ? 'holds' : 'hold'} here without an “if”`,
    say('Each heading is a sentence that people say. Beside it is the verdict, below it are the numbers that decide, and the command that measures them again. Where times are compared, the ways run in turns, and a range is where the true ratio lies with 95% certainty; “undecided” means that the range holds both answers.'),
    make('p', {className: 'quiet'}, 'A token is a piece of a word; an operation is one multiplication or addition. Forward, the model guesses how a text goes on; backward, it finds how each weight made the guess wrong, its gradient; the optimizer then moves the weights. LoRA trains a small adapter beside frozen weights. To decode is to write an answer token by token, to prefill is to read the question; a slot is the place of one request among those answered together.'),
    make('ul', {className: 'claims'}, all.map(({claim, verdict: judged, value, command: own}) =>
      make('li', {}, make('p', {className: `verdict ${verdict(judged)}`}, judged ?? ''), make('div', {}, make('h3', {}, claim ?? ''), make('p', {}, value ?? ''), own ? make('code', {}, `uv run ${own}`) : '')))));
}

function stages() {
  if (!rows.length) return;
  const off = (ratio) => (finite(ratio) && ratio > 3 ? `${times(ratio)} ×` : percent(ratio - 1));
  const spread = (each) => (each.time_ratio_interval ? ` (${each.time_ratio_interval.map(times).join(' to ')})` : '');
  chapter('The stages, counted and measured',
    table('Operations for one token, by three counters: the formulas, the walker (the products in the traced program; elementwise are its other operations), and XLA.',
      ['stage', '.weights', 'formula', 'walker', 'elementwise', 'XLA', '× forward'],
      rows.map((each) => [each.name, each.weights, si(flops(each).formula, ''), flops(each).walker === flops(each).formula ? '= formula' : si(flops(each).walker, ''), si(flops(each).walker_elementwise, ''), si(flops(each).xla, ''), times(each.flop_ratio_to_forward)])),
    table(`Times are medians of interleaved rounds, ratios with their 95% interval. Off is the time beside that of its operations at the forward pass’s speed. What a stage is bound by takes half of its time alone, at this machine’s best rates. Dollars are at ${money(report.price_per_hour)} an hour; a request is ${(report.request_tokens ?? []).join(' tokens read and ')} written.`,
      ['stage', 'a token takes', 'off', '× forward', 'peak', 'moved a token', 'of its ceiling', 'bound by', '$ a million tokens', '$ a thousand requests'],
      rows.map((each) => [each.name, si(each.seconds_per_token, 's'), off(each.time_ratio_to_forward / each.flop_ratio_to_forward), times(each.time_ratio_to_forward) + spread(each), si(each.peak_bytes, 'B'), si(each.bytes_per_token, 'B'), `${percent(each.utilisation)} ${each.utilisation_of ?? ''}`, each.bound_by, money(each.usd_per_million_tokens), money(1000 * each.usd_per_request)])));
}

const ARRAYS = {
  x: 'what comes in', h: 'x after the norm', raw_q: 'queries before their norm', raw_k: 'keys before their norm', q: 'queries', k: 'keys', v: 'values',
  weights: 'how much each token takes from each other', mixed: 'the values, mixed by the attention weights', gate: 'one product of h', up: 'another product of h', hidden: 'up, let through by gate',
};

function residuals() {
  const {residuals: {rows: arrays = [], kept = {}} = {}, config: cfg = {}} = report;
  if (!arrays.length) return;
  const [B, T] = arrays[0].shape;
  const letters = {B: [B, 'texts at once'], T: [T, 'tokens of each'], D: [cfg.width, 'numbers for each token'], N: [cfg.heads, 'heads of queries'], K: [cfg.kv_heads, 'heads of keys and of values'], H: [cfg.head_dim, 'numbers in a head'], F: [cfg.ff, 'numbers for each token inside the feed-forward half']};
  const largest = Math.max(...arrays.map((each) => each.bytes));
  const draw = (way) => ['attention', 'feed-forward'].flatMap((half) => [make('h3', {}, half === 'attention' ? 'Attention: each token looks at those before it' : 'Feed-forward: each token on its own'),
    make('ul', {className: 'kept'}, arrays.filter((each) => each.half === half).map((each) => {
      const isKept = each.kept_by.includes(way);
      const bar = make('i', {style: `width: ${62 * each.bytes / largest}%; color: var(--${each.needed_for.includes('dx') ? 'amber' : 'rust'})`});
      return make('li', {}, make('div', {}, make('b', {}, each.name), `, ${ARRAYS[each.name] ?? ''}`, make('br'), make('span', {className: 'quiet'}, `${each.axes} = ${each.shape.join(' × ')}`)),
        make('div', {className: `size${isKept ? '' : ' dropped'}`}, bar, si(each.bytes, 'B')), make('div', {}, each.reason, each.lines.map((text) => make('code', {}, text))));
    }))]);
  const options = Object.entries(kept).map(([way, bytes]) => [way, `${way}: ${si(bytes, 'B')}`]);
  chapter('For experts: what one block keeps for its backward pass, and the line that reads it',
    say('To find how the error would change with a weight, backward needs what that weight was multiplied with, so forward keeps it. Each row is an array of a block written out in NumPy: its name and shape, its bytes, what needs it, and the line of the backward pass that reads it. Who trains? What is not kept then is crossed out.'),
    ...switchOf(options, draw),
    legend([['amber', 'needed for dX, to pass the error on to the blocks below; perhaps for dW too'], ['rust', 'needed for dW alone, of a weight of this block']]),
    make('p', {className: 'quiet'}, Object.entries(letters).map(([letter, [size, text]]) => `${letter} = ${size}: ${text}`).join(' · ')),
    make('p', {className: 'quiet'}, 'What needs an array was found by putting NaN in its place: every derivative that then is NaN needed it. Below the lowest weight that trains nothing is kept. With gradient checkpointing the block’s input stays, and the rest is computed again.'));
}

function method() {
  const {machine = {}, model = {}, ceilings = {}, command, noise, date, commit, versions = {}} = report;
  chapter('How it was measured', say(noise ?? ''), command ? make('pre', {}, `uv run ${command}`) : [],
    [machine, model, ceilings, versions, {date, commit}].map((values) => make('p', {className: 'quiet'}, inline(values))));
}

function draw() {
  document.querySelector('main').replaceChildren();
  for (const part of [glance, memoryOverTime, operations, layers, roofline, decoding, lifetime, learning, claims, stages, method, residuals]) part();
}

if (!rows.length) refuse('This page holds no stage table. python -m bench --out FOLDER makes one.');
else {
  const {model = {}, machine = {}} = report;
  $('about').textContent = [model.name, finite(model.params) && `${inWords(model.params)} parameters`, machine.device, finite(machine.cores) && `${machine.cores} cores`].filter(Boolean).join(' · ');
  draw();
  onWidth(draw);
}
