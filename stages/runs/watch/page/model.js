'use strict';
// The picture of the model: each tensor in its place, its change, and the passes over it. The passes move by three numbers from
// 0 to 1 that CSS reads: --forward, --backward and --update.

const GAP = 1;  // patches between tensors
const BETWEEN = 3;  // patches between columns

// A tensor lies on its long side; one that is longer than `width` is folded into lines.
function boxOf(tensor, width) {
  const [short, long] = [tensor.rows, tensor.columns].sort((a, b) => a - b);
  const w = Math.min(long, width);
  return {tensor, short, long, w, h: Math.ceil(long / w) * (short + GAP) - GAP};
}

// Puts tensors on shelves of `width` patches: vectors on the first, and LoRA's pairs below the matrix that they belong to.
function pack(tensors, width) {
  const groups = [];
  for (const tensor of tensors.toSorted((one, other) => one.shape.length - other.shape.length)) {
    if (groups.length && tensor.path.startsWith(`${groups.at(-1)[0].path}/`)) groups.at(-1).push(tensor);
    else groups.push([tensor]);
  }
  const boxes = [];
  let [x, y, high, wide] = [0, 0, 0, 0];
  groups.forEach((group, at) => {
    const parts = group.map((tensor) => boxOf(tensor, width));
    const w = Math.max(...parts.map((box) => box.w));
    const isNewKind = at && group[0].shape.length !== groups[at - 1][0].shape.length;
    if (x && (x + w > width || isNewKind)) [x, y, high] = [0, y + high + GAP, 0];
    let below = y;
    for (const box of parts) {
      boxes.push({...box, x, y: below});
      below += box.h + GAP;
    }
    high = Math.max(high, below - GAP - y);
    wide = Math.max(wide, x + w);
    x += w + GAP;
  });
  return {boxes, width: wide, height: y + high};
}

// Lays the model out for a picture of so many pixels: blocks as wide as one or two of their longest tensors, both ends as high.
function layoutOf(begin, pixelsWide) {
  const tensors = Array.from({length: begin.layers + 2}, () => []);
  for (const tensor of begin.tensors) tensors[columnOf(begin, tensor)].push(tensor);
  const longest = Math.max(8, ...tensors.slice(1, -1).flat().flatMap((tensor) => [tensor.rows, tensor.columns]));
  const times = pixelsWide / tensors.length > 120 ? 2 : 1;
  const columns = tensors.map((each) => pack(each, (longest + GAP) * times));
  const height = Math.max(8, ...columns.slice(1, -1).map((column) => column.height));
  for (const end of [0, columns.length - 1]) {
    let width = 8;
    do columns[end] = pack(tensors[end], width++); while (columns[end].height > height && width < 2000);
  }
  let x = 0;
  for (const column of columns) {
    column.x = x;
    x += Math.max(column.width, 6) + BETWEEN;
  }
  return {columns, width: x - BETWEEN, height};
}

// 255 colours, from blue below zero over a ground to rust above it. The ground is greener the larger the `share` of weights
// that changed.
function paletteOf(share = 0) {
  const styles = getComputedStyle(document.documentElement);
  const rgb = (name) => [1, 3, 5].map((at) => parseInt(styles.getPropertyValue(name).trim().slice(at, at + 2), 16));
  const mix = (one, other, part) => one.map((from, at) => from + (other[at] - from) * part);
  const ground = mix(rgb('--faint'), rgb('--green'), 0.6 * share);
  const [below, above] = [rgb('--blue'), rgb('--rust')];
  return Uint32Array.from({length: 255}, (_, at) => {
    const [r, g, b] = mix(ground, at < 127 ? below : above, Math.abs(at - 127) / 127);
    return (255 << 24) | (b << 16) | (g << 8) | r;
  });
}

// Paints `valuesOf(tensor)`, numbers from -127 to 127, in the colours of the tensor, one pixel a patch; CSS makes them large.
function paint(canvas, layout, valuesOf, coloursOf) {
  const image = new ImageData(layout.width, layout.height);
  const target = new Uint32Array(image.data.buffer);
  for (const column of layout.columns) {
    for (const {tensor, x, y, w, short, long} of column.boxes) {
      const [values, colours] = [valuesOf(tensor), coloursOf(tensor)];
      for (let i = 0; i < long; i += 1) {
        const start = (y + Math.floor(i / w) * (short + GAP)) * layout.width + column.x + x + i % w;
        for (let j = 0; j < short; j += 1) {
          const at = tensor.rows === long ? i * tensor.columns + j : j * tensor.columns + i;
          target[start + j * layout.width] = colours[127 + values[at]];
        }
      }
    }
  }
  Object.assign(canvas, {width: layout.width, height: layout.height});
  canvas.getContext('2d').putImageData(image, 0, 0);
}

// The change of a tensor since the frame before. Full colour is 2.5 times its root mean square, and four steps of the recording
// at least, so that rounding stays pale.
function changeOf(frame, before, {path}) {
  const [was, limit] = [pixels(before, path), frame.limits[path]];
  const moved = Float32Array.from(pixels(frame, path), (value, at) => value * limit - was[at] * before.limits[path]);
  const rootMeanSquare = Math.sqrt(moved.reduce((sum, each) => sum + each ** 2, 0) / moved.length);
  const scale = Math.max(2.5 * rootMeanSquare, 4 * limit) || 1;
  return Int8Array.from(moved, (each) => Math.max(-127, Math.min(127, Math.round(127 * each / scale))));
}

// Draws the frame that is shown; its norms, by column, into the lane of the gradients.
function drawModel() {
  const {of, index, frame} = shown();
  const figure = $('model');
  figure.hidden = !frame;
  if (!frame) return;
  const {begin} = of;
  const across = figure.clientWidth || 300;
  const layout = layoutOf(begin, across);
  const percent = (patches) => `${100 * patches / layout.width}%`;
  const palettes = {};
  const share = ({path, shape}) => (isAnswering() ? 0 : (frame.changed_in?.[path] ?? 0) / shape.reduce((product, each) => product * each, 1));
  const before = isAnswering() ? frame : of.frames[Math.max(0, index - 1)];
  const moved = (tensor) => changeOf(frame, before, tensor);
  paint($('model-weights'), layout, ({path}) => pixels(frame, path), () => palettes[0] ??= paletteOf());
  paint($('model-change'), layout, moved, (tensor) => palettes[share(tensor)] ??= paletteOf(share(tensor)));
  const norms = isAnswering() ? [] : columnNorms(of, index);
  const largest = Math.max(...norms.filter(finite));
  $('columns').replaceChildren(...layout.columns.map((column, at) => {
    const pixelsWide = column.width * across / layout.width;
    const name = columnName(begin, at);
    const names = at && at <= begin.layers ? [name, name.slice(6)] : [name, name.slice(0, 5), name[0]];
    const fits = names.find((text) => text.length * 7 < pixelsWide + 4) ?? '';
    const bar = make('i', {style: `height: ${finite(norms[at]) ? Math.max(4, 100 * norms[at] / largest) : 0}%`});
    const reached = 1 - (column.x + column.width) / layout.width;
    return make('div', {style: `left: ${percent(column.x)}; width: ${percent(column.width)}; --at: ${reached}`},
      make('span', {}, fits), make('div', {}, bar),
      make('b', {}, pixelsWide > 28 && finite(norms[at]) ? round(norms[at], 2) : ''));
  }));
  $('tied').hidden = begin.tensors.some((tensor) => tensor.path === 'head');
  // Backward goes no further to the left than the first column that trains.
  const first = columnOf(begin, begin.tensors.find((tensor) => tensor.trainable));
  figure.className = isAnswering() ? 'answer' : first ? 'stops' : '';
  figure.style.setProperty('--stop', isAnswering() ? 1 : layout.columns[first].x / layout.width);
  const end = first ? ` as far as ${columnName(begin, first)} (nothing before it trains)` : '';
  $('backward').textContent = isAnswering() ? 'backward: nothing comes back. No error, no gradient, no update.'
    : `backward: gradients come back${end}; bars are their size (norm) where weights train`;
  $('update').textContent = isAnswering() ? 'change over all answers: none' : 'update: what changed since the frame before';
  $('model-weights').ariaLabel = `The weights: ${begin.layers} blocks between embedding and head; ${$('backward').textContent}`;
}

// Shows the passes at a part of a step's time; 1 shows all of it. Answering is forward alone, once for each token.
function drawPass(phase) {
  const part = (from, to) => Math.max(0, Math.min(1, (phase - from) / (to - from)));
  const forward = phase === 1 ? 1 : isAnswering() ? phase * 4 % 1 : part(0, BACKWARD);
  const passes = {forward, backward: part(BACKWARD, UPDATE), update: part(UPDATE, 1)};
  for (const [name, value] of Object.entries(passes)) $('model').style.setProperty(`--${name}`, value);
  $('model').classList.toggle('moving', phase < 1);
}
