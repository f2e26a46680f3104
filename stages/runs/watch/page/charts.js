'use strict';
// Elements, charts and tables. Charts are SVG in the size in which they are seen, so that their text keeps its own.

const BACKWARD = 0.38; // the parts of a step's time after which backward and update begin
const UPDATE = 0.8;
const KINDS = {
  'parameters': 'green', 'optimizer state': 'grey', 'KV cache': 'teal', 'gradients': 'rust', 'residuals': 'pink',
  'temporaries': 'violet',
};

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.flat());
  return node;
}

// A text in which **words** stand out.
const rich = (text) => text.split('**').map((part, at) => (at % 2 ? make('b', {}, part) : part));
const say = (text) => make('p', {className: 'say'}, text);

function svg(tag, attributes, ...children) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.flat(9));
  return node;
}
const words = (text, x, y, anchor = 'start') => svg('text', {x, y, 'text-anchor': anchor}, text);
const line = (x1, y1, x2, y2, kind) => svg('line', {x1, y1, x2, y2, class: kind});

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
const picture = (width, height, label, ...nodes) =>
  svg('svg', {viewBox: `0 0 ${width} ${height}`, height, role: 'img', 'aria-label': label}, nodes);

// Memory over one step as stacked areas, from 0 to `top` bytes. `chart.show(phase)` moves a line through its passes.
function memoryChart(memory, top, width) {
  const height = 240;
  const {x, y, lower, upper, nodes} = axes(width, height, top, (bytes) => si(bytes, 'B'));
  const total = sums(memory);
  const at = (position) => x(position / total.length);
  let below = total.map(() => 0);
  for (const [kind, colour] of Object.entries(KINDS)) {
    const above = below.map((bytes, position) => bytes + (memory.bytes[kind]?.[position] ?? 0));
    const steps = (bytes) => bytes.flatMap((value, position) => [position, position + 1].map((x) =>
      `${at(x).toFixed(1)},${y(value).toFixed(1)}`));
    const path = [...steps(above), ...steps(below).reverse()].join('L');
    nodes.push(svg('path', {d: `M${path}Z`, style: `color: var(--${colour})`}));
    below = above;
  }
  const peak = Math.max(...total);
  const {backward, update = total.length} = memory;
  const bounds = finite(backward) ? [0, backward, update, total.length] : [0, total.length];
  const names = bounds.length > 2 ? ['forward', 'backward', 'update'] : ['forward alone'];
  names.forEach((name, pass) => {
    const [from, to] = [at(bounds[pass]), at(bounds[pass + 1])];
    if (pass) nodes.push(line(from, 6, from, lower, 'phase'));
    if (to - from > name.length * 6) nodes.push(words(name, (from + to) / 2, 14, 'middle'));
  });
  const now = line(at(0), upper, at(0), lower, 'now');
  nodes.push(svg('circle', {cx: at(total.indexOf(peak) + 0.5), cy: y(peak), r: 4, class: 'peak'}));
  nodes.push(words('operations, in the order they run →', width - 6, height - 6, 'end'), now);
  const label = `Memory over one step: ${si(total[0], 'B')} at its beginning, ${si(peak, 'B')} at most.`;
  const chart = picture(width, height, label, nodes);
  chart.show = (phase) => {
    const times = bounds.length > 2 ? [0, BACKWARD, UPDATE, 1] : [0, 1];
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
  const points = all.filter((_, at) => at % Math.ceil(all.length / 600) === 0 || at === all.length - 1);  // few enough to draw
  const {x, y, nodes} = axes(width, height, Math.max(...points.map((point) => point[1]), 0), format);
  const last = points.at(-1)[0] || 1;
  const place = ([across, up]) => [x(Math.max(0, across / last)), y(Math.max(0, up))];
  const dot = svg('circle', {r: 4.5, class: 'dot'});
  nodes.push(svg('polyline', {points: points.map(place).join(' '), class: 'line'}));
  const chart = picture(width, height, label, nodes,
    words('0', x(0), height - 6), words(count(last), x(1), height - 6, 'end'), dot);
  chart.show = (until) => {
    const point = points.findLast((each) => each[0] <= until) ?? points[0];
    const [cx, cy] = place(point);
    dot.setAttribute('transform', `translate(${cx} ${cy})`);
    return point[1];
  };
  chart.show(Infinity);
  return chart;
}

const legend = (pairs) => make('ul', {className: 'legend'}, pairs.map(([colour, ...text]) =>
  make('li', {}, make('i', {className: colour, style: `color: var(--${colour})`}), ...text)));

// Horizontal bars to one scale, each of parts one after another: rows of {name, parts: [[colour, size]], text}.
function stackedBars(label, rows) {
  const longest = Math.max(...rows.map(({parts}) => parts.reduce((total, [, size]) => total + size, 0)));
  const part = ([colour, size]) => make('i', {style: `color: var(--${colour}); width: ${100 * size / longest}%`});
  return make('div', {className: 'bars stacked', role: 'img', ariaLabel: label}, rows.map(({name, parts, text}) =>
    make('div', {}, make('span', {}, name), make('div', {}, make('p', {}, parts.filter(([, size]) => size).map(part), make('span', {}, text))))));
}

// Powers of ten from `low` to `high`, at most `most` of them; where they are few, 1, 2 and 5 times them.
function logTicks(low, high, most) {
  const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
  const powers = (from, to, step = 1) => Array.from({length: Math.floor((to - from) / step) + 1}, (_, at) => 10 ** (from + at * step));
  if (last - first >= 2) return powers(first, last, Math.ceil((last - first + 1) / most));
  return powers(first - 1, last + 1).flatMap((power) => [power, 2 * power, 5 * power]).filter((tick) => low <= tick * (1 + 1e-9) && tick <= high * (1 + 1e-9));
}

let clips = 0;

// A chart as wide as its room, over two logarithmic axes, each {name, low, high, format, ticks}. `lines` are {points, kind}, `dots` {at, kind, text}; the
// region below the points of `shade` is filled. Only what lies within the axes is drawn.
function logChart(room, label, across, up, {lines = [], dots = [], shade = []}) {
  const width = Math.min(room, 860);
  const height = width < 480 ? 280 : 380;
  const [left, right, upper, lower] = [64, width - 8, 24, height - 40];
  const on = ({low, high}, from, to) => (value) => from + (to - from) * Math.log(value / low) / Math.log(high / low);
  const [x, y] = [on(across, left, right), on(up, lower, upper)];
  const place = (points) => points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(' ');
  const ticks = ({low, high, ticks: own}, most) => own ?? logTicks(low, high, most);
  const nodes = ticks(up, 8).flatMap((tick) => [line(left, y(tick), right, y(tick), 'grid'), words(up.format(tick), left - 6, y(tick) + 4, 'end')]);
  for (const tick of ticks(across, width < 480 ? 3 : 6)) {
    nodes.push(line(x(tick), lower, x(tick), lower + 5, 'axis'), words(across.format(tick), Math.min(x(tick), right - 12), lower + 18, 'middle'));
  }
  nodes.push(line(left, lower, right, lower, 'axis'), words(`${up.name}, log scale`, 0, 11), words(`${across.name}, log scale`, right, height - 6, 'end'));
  const clip = `clip${clips += 1}`;
  const inside = svg('g', {'clip-path': `url(#${clip})`}, shade.length ? svg('polygon', {points: `${place(shade)} ${right},${lower} ${left},${lower}`, class: 'shade'}) : [],
    lines.map(({points, kind}) => svg('polyline', {points: place(points), class: `line ${kind}`})));
  nodes.push(svg('clipPath', {id: clip}, svg('rect', {x: left, y: upper, width: right - left, height: lower - upper})), inside);
  const taken = dots.map(({at: [a, b]}) => [x(a), y(b), 14]);
  for (const {at: [a, b], kind, text} of dots) {
    const [cx, cy] = [x(a), y(b)];
    nodes.push(svg('circle', {cx, cy, r: 4.5, class: `dot ${kind}`}));
    if (text) nodes.push(words(text, ...beside(cx, cy, 7 * text.length, taken, [left, right, upper, lower]), 'middle'));
  }
  const chart = picture(width, height, label, nodes);
  chart.style.maxWidth = `${width}px`;
  return chart;
}

// Returns the nearest place to a dot at which a text so wide covers no dot and no text before it, and adds it to `taken`.
function beside(cx, cy, width, taken, [left, right, upper, lower]) {
  for (let at = 0; at < 300; at += 1) {
    const [radius, turn] = [14 + 5 * Math.floor(at / 16), (at % 16) * Math.PI / 8];
    const [x, y] = [cx + (radius + width / 2 - 5) * Math.cos(turn), cy - radius * Math.sin(turn)];
    const isFree = x - width / 2 > left && x + width / 2 < right && y > upper + 6 && y < lower - 6
      && taken.every(([a, b, room]) => Math.abs(a - x) > (width + room) / 2 || Math.abs(b - y) > 13);
    if (!isFree) continue;
    taken.push([x, y, width]);
    return [x, y + 4];
  }
  return [cx, cy - 10];
}

// The ends of an axis around values, with room on both sides.
const widen = (values, room = 1.6) => ({low: Math.min(...values) / room, high: Math.max(...values) * room});

// The names of the lines of a chart, as pairs of the line's kind and text.
const lineKey = (pairs) => make('ul', {className: 'legend'}, pairs.map(([kind, ...text]) =>
  make('li', {}, svg('svg', {viewBox: '0 0 32 8', class: 'key', 'aria-hidden': true}, line(0, 4, 32, 4, `line ${kind}`)), ...text)));

// A table whose rows begin with their name. A column whose head begins with a dot holds words.
function table(caption, heads, rows) {
  const cell = (tag, text, at, scope) => make(tag, {scope, className: heads[at][0] === '.' ? 'words' : ''}, text ?? '–');
  const line = (row) => make('tr', {}, row.map((text, at) => cell(at ? 'td' : 'th', text, at, 'row')));
  return make('div', {className: 'scroll', tabIndex: 0, role: 'region', ariaLabel: caption},
    make('table', {}, make('caption', {}, caption),
      make('thead', {}, make('tr', {}, heads.map((head, at) => cell('th', head.replace('.', ''), at, 'col')))),
      make('tbody', {}, rows.map(line))));
}

const tables = {};

// Draws, and gives the focus back to an element that was taken out and put in again, scrolled as far as it was.
function keepFocus(draw) {
  const {activeElement: focused} = document;
  const {scrollLeft} = focused;
  draw();
  if (focused === document.activeElement || !focused.isConnected) return;
  focused.focus({preventScroll: true});
  focused.scrollLeft = scrollLeft;
}

// A table behind a line to open it, which stays open when its chapter is drawn again. `rows` makes them when they are seen.
function asTable(name, caption, heads, rows) {
  const details = tables[name] ??= make('details', {}, make('summary', {}, `As a table: ${name}`));
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

// A count in words: 96.2 million.
function inWords(number) {
  const [scale, name] = [[1e12, ' trillion'], [1e9, ' billion'], [1e6, ' million'], [1e3, ' thousand']].find(([scale]) => number >= 0.9995 * scale) ?? [1, ''];
  return round(number / scale) + name;
}
const percent = (share) => (finite(share) ? `${Math.round(100 * share)}%` : '–');
const money = (dollars) => (finite(dollars) ? `$${dollars >= 1e6 ? inWords(dollars) : round(dollars)}` : '–');
