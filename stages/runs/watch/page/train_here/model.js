'use strict';
// The model, loss and AdamW of engine/by_hand, on jax-js, which takes the gradient. A token is a byte. B rows of a batch, T tokens,
// D width, H size of a head, F hidden, V vocabulary. jax-js counts references: a call uses up its arguments; x.ref is one more use.

const MODEL = {vocab: 256, width: 64, layers: 3, heads: 4, ff: 208, context: 64, rope_theta: 10000, eps: 1e-5};
const ADAMW = {learning_rate: 3e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1, warmup: 8};
const BATCH = 8;

/** Returns random weights, the same ones each time. The head is small: the first loss is about ln V, a pure guess. */
function initialWeights() {
  const {vocab: V, width: D, ff: F, layers} = MODEL;
  let seed = 0;
  const matrix = (rows, columns, scale = rows ** -0.5) => jax.random.normal(jax.random.key(seed++), [rows, columns]).mul(scale);
  const gain = () => jax.numpy.ones([D]);
  const blocks = Array.from({length: layers}, () => ({
    attn_norm: gain(), q: matrix(D, D), k: matrix(D, D), v: matrix(D, D), out: matrix(D, D),
    mlp_norm: gain(), gate: matrix(D, F), up: matrix(D, F), down: matrix(F, D),
  }));
  return {embed: matrix(V, D), blocks, norm: gain(), head: matrix(D, V, 0.02)};
}

/** Returns a step's tokens and targets, B rows of T each: windows spread evenly over the text by the golden ratio. */
function batchOf(bytes, step) {
  const T = MODEL.context, windows = Array.from({length: BATCH}, (_, row) => {
    const start = Math.floor((((BATCH * step + row) * 0.6180339887) % 1) * (bytes.length - T));
    return [...bytes.slice(start, start + T + 1)];
  });
  return [windows.map((window) => window.slice(0, T)), windows.map((window) => window.slice(1))];
}

/** Returns two compiled programs: `logits`, the forward pass alone, and `step`, which makes new weights. */
function programs() {
  const {numpy: np, nn, tree} = jax, {width: D, heads, eps} = MODEL, H = D / heads;

  function rmsNorm(x, gain) {
    const rms = np.sqrt(np.mean(x.ref.mul(x.ref), -1, {keepdims: true}).add(eps));
    return gain.mul(x.div(rms));
  }

  function rope(x, cos, sin) {
    const [a, b] = np.split(x, 2, -1);
    return np.concatenate([a.ref.mul(cos.ref).sub(b.ref.mul(sin.ref)), b.mul(cos.ref).add(a.mul(sin.ref))], -1);
  }

  /** tokens (B, T) -> logits (B, T, V) */
  function forward(weights, tokens) {
    const [B, T] = tokens.shape;
    const speeds = np.array(Array.from({length: H / 2}, (_, i) => MODEL.rope_theta ** ((-2 * i) / H)));
    const angles = np.outer(np.arange(T).astype(np.float32), speeds).reshape([T, 1, H / 2]);
    const cos = np.cos(angles.ref), sin = np.sin(angles), split = (x) => x.reshape([B, T, heads, H]);
    let x = np.take(weights.embed, tokens, 0);
    for (const w of weights.blocks) {
      let h = rmsNorm(x.ref, w.attn_norm);
      const q = rope(split(np.matmul(h.ref, w.q)), cos, sin), k = rope(split(np.matmul(h.ref, w.k)), cos, sin);
      const mixed = nn.dotProductAttention(q, k, split(np.matmul(h, w.v)), {isCausal: true});
      x = x.add(np.matmul(mixed.reshape([B, T, D]), w.out));
      h = rmsNorm(x.ref, w.mlp_norm);
      x = x.add(np.matmul(nn.silu(np.matmul(h.ref, w.gate)).mul(np.matmul(h, w.up)), w.down));
    }
    cos.dispose(), sin.dispose();
    return np.matmul(rmsNorm(x, weights.norm), weights.head);
  }

  /** Mean nats of a target. */
  function loss(weights, tokens, targets) {
    const picked = nn.logSoftmax(forward(weights, tokens), -1).mul(nn.oneHot(targets, MODEL.vocab));
    return np.sum(picked, -1).mean().neg();
  }

  /** Returns new weights and moments, and the loss. */
  function step(weights, first, second, tokens, targets, rate, correction1, correction2) {
    const {beta1, beta2, eps, clip, weight_decay} = ADAMW;
    const [value, gradient] = jax.valueAndGrad(loss)(tree.ref(weights), tokens, targets);
    const squares = tree.leaves(gradient).map((g) => np.sum(g.ref.mul(g.ref)));
    const shrink = np.minimum(np.array(clip).div(np.sqrt(squares.reduce(np.add))), 1);
    const clipped = tree.map((g) => g.mul(shrink.ref), gradient);
    first = tree.map((m, g) => m.mul(beta1).add(g.ref.mul(1 - beta1)), first, clipped);
    second = tree.map((v, g) => v.mul(beta2).add(g.ref.mul(g).mul(1 - beta2)), second, clipped);
    const update = (p, m, v) => {
      const direction = m.ref.div(correction1.ref).div(np.sqrt(v.ref.div(correction2.ref)).add(eps));
      const decay = p.ndim > 1 ? weight_decay : 0;
      return p.ref.sub(rate.ref.mul(direction.add(p.mul(decay))));
    };
    weights = tree.map(update, weights, first, second);
    for (const scalar of [shrink, rate, correction1, correction2]) scalar.dispose();
    return [weights, first, second, value];
  }

  return {logits: jax.jit(forward), step: jax.jit(step)};
}
