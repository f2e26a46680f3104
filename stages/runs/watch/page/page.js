'use strict';
// The page itself: buttons, keyboard and clock, and what is drawn when.

const FRAME_SECONDS = 1.8;
const BUTTONS = {'train': 'Train', 'fine-tune': 'Fine-tune', 'answer': 'Answer'};
const still = matchMedia('(prefers-reduced-motion: reduce)');

function when() {
  const frame = frames()[state.frame];
  if (!frame) return 'no frame';
  if (isAnswering()) return `answer ${state.frame + 1} of ${frames().length}`;
  const last = Math.max(life().begin.steps ?? 0, frames().at(-1).step);
  return `step ${count(frame.step)} of ${count(last)} · ${frame.seconds.toFixed(1)} s`;
}

// Draws what another frame changes.
function drawFrame() {
  Object.assign($('scrub'), {max: Math.max(0, frames().length - 1), value: state.frame, ariaValueText: when()});
  $('scrub').disabled = $('play').disabled = frames().length < 2;
  $('when').textContent = when();
  drawWeights();
  drawText();
  moveCurves();
}

// Draws what another life, width or theme changes.
function draw() {
  const isChosen = ({value}) => [state.life, state.way].includes(value);
  for (const button of document.querySelectorAll('#bar button[value]')) button.ariaPressed = isChosen(button);
  $('ways').hidden = state.life !== 'fine-tune';
  keepFocus(() => {
    drawCurves();
    drawMemory();
    drawFrame();
  });
}

function show(frame) {
  state.frame = Math.max(0, Math.min(frames().length - 1, frame));
  keepFocus(drawFrame);
}

function choose(life, way = state.way) {
  Object.assign(state, {life, way});
  state.frame = state.playing ? 0 : Math.max(0, frames().length - 1);
  draw();
  $('status').textContent = `${LIVES[chosen()].title}, ${when()}`;
}

function drawPhase(phase) {
  drawPass(phase);
  for (const chart of memories) chart.show(phase);
}

let started = 0;

function play(on = !state.playing) {
  state.playing = on && frames().length > 1;
  $('play').textContent = state.playing ? 'Pause' : 'Play';
  drawPhase(1);
  if (!state.playing) return;
  if (state.frame >= frames().length - 1) show(0);
  started = performance.now();
  requestAnimationFrame(tick);
}

function tick(now) {
  if (!state.playing) return;
  let phase = (now - started) / 1000 / FRAME_SECONDS;
  if (phase >= 1) {
    if (state.frame >= frames().length - 1) return play(false);
    show(state.frame + 1);
    [phase, started] = [0, now];
  }
  if (!still.matches) drawPhase(Math.max(0, phase));
  requestAnimationFrame(tick);
}

function press(event) {
  const {key, target} = event;
  if (event.ctrlKey || event.metaKey || event.altKey || (target.matches('input') && target.id !== 'scrub')) return;
  const life = !state.recording.live && Object.keys(BUTTONS)[Number(key) - 1];
  const isAgain = life === 'fine-tune' && state.life === life;
  if (!life && target.matches('.scroll, pre')) return; // which such keys scroll
  if (life) choose(life, isAgain ? WAYS[(WAYS.indexOf(state.way) + 1) % WAYS.length] : state.way);
  else if (key === 'ArrowLeft' || key === 'ArrowRight') {
    play(false);
    show(state.frame + (key === 'ArrowLeft' ? -1 : 1));
  } else if (key === ' ' && !target.matches('button:not(#bar [aria-pressed=true]), summary')) play();
  else return;
  event.preventDefault();
}

// Returns what keeps a document from being shown, in a sentence, or nothing.
function problem(recording) {
  if (!recording?.lives || typeof recording.lives !== 'object') {
    return 'This page holds no recording of a model’s lives, or one of another format. python -m bench.lives makes one.';
  }
  const lives = Object.entries(recording.lives).filter(([, each]) => isRecorded(each));
  if (!lives.length && !recording.live) return 'This recording is empty: it has no frame of any life.';
  const [name] = lives.find(([life, {begin}]) => !LIVES[life] || !Array.isArray(begin?.tensors) || !finite(begin.layers)) ?? [];
  return name && `The life “${name}” of this recording is of another format: the page does not know it, or its tensors.`;
}

function start() {
  const recording = readDocument();
  const sentence = problem(recording);
  if (sentence) {
    $('bar').hidden = document.querySelector('main').hidden = true;
    return refuse(sentence);
  }
  state.recording = recording;
  for (const {begin, frames} of Object.values(recording.lives).filter(isRecorded)) {
    frames.forEach((frame, at) => nameValues(begin, frame, frames[at - 1]));
  }
  const size = recording.params ? `, ${count(recording.params)} weights in ${recording.layers} blocks,` : '';
  $('about').textContent = `The same model${size} is trained from random weights, fine-tuned, and asked: what moves, what `
    + 'comes back, and what it costs.';
  const button = (value, onclick, ...text) => make('button', {type: 'button', value, onclick}, ...text);
  $('lives').append(...Object.entries(BUTTONS).map(([life, text], at) =>
    button(life, () => choose(life), make('kbd', {}, at + 1), ` ${text}`)));
  $('ways').append(...WAYS.map((way) => button(way, () => choose('fine-tune', way), LIVES[way].name)));
  $('play').onclick = () => play();
  $('scrub').oninput = ({target}) => {
    play(false);
    show(target.valueAsNumber);
  };
  document.addEventListener('keydown', press);
  onWidth(draw);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  state.way = WAYS.find((way) => isRecorded(recording.lives[way])) ?? 'frozen';
  drawCost();
  drawRequests();
  drawMade();
  choose(isRecorded(recording.lives.train) || !recording.lives[state.way] ? 'train' : 'fine-tune');
  drawPhase(1);
}

start();
