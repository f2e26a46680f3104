'use strict';
// What a person does on *Train it here*: trains, and asks.

const pause = () => new Promise((done) => setTimeout(done)); // lets the browser draw, and a press on Stop arrive
const tell = (text, kind = '') => Object.assign($('progress'), {textContent: text, className: kind});
const int32 = (rows) => jax.numpy.array(rows, {dtype: jax.numpy.int32});

let run = null; // programs, weights, moments and losses, from the first press on
let training = false;

/** Runs the library, until now a text in this page, and makes the weights. */
async function start() {
  tell('The program is compiled: a few seconds.');
  await pause();
  document.head.append(make('script', {textContent: $('library').textContent}));
  const devices = await jax.init('wasm', 'webgpu');
  const gpu = devices.includes('webgpu') && !jax.getWebGPUDevice().adapterInfo?.isFallbackAdapter; // simulated ones are slow
  jax.defaultDevice(gpu ? 'webgpu' : 'wasm');
  const weights = initialWeights(), zeros = () => jax.tree.map((w) => jax.numpy.zeros(w.shape), weights);
  run = {...programs(), weights, first: zeros(), second: zeros(), losses: []};
}

/** Returns how many weights have other bits after the action. */
async function changedBy(action) {
  const bits = () => Promise.all(jax.tree.leaves(run.weights).map(async (w) => new Uint32Array((await w.ref.data()).slice().buffer)));
  const before = await bits();
  await action();
  const after = await bits();
  let changed = 0;
  before.forEach((words, i) => words.forEach((word, j) => (changed += word !== after[i][j])));
  return count(changed);
}

/** Trains until a press on Stop, or for 1,000 steps: a forgotten tab comes to rest. */
async function train() {
  const bytes = new TextEncoder().encode($('text').value), least = MODEL.context + 1;
  if (bytes.length < least) return tell(`The text has ${bytes.length} bytes; at least ${least} are needed.`, 'bad');
  training = true;
  $('train').textContent = 'Stop';
  if (!run) await start();
  tell(`It trains on the ${jax.defaultDevice() === 'wasm' ? 'processor' : 'graphics card'}.`);
  const {losses} = run;
  for (let i = 0; i < 1000 && training; i++) {
    const n = losses.length + 1, rate = ADAMW.learning_rate * Math.min(1, n / ADAMW.warmup);
    const batch = batchOf(bytes, n - 1).map(int32);
    const scalars = [rate, 1 - ADAMW.beta1 ** n, 1 - ADAMW.beta2 ** n].map((x) => jax.numpy.array(x));
    let loss;
    $('changed').textContent = await changedBy(async () => {
      [run.weights, run.first, run.second, loss] = run.step(run.weights, run.first, run.second, ...batch, ...scalars);
      [loss] = await loss.data();
    });
    if (!finite(loss)) throw Error('the loss is not a number');
    losses.push(loss);
    $('loss').replaceChildren(make('h3', {}, `Step ${n}`, make('b', {}, `loss ${loss.toFixed(3)}`)),
      curveChart(losses.map((y, x) => [x, y]), $('loss').clientWidth, 180, 'The loss over the steps'));
    await pause();
  }
  tell(`It stopped at step ${losses.length}. Train goes on from there, on the text that then stands here.`);
}

/** Writes the most probable next byte 120 times: the forward pass alone. */
async function answer() {
  const text = [...new TextEncoder().encode($('prompt').value)], prompt = text.length, T = MODEL.context;
  for (let i = 0; i < 120; i++) {
    const window = text.slice(-T), tokens = [...window, ...Array(T - window.length).fill(0)]; // no token sees those behind it
    const logits = await run.logits(jax.tree.ref(run.weights), int32([tokens])).data();
    const last = logits.subarray(MODEL.vocab * (window.length - 1), MODEL.vocab * window.length);
    text.push(last.indexOf(Math.max(...last)));
    $('answer').textContent = new TextDecoder().decode(Uint8Array.from(text.slice(prompt)));
    await pause();
  }
}

/** Runs one of the two. A failure is a sentence, and the buttons work afterwards. */
async function attempt(action) {
  $('ask').disabled = true;
  $('kept').textContent = '–';
  try {
    await action();
  } catch (error) {
    run = null;
    tell(`It failed, and its weights are lost: ${error.message}. It needs WebGPU or WebAssembly with SIMD.`, 'bad');
  }
  training = $('ask').disabled = $('train').disabled = false;
  $('train').textContent = 'Train';
}

$('train').onclick = () => (training ? (training = false) : attempt(train));
$('ask').form.onsubmit = (event) => {
  event.preventDefault();
  attempt(async () => {
    $('train').disabled = true;
    if (!run) await start();
    tell('');
    $('kept').textContent = await changedBy(answer);
  });
};
