'use strict';
// A page that a run serves: takes the events of the run, and says how the run stands.

const KEPT = 2000; // events of a kind, of which every second is dropped when there are more
const clock = () => new Date().toLocaleTimeString();

const told = {...LIVES}; // a run of another stage may follow
let isWaiting = false;
let isOther = false; // whether more than the curves is to be drawn

// Takes an event of the run. The page follows the newest frame unless an earlier one was chosen.
function receive(event) {
  const {lives} = state.recording;
  if (event.event === 'begin') {
    state.way = lifeOf(event);
    state.life = state.way === 'train' ? 'train' : 'fine-tune';
    lives[state.way] = {};
    LIVES[state.way] = {...told[state.way], ...(event.stage === 'reinforce' ? REINFORCEMENT : {})};
  }
  if (!lives[state.way]) return;
  const follows = state.frame >= frames().length - 1;
  fold(lives[state.way], event);
  for (const list of ['steps', 'validation', 'frames']) {
    if (life()[list]?.length > KEPT) life()[list] = life()[list].filter((_, at) => at % 2);
  }
  if (follows) state.frame = Math.max(0, frames().length - 1);
  isOther ||= event.event !== 'step' && event.event !== 'validation';
  if (isWaiting) return;
  isWaiting = true;
  requestAnimationFrame(() => {
    if (isOther) draw();
    else {
      keepFocus(() => {
        drawCurves();
        moveCurves();
      });
    }
    isWaiting = isOther = false;
  });
}

// Says what an event tells of the run.
function follow({event, name, stage, command, step}) {
  if (event === 'begin') {
    document.title = `${name}, live`;
    document.querySelector('h1').textContent = `${{finetune: 'Fine-tuning', reinforce: 'Reinforcement of'}[stage] ?? 'Training'} ${name}`;
    $('about').textContent = command;
  } else if (event === 'end') $('about').textContent = `The run ended at step ${count(step)}, at ${clock()}. This page shows it until it is closed; --record FILE keeps what is seen here.`;
}

function listen() {
  const source = new EventSource('events');
  source.onopen = () => {
    $('alert').hidden = true;
    if (!life()?.begin) $('about').textContent = 'The run reads its data, or its program is compiled. It is seen here when it begins.';
  };
  source.onmessage = ({data}) => {
    const event = JSON.parse(data);
    receive(event);
    follow(event);
    if (event.event === 'end') source.close();
  };
  source.onerror = () => {
    const {step} = life()?.steps?.at(-1) ?? {};
    if ($('alert').hidden) refuse(`The run at ${location.host} cannot be reached since ${clock()}: it was stopped or killed.${step ? ` Step ${count(step)} was the last to be seen.` : ''} This page goes on when a run is there again.`);
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  };
}

if (state.recording.live) {
  $('lives').hidden = $('questions').closest('section').hidden = true;
  document.querySelector('main').prepend($('curves').closest('section'));
  listen();
}
