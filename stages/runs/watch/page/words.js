'use strict';
// The sentences of the page that depend on the life that is shown, or on the recording's numbers.

const STILL = 'Some weights stand still in the first frames: the learning rate, the length of a step, begins at 0; and a matrix of zeros, such as a new head or LoRA’s b, lets no gradient through until it has moved.';
const RECORDED = ['tests/bench/test_lives.py::test_training_moves_what_trains_and_no_bit_of_what_is_frozen', 'tests/stages/test_recorder.py::check_law'];
const FROZEN = 'tests/laws/test_frozen.py::test_frozen_parameters_are_the_same_to_the_bit_after_a_thousand_steps';
const ASKED = 'tests/bench/test_lives.py::test_answering_changes_no_bit_and_no_request_knows_of_another';
const SERVED = 'tests/laws/test_forward_only.py::test_serving_many_changes_no_weight_and_remembers_no_request';
const LIVES = {
  'train': {
    name: 'Training', title: 'Training moves every weight', predicted: 0,
    lead: 'A model is a large set of numbers, its weights. Training begins with random ones. In each step the model guesses how a text goes on (forward); for every weight the gradient is found: how the error of the guess changes with it (backward); and each weight moves a little to where the error is smaller (update).',
    say: 'A frame is the model after one step. Where the lower picture is green, weights have moved since the frame before: that is all that learning is.',
    laws: RECORDED,
  },
  'frozen': {
    name: 'Half frozen', title: 'Frozen weights do not move by one bit',
    lead: 'Fine-tuning goes on with a trained model and a small text. Here a part of the model is frozen, such as the embedding and the first blocks: it takes part in every guess, and no update reaches it.',
    say: 'The gradient comes back from the right and stops at the last layer that needs it, so nothing left of there is green.',
    laws: [FROZEN, RECORDED[0]],
  },
  'lora': {
    name: 'LoRA', title: 'LoRA moves thin strips beside the weights', predicted: 1,
    lead: 'LoRA freezes the whole model and puts two thin matrices, a and b, beside some of its matrices. These strips, the adapters, are all that is trained; their product is added to what the frozen matrix computes.',
    say: 'The gradient passes back through frozen matrices, as it must reach the strips of the first block; only the strips below the matrices turn green.',
    laws: [FROZEN, RECORDED[0]],
  },
  'all': {
    name: 'All weights', title: 'Fine-tuning all weights is training, continued', predicted: 0,
    lead: 'Here no weight is frozen: forward, backward and update are those of training. It costs less only because it reads much less text.',
    say: 'All of the lower picture is green, as in training.',
    laws: RECORDED,
  },
  'answer': {
    name: 'Answering', title: 'Answering moves nothing', predicted: 2,
    lead: 'To answer, the model runs forward once for each token that it writes. There is no right answer to compare with, so there is no error, no gradient and no update.',
    say: 'The lower picture stays empty however often one asks: the SHA-256, a fingerprint of all bits of the weights, is the same before and after.',
    laws: [ASKED, SERVED],
  },
};
// What a page that a run serves says of reinforcement in place of its way of fine-tuning.
const REINFORCEMENT = {
  name: 'Reinforcement', title: 'Reinforcement moves what trains, and nothing else',
  lead: 'In each round the model answers a few prompts several times, which moves no weight. A rule rewards the answers, and the weights that train move to make the better ones more probable.',
};
// Under each picture a sentence or two.
const SAY = {
  unseen: 'No frame was made: that is done while somebody watches, and the last step was over before this page was opened. With --record FILE a run makes frames in any case.',
  text: 'The model is given the grey words and writes on, always with the token that it finds most likely: the weights alone differ.',
  curves: 'The steps go from left to right; the dot is at the frame that is shown. Other text is never trained on; the error there, or the bits per byte (a byte is about a letter), should fall too.',
  step: 'In training, what each layer computes piles up on the way forward and is eaten in reverse order on the way back; answering keeps none of it. Both pictures have one scale. A step computes with copies of the weights with fewer digits (answering holds these alone), and the update makes new values beside the old ones: so weights and optimizer state swell within a step, and end it as large as they began.',
  cache: 'Answering holds the weights, and room for the KV caches of several requests: that is flat. One request fills its room equally with every token, and leaves it when the answer ends.',
  cost: 'Forward is one and backward two more: see “Why three times?” below. A frozen beginning spares its share of backward, LoRA nearly one of its two. The seconds also hold the update and the reading from memory, and vary with what else the machine does.',
  bill: 'What one token costs where many are computed at once (writing token by token takes longer): operations (multiplications and additions) and seconds; × is over answering. Dollars and watt-hours are for a million tokens.',
  requests: 'The same weights answer both, and neither knows of the other: change the words that one sends, its context, and its answer changes; close it, and it is gone.',
  alone: ' Asked alone, the first got the same answer.',
  closed: 'Closed: its text and KV cache are gone; the other request never saw them.',
};

// The questions of a learner and their answers, as pairs.
function questions() {
  const {lives, cost = [], answer} = state.recording;
  const begin = lives.lora?.begin;
  const peak = (each) => si(Math.max(...sums(each.memory)), 'B');
  const ratios = (stage) => {
    const row = cost.find((each) => each.stage === stage);
    return row ? ` Here a token costs **${times(row.counted_ratio)}** forward passes by counting, **${times(row.time_ratio)}** by the clock.` : '';
  };
  return Object.entries({
    'Does it learn when I correct it?': `No. ${answer ? `In ${count(answer.asked)} answers **${count(answer.changed)} of ${count(answer.of)}** weights changed` : 'Answering changes no weight'}. A correction helps only for as long as it stands in the text that is sent along with your next question; in a new conversation it is gone.`,
    'Does it remember what I, or somebody else, asked before?': 'No. A request knows only the text that it sends. What the model noted about that text, its KV cache, is dropped when the answer ends, and no other request can read it. A chat seems to remember because the whole conversation is sent again each time.',
    'Why three times?': `For a token, the forward pass uses each weight once. Backward uses it twice more: once to find how the error changes with what came into the layer, which the layer before needs, and once to find how it changes with the weight itself. One and two are three; answering is the one.${ratios('train')}`,
    'What does LoRA move?': `Only its strips${begin ? `: **${count(begin.trainable)}** numbers beside **${count(begin.params - begin.trainable)}** weights, which stay as they are to the last bit` : ''}. What the strips compute is added to what the matrices compute, so answers can change although none of the model’s own weights did. Take the strips away, and the old model is back.`,
    'What does freezing save, and what not?': `It saves the gradients and optimizer state of the frozen weights, and the backward pass through all layers before the first one that trains${lives.frozen?.memory && lives.all?.memory ? `: memory peaks at **${peak(lives.frozen)}**, and at **${peak(lives.all)}** where all weights are fine-tuned` : ''}.${ratios('frozen')} It does not save the forward pass: every token still goes through all layers. Where the first block trains, as with LoRA, the way back through the layers stays, and only the gradients of the frozen weights are spared.${ratios('lora')}`,
    'Why do many requests cost little more than one?': `To write one token, the processor must read every weight from memory, which takes longer than computing with it. Requests that are answered together share this reading: each adds its own arithmetic and KV cache, which is little until the arithmetic takes as long as the reading.${answer?.token_seconds ? ` Here a token took **${si(answer.token_seconds.alone, 's')}** alone, **${si(answer.token_seconds.together, 's')}** with several requests at once; a model so small that the processor’s cache holds it gains less than a large one.` : ''}`,
    'Why does training need more memory than answering?': `What each layer computed on the way forward is kept until backward needs it; beside each weight that trains lie its gradient and what the update remembers of it. Answering holds the weights and a KV cache.${lives.train?.memory && answer?.memory ? ` Training peaks at **${peak(lives.train)}**, answering at **${peak(answer)}**.` : ''}`,
    'When should I fine-tune, and when is a longer question enough?': 'What stands in the question is read again with every request, at one forward pass a token, and leaves nothing behind: enough for what few requests need, or what changes. Fine-tuning is paid once, at 2 to 3 forward passes a token of its texts, and the weights keep it: for what every request needs.',
  });
}
