'use strict';
// Charts over logarithmic axes, and how large numbers are written, of the pages of the stage table and of the planner.

// A count in words: 96.2 million.
function inWords(number) {
  const [scale, name] = [[1e12, ' trillion'], [1e9, ' billion'], [1e6, ' million'], [1e3, ' thousand']].find(([scale]) => number >= 0.9995 * scale) ?? [1, ''];
  return round(number / scale) + name;
}
const percent = (share) => (finite(share) ? `${Math.round(100 * share)}%` : '–');
const money = (dollars) => (finite(dollars) ? `$${dollars >= 1e6 ? inWords(dollars) : round(dollars)}` : '–');

let clips = 0;

// Powers of ten from `low` to `high`, at most `most` of them; where they are few, 1, 2 and 5 times them.
function logTicks(low, high, most) {
  const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
  const powers = (from, to, step = 1) => Array.from({length: Math.floor((to - from) / step) + 1}, (_, at) => 10 ** (from + at * step));
  if (last - first >= 2) return powers(first, last, Math.ceil((last - first + 1) / most));
  return powers(first - 1, last + 1).flatMap((power) => [power, 2 * power, 5 * power]).filter((tick) => low <= tick * (1 + 1e-9) && tick <= high * (1 + 1e-9));
}

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
