'use strict';
// A page that a run serves: takes the events of the run, and says how the run stands.

const clock = () => new Date().toLocaleTimeString();
const told = {...LIVES}; // a run of another stage may follow
let isWaiting = false;
let isOther = false; // whether more than the curves is to be drawn

// Takes an event of the run. The page follows the newest frame unless an earlier one was chosen.
function receive(event) {
  const {lives} = state.recording;
  showSections();
  const list = {step: 'steps', validation: 'validation', frame: 'frames'}[event.event];
  if (event.event === 'begin') {
    const {life, stage, name, command} = event;
    Object.assign(state, {way: life, life: life === 'train' ? life : 'fine-tune'});
    lives[life] = {};
    LIVES[life] = {...told[life], ...(stage === 'reinforce' ? REINFORCEMENT : {})};
    document.title = `${name}, live`;
    document.querySelector('h1').textContent = `${{finetune: 'Fine-tuning', reinforce: 'Reinforcement of'}[stage] ?? 'Training'} ${name}`;
    $('about').textContent = command;
  } else if (event.event === 'measure') {
    $('about').textContent = `Step ${count(event.step)} was the last. The run now measures what came of it; no frame follows.`;
  } else if (event.event === 'end') {
    $('about').textContent = `The run ended at step ${count(event.step)}, at ${clock()}, and no longer serves this page. `
      + 'It shows the run until it is closed; --record FILE keeps what is seen here.';
  }
  if (!life()) return;
  const follows = state.frame >= frames().length - 1;
  if (list) (life()[list] ??= []).push(event);
  else life()[event.event] = event;
  if (follows) state.frame = Math.max(0, frames().length - 1);
  isOther ||= event.event !== 'step' && event.event !== 'validation';
  if (isWaiting) return;
  isWaiting = true;
  requestAnimationFrame(() => {
    if (isOther) draw();
    else keepFocus(drawCurves);
    isWaiting = isOther = false;
  });
}

// Before the first event there is nothing to show below the line that says so.
function showSections(areShown = true) {
  $('bar').hidden = document.querySelector('main').hidden = !areShown;
}

function listen() {
  const source = new EventSource('events');
  source.onopen = () => {
    $('alert').hidden = true;
    if (!life()?.begin) $('about').textContent = 'The run reads its data, measures the model, or compiles its program. It is seen here when it begins.';
  };
  source.onmessage = ({data}) => {
    const event = JSON.parse(data);
    receive(event);
    if (event.event === 'end') source.close();
  };
  source.onerror = () => {
    const step = life()?.steps?.at(-1)?.step;
    if ($('alert').hidden) {
      refuse(`The run at ${location.host} cannot be reached since ${clock()}: it was stopped or killed.`
        + `${step ? ` Step ${count(step)} was the last to be seen.` : ''} This page goes on when a run is there again.`);
    }
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  };
}

if (state.recording.live) {
  $('lives').hidden = $('questions').closest('section').hidden = true;
  document.querySelector('main').prepend($('curves').closest('section'));
  document.querySelector('h1').textContent = 'A run that has not begun';
  showSections(false);
  listen();
}
