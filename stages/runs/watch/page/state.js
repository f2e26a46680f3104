'use strict';
// What the page knows: the recording, whose lives are built of events, and what is chosen. Drawing reads it, no more.

const WAYS = {'frozen': 'Half frozen', 'lora': 'LoRA', 'all': 'All weights'};
const state = {recording: {lives: {}}, life: 'train', way: 'frozen', frame: 0, playing: false};

const chosen = () => (state.life === 'fine-tune' ? state.way : state.life);
const isAnswering = () => state.life === 'answer';
const answers = () => state.recording.answer;
const life = () => state.recording.lives[chosen()];
const frames = () => (isAnswering() ? answers()?.answers : life()?.frames) ?? [];

// The life and the place of the frame whose weights are shown: in answering the last one of the run that answers, known by
// its digest, else of the first that there is.
function shown() {
  if (!isAnswering()) return {of: life(), index: state.frame, frame: frames()[state.frame]};
  const trained = Object.values(state.recording.lives).filter((each) => each?.frames?.length);
  const of = trained.find((each) => each.end?.digest === answers()?.before) ?? trained[0];
  return {of, index: of?.frames.length - 1, frame: answers() && of?.frames.at(-1)};
}

// A page holds a frame's values in the order of the tensors, which is short; the events of a run hold them by path.
function nameValues({begin: {tensors}, frames = []}) {
  for (const frame of frames) {
    for (const [field, values] of Object.entries(frame).filter(([, each]) => Array.isArray(each))) {
      frame[field] = Object.fromEntries(tensors.map(({path}, at) => [path, values[at]]).filter(([, value]) => value != null));
    }
  }
}

const decoded = new WeakMap();

// A tensor's picture at a frame: values from -127 to 127, of `limit`. A tensor that a frame leaves out is as in the one before.
function pixels(of, index, path) {
  while (index > 0 && !(path in of.frames[index].mosaic)) index -= 1;
  const frame = of.frames[index];
  if (!decoded.has(frame)) decoded.set(frame, {});
  const cache = decoded.get(frame);
  cache[path] ??= Int8Array.from(atob(frame.mosaic[path] ?? ''), (letter) => letter.charCodeAt(0) << 24 >> 24);
  return {values: cache[path], limit: frame.limits[path] ?? 0};
}

const sizeOf = (tensor) => tensor.shape.reduce((product, each) => product * each, 1);

// Columns of the model's picture: 0 is the embedding, then come the blocks, last the head.
const columnOf = ({layers}, {layer, path}) => (Number.isInteger(layer) ? layer + 1 : path.startsWith('embed') ? 0 : layers + 1);
const columnName = (begin, column) => (column === 0 ? 'embedding' : column > begin.layers ? 'head' : `block ${column - 1}`);
// Backward goes no further to the left than the first column that trains.
const firstTrainable = (begin) => columnOf(begin, begin.tensors.find((tensor) => tensor.trainable));

// The gradient's norms by path, as last measured: a run that ends by the clock does not know its last step before.
const normsOf = ({frames}, index) => frames.slice(0, index + 1).findLast((each) => each.gradient_norms)?.gradient_norms ?? {};

// The norm of the gradient of each column; undefined where there is none.
function columnNorms(of, index) {
  const [norms, squares] = [normsOf(of, index), []];
  for (const tensor of of.begin.tensors) {
    const [norm, column] = [norms[tensor.path], columnOf(of.begin, tensor)];
    if (finite(norm)) squares[column] = (squares[column] ?? 0) + norm ** 2;
  }
  return squares.map(Math.sqrt);
}
