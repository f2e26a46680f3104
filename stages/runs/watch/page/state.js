'use strict';
// What the page knows: the recording, whose lives are built of events, and what is chosen. Drawing reads it, no more.

const WAYS = ['frozen', 'lora', 'all'];
const state = {recording: {lives: {}}, life: 'train', way: 'frozen', frame: 0, playing: false};

const chosen = () => (state.life === 'fine-tune' ? state.way : state.life);
const isAnswering = () => state.life === 'answer';
const answers = () => state.recording.answer;
const life = () => state.recording.lives[chosen()];
const isRecorded = (each) => each?.frames?.length > 0;
const frames = () => (isAnswering() ? answers()?.answers : life()?.frames) ?? [];

// The life and the place of the frame whose weights are shown: in answering the last one of the run that answers, known by
// its digest, else of the first that there is.
function shown() {
  if (!isAnswering()) return {of: life(), index: state.frame, frame: frames()[state.frame]};
  const trained = Object.values(state.recording.lives).filter(isRecorded);
  const of = trained.find((each) => each.end?.digest === answers()?.before) ?? trained[0];
  return {of, index: of?.frames.length - 1, frame: answers() && of?.frames.at(-1)};
}

// A page holds a frame's values in the order of the tensors, and null for one that is as in the frame `before`; the events of a
// run hold them by path.
function nameValues({tensors}, frame, before) {
  for (const [field, values] of Object.entries(frame).filter(([, each]) => Array.isArray(each))) {
    frame[field] = Object.fromEntries(tensors.map(({path}, at) => [path, values[at] ?? before?.[field]?.[path]]));
  }
  return frame;
}

// A tensor's picture at a frame: values from -127 to 127 of the frame's limit, decoded when it is first seen.
function pixels({mosaic}, path) {
  if (typeof mosaic[path] === 'string') mosaic[path] = Int8Array.from(atob(mosaic[path]), (letter) => letter.charCodeAt(0) << 24 >> 24);
  return mosaic[path];
}

// Columns of the model's picture: 0 is the embedding, then come the blocks, last the head.
const columnOf = ({layers}, {layer, path}) => (finite(layer) ? layer + 1 : path.startsWith('embed') ? 0 : layers + 1);
const columnName = (begin, column) => (column === 0 ? 'embedding' : column > begin.layers ? 'head' : `block ${column - 1}`);
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
