'use strict';
// Elements, charts and tables. Charts are SVG in the size in which they are seen, so that their text keeps its own.

const BACKWARD = 0.38; // the parts of a step's time after which backward and update begin
const UPDATE = 0.8;
// What a step holds in memory, from below: kinds, with their colours and what they are.
const KINDS = {
  'parameters': ['green', 'the weights'],
  'optimizer state': ['grey', 'what the update remembers of each weight that trains'],
  'KV cache': ['teal', 'notes on the tokens read so far'],
  'gradients': ['rust', 'how the error changes with each weight'],
  'residuals': ['pink', 'what forward keeps for backward'],
  'temporaries': ['violet', 'used at once and dropped'],
};

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.flat());
  return node;
}
const say = (...text) => make('p', {className: 'say'}, ...text);

function svg(tag, attributes, ...children) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.flat(9));
  return node;
}
const words = (text, x, y, anchor = 'start') => svg('text', {x, y, 'text-anchor': anchor}, text);
const line = (x1, y1, x2, y2, kind) => svg('line', {x1, y1, x2, y2, class: kind});
const picture = (width, height, label, ...nodes) =>
  svg('svg', {viewBox: `0 0 ${width} ${height}`, height, role: 'img', 'aria-label': label}, nodes);

// A frame with the height scale from 0 to `top`: returns its nodes, and where a share of the width and a value lie.
function axes(width, height, top, format) {
  const [left, right, upper, lower] = [54, width - 6, 24, height - 22];
  const x = (share) => left + (right - left) * share;
  const y = (value) => lower - (lower - upper) * value / (top || 1);
  const power = 10 ** Math.floor(Math.log10(top / 4.5 || 1));
  const step = [1, 2, 2.5, 5, 10].find((each) => each * power >= top / 4.5) * power;
  const nodes = [];
  for (let tick = 0; tick <= top; tick += step) {
    nodes.push(line(left, y(tick), right, y(tick), tick ? 'grid' : 'axis'), words(format(tick), left - 6, y(tick) + 4, 'end'));
  }
  return {x, y, lower, upper, nodes};
}

// Memory over one step as stacked areas, from 0 to `top` bytes. `chart.show(phase)` moves a line through its passes.
function memoryChart(memory, top, width) {
  const height = 240;
  const {x, y, lower, upper, nodes} = axes(width, height, top, (bytes) => si(bytes, 'B'));
  const total = sums(memory);
  const peak = Math.max(...total);
  const at = (position) => x(position / total.length);
  let below = total.map(() => 0);
  for (const [kind, [colour]] of Object.entries(KINDS)) {
    const above = below.map((bytes, position) => bytes + (memory.bytes[kind]?.[position] ?? 0));
    const steps = (bytes) => bytes.flatMap((value, position) => [position, position + 1].map((x) =>
      `${at(x).toFixed(1)},${y(value).toFixed(1)}`));
    const path = [...steps(above), ...steps(below).reverse()].join('L');
    nodes.push(svg('path', {d: `M${path}Z`, style: `color: var(--${colour})`}));
    below = above;
  }
  const {backward, update = total.length} = memory;
  const [bounds, times, names] = finite(backward)
    ? [[0, backward, update, total.length], [0, BACKWARD, UPDATE, 1], ['forward', 'backward', 'update']]
    : [[0, total.length], [0, 1], ['forward alone']];
  names.forEach((name, pass) => {
    const [from, to] = [at(bounds[pass]), at(bounds[pass + 1])];
    if (pass) nodes.push(line(from, 6, from, lower, 'phase'));
    if (to - from > name.length * 6) nodes.push(words(name, (from + to) / 2, 14, 'middle'));
  });
  const now = line(at(0), upper, at(0), lower, 'now');
  nodes.push(svg('circle', {cx: at(total.indexOf(peak) + 0.5), cy: y(peak), r: 4, class: 'dot ring'}),
    words('operations, in the order they run →', width - 6, height - 6, 'end'), now);
  const chart = picture(width, height, `Memory over one step: ${si(total[0], 'B')} at its beginning, ${si(peak, 'B')} at most.`, nodes);
  chart.show = (phase) => {
    const pass = Math.max(0, times.findLastIndex((time) => time <= phase && time < 1));
    const part = (phase - times[pass]) / (times[pass + 1] - times[pass]);
    now.setAttribute('transform', `translate(${at(bounds[pass] + (bounds[pass + 1] - bounds[pass]) * part) - at(0)} 0)`);
    now.setAttribute('visibility', phase < 1 ? 'visible' : 'hidden');
  };
  chart.show(1);
  return chart;
}

// A curve of points (x, y). `chart.show(x)` moves its dot to the last point until there, and returns that point's y.
function curveChart(all, width, height, label, format = round) {
  const points = all.filter((_, at) => at % Math.ceil(all.length / 600) === 0 || at === all.length - 1); // few enough to draw
  const {x, y, nodes} = axes(width, height, Math.max(...points.map((point) => point[1]), 0), format);
  const last = points.at(-1)[0] || 1;
  const place = ([across, up]) => [x(Math.max(0, across / last)), y(Math.max(0, up))];
  const dot = svg('circle', {r: 4.5, class: 'dot'});
  const chart = picture(width, height, label, nodes, svg('polyline', {points: points.map(place).join(' '), class: 'line'}),
    words('0', x(0), height - 6), words(count(last), x(1), height - 6, 'end'), dot);
  chart.show = (until) => {
    const point = points.findLast((each) => each[0] <= until) ?? points[0];
    dot.setAttribute('transform', `translate(${place(point)})`);
    return point[1];
  };
  chart.show(Infinity);
  return chart;
}

const legend = (pairs) => make('ul', {className: 'legend'}, pairs.map(([colour, ...text]) =>
  make('li', {}, make('i', {className: colour, style: `color: var(--${colour})`}), ...text)));

// The kinds that are held in these memories of a step.
const memoryLegend = (memories) => legend(Object.entries(KINDS).filter(([kind]) => memories.some(({bytes}) => bytes[kind]?.some(Boolean)))
  .map(([kind, [colour, text]]) => [colour, make('strong', {}, kind), `: ${text}`]));

// What a step holds at its peak, as a table of [name, memory].
const peakTable = (caption, memories) => asTable('what is held at the peak', caption, ['step', ...Object.keys(KINDS), 'peak'],
  () => memories.map(([name, {bytes}]) => {
    const total = sums({bytes});
    const peak = Math.max(...total);
    return [name, ...Object.keys(KINDS).map((kind) => si(bytes[kind]?.[total.indexOf(peak)], 'B')), si(peak, 'B')];
  }));

// Bars to one scale: rows of {name, bars, mark}. A bar has parts, pairs of a colour and a size, and a text; a line stands at `mark`.
function barChart(label, rows) {
  const sizes = rows.flatMap(({bars, mark = 0}) => [mark, ...bars.map(({parts}) => parts.reduce((sum, [, size]) => sum + size, 0))]);
  const share = (size) => `${100 * size / Math.max(...sizes)}%`;
  const bar = ({parts, text}) => make('p', {}, parts.filter(([, size]) => size).map(([colour, size]) =>
    make('i', {style: `color: var(--${colour}); width: ${share(size)}`})), make('span', {}, text));
  return make('div', {className: 'bars', role: 'img', ariaLabel: label}, rows.map(({name, bars, mark}) => make('div', {},
    make('span', {}, name), make('div', {}, bars.map(bar), mark ? make('u', {style: `left: ${share(mark)}`}) : ''))));
}

// A table whose rows begin with their name. A column whose head begins with a dot holds words.
function table(caption, heads, rows) {
  const cell = (tag, text, at, scope) => make(tag, {scope, className: heads[at][0] === '.' ? 'words' : ''}, text ?? '–');
  const row = (cells) => make('tr', {}, cells.map((text, at) => cell(at ? 'td' : 'th', text, at, 'row')));
  return make('div', {className: 'scroll', tabIndex: 0, role: 'region', ariaLabel: caption},
    make('table', {}, make('caption', {}, caption),
      make('thead', {}, make('tr', {}, heads.map((head, at) => cell('th', head.replace('.', ''), at, 'col')))),
      make('tbody', {}, rows.map(row))));
}

const opened = {}; // details by name, which stay as they are when their chapter is drawn again

// A table behind a line to open it. `rows` makes its rows when they are seen.
function asTable(name, caption, heads, rows) {
  const details = opened[name] ??= make('details', {}, make('summary', {}, `As a table: ${name}`));
  details.ontoggle = () => {
    const shown = details.querySelector('.scroll');
    if (!details.open) return shown?.remove();
    const region = table(caption, heads, rows());
    if (shown) shown.replaceChildren(...region.children); // which may have the focus
    else details.append(region);
  };
  details.ontoggle();
  return details;
}

// Draws, and gives the focus back to an element that was taken out and put in again, scrolled as far as it was.
function keepFocus(draw) {
  const {activeElement: focused} = document;
  const {scrollLeft} = focused;
  draw();
  if (focused === document.activeElement || !focused.isConnected) return;
  focused.focus({preventScroll: true});
  focused.scrollLeft = scrollLeft;
}

// Draws again when the page has another width.
function onWidth(draw) {
  let width = innerWidth;
  addEventListener('resize', () => {
    if (width !== innerWidth) draw();
    width = innerWidth;
  });
}

// Bytes at each position of a step, over all kinds.
const sums = ({bytes}) => Object.values(bytes).reduce((total, list) => list.map((each, at) => each + (total[at] ?? 0)), []);

const finite = (number) => Number.isFinite(number);
const times = (ratio) => (finite(ratio) ? ratio.toFixed(2) : '–');
const count = (number) => number.toLocaleString('en-US');

function round(number, digits = 3) {
  if (!finite(number)) return '–';
  if (number && Math.abs(number) < 1e-4) return number.toExponential(digits - 1);
  return Math.abs(number) >= 1000 ? count(Math.round(number)) : String(Number(number.toPrecision(digits)));
}

// A number with its unit: 1.2 MB, 27 µs.
function si(number, unit) {
  if (!finite(number)) return '–';
  const at = number ? Math.max(-3, Math.min(5, Math.floor(Math.log10(number) / 3 + 1e-9))) : 0;
  return `${Number((number / 1000 ** at).toPrecision(3))} ${['n', 'µ', 'm', '', 'k', 'M', 'G', 'T', 'P'][at + 3]}${unit}`;
}

// Values by name in one line, those within others too; what is empty is left out.
const inline = (value) => (value && typeof value === 'object' ? Object.entries(value).filter(([, each]) => each)
  .map(([name, each]) => `${name.replaceAll('_', ' ')} ${inline(each)}`).join(' · ') : finite(value) ? round(value, 4) : value ?? '');
