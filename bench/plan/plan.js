'use strict';
/* The sliders: reads them, computes by the formulas above, and writes intervals. `plans` alone knows no page. */
const DATA = readDocument().sliders;
const around = (middle, spread) => [middle * Math.exp(-spread), middle, middle * Math.exp(spread)];

/* Dollars and kilowatt-hours of device-hours; absent where the device has no price or watts. */
function costs(hours, device) {
  const lines = {};
  if (device.low) lines.dollars = [hours[0] * device.low, hours[1] * Math.sqrt(device.low * device.high), hours[2] * device.high];
  if (device.watts) {
    const [low, high] = DATA.power.map((share) => share * device.watts / 1000);
    lines.energy = [hours[0] * low, hours[1] * Math.sqrt(low * high), hours[2] * high];
  }
  return lines;
}

function train(state, method, tokens) {
  const model = DATA.models[state.model][method], device = DATA.hardware[state.hardware], devices = state.devices;
  const sampling = method === "rl"
    ? devices / serving(model, device, 16, 16, devices, DATA.slots, model.context / 4, 3 * model.context / 4, 0).tokens : 0;
  const result = training(model, device, tokens, devices, sampling);
  const adapter = /^(lora|qlora|freeze)/.test(method), middle = result.device_hours, share = result.efficiency;
  const spread = adapter ? Math.hypot(device.spread, Math.log(1 + DATA.adapter)) : device.spread;
  const hours = [middle * Math.max(share, Math.exp(-spread)), middle, middle * Math.exp(spread)];
  return {result, lines: {
    "FLOPs": Array(3).fill(result.flops), "share of peak": [share * Math.exp(-device.spread), share, Math.min(1, share * Math.exp(device.spread))], "device-hours": hours,
    "wall time": hours.map((bound) => 3600 * bound / devices),
    "memory a device": [DATA.memory[0] * result.least, result.needed, DATA.memory[1] * result.needed],
    ...costs(hours, device),
  }};
}

/* The three answers for the state of the sliders: {name: [low, middle, high]}. */
function plans(state) {
  const model = DATA.models[state.model].pretrain, device = DATA.hardware[state.hardware], spread = DATA.serving.spread;
  const trained = train(state, state.method, state.tokens), bits = DATA.precisions[state.precision];
  const load = (slots) => serving(model, device, ...bits, state.replica, slots, state.prompt, state.answer, state.cached);
  const most = load(DATA.slots), rate = around(most.requests, spread);
  const replicas = [rate[2], rate[1], rate[0]].map((each) => Math.ceil(state.requests / each));
  let loaded = most;
  for (let slots = 1; slots <= most.batch; slots *= 2) {
    const light = load(slots);
    if (light.requests >= state.requests / replicas[1]) { loaded = light; break; }
  }
  const served = {
    "can serve at most": rate, "answer tokens at most": around(most.tokens, spread), "replicas": replicas,
    "first token": around(loaded.first_token, spread), "between tokens": around(loaded.token_seconds, spread),
    "memory a device": Array(3).fill(loaded.needed),
  };
  for (const [name, line] of Object.entries(costs(replicas.map((count) => count * state.replica), device))) {
    served[`${name} a day`] = line.map((bound) => 24 * bound);
    served[`${name} a million answer tokens`] = line.map((bound) => bound / (3600 * state.requests * state.answer) * 1e6);
  }
  const price = device.low ? Math.sqrt(device.low * device.high) : 1;
  const seconds = longer_prompt(model, device, ...bits, state.extra, state.prompt, state.answer);
  const each = {computed: seconds.computed / 3600 * price, cached: seconds.cached / 3600 * price};
  const jobs = {"lora:16": state.tuning, "full": state.tuning, "pretrain": 20 * model.params};
  const even = Object.fromEntries(Object.entries(jobs).map(([method, tokens]) =>
    [method, train(state, method, tokens).lines["device-hours"].map((hours) => hours * price)]));
  return {trained, served, most, loaded, even, each};
}

/* What a reader sees. */
const UNITS = {"FLOPs": "flop", "share of peak": "share", "device-hours": "hours", "wall time": "seconds", "first token": "seconds",
  "between tokens": "seconds", "replicas": "count", "can serve at most": " requests/s", "answer tokens at most": "/s"};
const unit = (name) => UNITS[name] ?? (/memory/.test(name) ? "bytes" : /dollars/.test(name) ? "dollars" : /energy/.test(name) ? "energy" : "rate");
const three = (value) => value >= 1000 ? Math.round(+value.toPrecision(3)).toLocaleString("en") : `${+value.toPrecision(3)}`;
function time(seconds) {
  for (const [scale, name] of [[172800, "days"], [3600, "h"], [60, "min"], [1, "s"]])
    if (seconds >= scale) return `${three(seconds / (name === "days" ? 86400 : scale))} ${name}`;
  return `${three(1000 * seconds)} ms`;
}
function written(value, kind) {
  switch (kind) {
    case "flop": return `${value.toExponential(2).replace("e+", "e")}`;
    case "share": return `${Math.round(100 * value)}%`;
    case "hours": return `${inWords(value)} h`;
    case "seconds": return time(value);
    case "bytes": return `${three(value / 1e9)} GB`;
    case "dollars": return `$${value >= 1e6 ? inWords(value) : three(value)}`;
    case "energy": return value < 0.1 ? `${three(1000 * value)} Wh` : value < 1e4 ? `${three(value)} kWh` : `${three(value / 1000)} MWh`;
    default: return inWords(value) + (kind.endsWith("/s") ? kind : "");
  }
}
const find = (selector) => document.querySelector(selector);
/* `heads`: {name of a line: heading above it}. */
function show(id, lines, heads = {}) {
  find(id).replaceChildren(...Object.entries(lines).flatMap(([name, [low, middle, high]]) => {
    const head = heads[name] ? [Object.assign(document.createElement("div"), {className: "head", textContent: heads[name]})] : [];
    const row = document.createElement("div"), kind = unit(name);
    const bounds = high > low ? `${written(low, kind)} to ${written(high, kind)}` : "";
    for (const [tag, text, style] of [["dt", name, ""], ["dd", written(middle, kind), ""], ["dd", bounds, "bounds"]])
      row.appendChild(Object.assign(document.createElement(tag), {textContent: text, className: style}));
    if (bounds) { // as long as the interval is wide: two centimetres or so for a factor of four
      const bar = Object.assign(document.createElement("i"), {className: "bar"});
      bar.style.width = `${Math.min(140, 60 * Math.log2(high / low))}px`;
      row.lastChild.prepend(bar);
    }
    return [...head, row];
  }));
}
function binding(result, device) {
  const gigabytes = (bytes) => written(bytes, "bytes");
  if (result.needed > SHARE * device.memory)
    return `It does not fit: ${gigabytes(result.needed)} on each device, ${gigabytes(SHARE * device.memory)} free. Take more devices, or another method.`;
  const slowest = Math.max(result.products, result.updates, result.generated);
  if (result.exchanges > slowest) return "What binds: the network, with one text a device at a time.";
  if (slowest === result.products) return "What binds: matrix products." + (result.recompute ? " Activations are computed a second time, to fit." : "");
  return slowest === result.updates ? "What binds: the optimizer's update, by memory bandwidth." : "What binds: generating the answers, by memory bandwidth.";
}
/* One sentence where a request cannot be, as in the terminal; empty where it can. */
function tooLong(tokens) {
  const [wanted, most] = [tokens, DATA.contexts[exactly.model]].map((count) => Math.round(count).toLocaleString("en"));
  return tokens > DATA.contexts[exactly.model] ? `Prompt and answer take ${wanted} tokens; ${exactly.model} has a context of ${most}.` : "";
}
function slowest(load) {
  const parts = {prefilling: "prefill", reading: "reading the weights", attending: "reading the KV cache", multiplying: "products of decoding", launching: `launching kernels, because only ${load.batch} requests run at once`};
  const name = Object.keys(parts).reduce((a, b) => load[a] >= load[b] ? a : b);
  return `${Math.round(100 * load[name] / load.token_seconds)}% of the time goes into ${parts[name]}.`;
}
function plot(even, each) {
  const ways = {"a longer prompt": ["way0", each.computed, 0], "a longer prompt, cached": ["way1", each.cached, 0],
    "LoRA": ["way2", 0, even["lora:16"][1]], "full tuning": ["way4", 0, even.full[1]], "training": ["way3", 0, even.pretrain[1]]};
  const power = (value, round) => 10 ** round(Math.log10(value));
  const low = Math.max(1, power(even["lora:16"][1] / each.computed, Math.floor) / 100), high = power(2 * even.pretrain[1] / each.cached, Math.ceil);
  const priced = DATA.hardware[exactly.hardware].low;
  const across = {name: "requests", low, high, format: inWords};
  const up = {name: priced ? "dollars" : "device-hours", format: (value) => (priced ? "$" : "") + (value < 1 ? +value.toPrecision(1) : value < 1e4 ? count(value) : inWords(value)),
    low: power(Math.min(even["lora:16"][1], each.cached * low * 10), Math.floor), high: power(2 * Math.max(even.pretrain[1], each.cached * low), Math.ceil)};
  const lines = Object.values(ways).map(([kind, slope, fixed]) => ({kind, points: [low, high].map((requests) => [requests, slope * requests + fixed])}));
  find("#plot").replaceChildren(logChart(find("#plot").clientWidth || 640, "What each way has cost after so many requests", across, up, {lines}), lineKey(Object.entries(ways).map(([way, [kind]]) => [kind, way])));
}
/* What was predicted without itself, and what the formulas are. */
function errors() {
  const {validation} = readDocument();
  const notes = (title) => make("details", {}, make("summary", {}, `${validation[title].length} ${title}`),
    make("ul", {}, validation[title].map(({name, error, why}) => make("li", {}, make("b", {}, name), `: ${error < 0 ? "−" : "+"}${percent(Math.abs(error))}; ${why}`))));
  const formulas = [...document.scripts].find(({textContent}) => textContent.includes("function efficiency(")).textContent;
  find("#errors").replaceChildren(
    table("The error is the median, without its sign.", ["predicted", "rows", "median error", "inside the interval"],
      Object.entries(validation.table).map(([name, row]) => [name, row.rows, `${(100 * row.median).toFixed(1)}%`, percent(row.inside)])),
    notes("outside their interval"), notes("not clean, so in no figure"), make("details", {}, make("summary", {}, "The formulas"), make("pre", {tabIndex: 0}, formulas)));
}
const POWERS = {devices: 2, replica: 2, tokens: 10, requests: 10, prompt: 10, answer: 10, extra: 10, tuning: 10};
const START = {method: "pretrain", devices: 8, tokens: 1e11, requests: 20, prompt: 1000, answer: 250, cached: 0, replica: 1, precision: "bfloat16", extra: 2000, tuning: 1e7};
const fields = [...document.querySelectorAll("select, input")];
let exactly = {...START, ...DATA.state};
function refresh() {
  for (const field of fields) if (field.type === "range") {
    const value = exactly[field.name];
    field.previousElementSibling.textContent = field.name === "cached" ? `${Math.round(100 * value)}%` : inWords(value);
    field.setAttribute("aria-valuetext", field.previousElementSibling.textContent);
  }
  const {trained, served, most, loaded, even, each} = plans(exactly), device = DATA.hardware[exactly.hardware];
  show("#trained", trained.lines);
  const [days, dollars] = ["wall time", "dollars"].map((name) => trained.lines[name] && written(trained.lines[name][1], unit(name)));
  const fits = trained.result.needed <= SHARE * device.memory;
  find("#training").textContent = fits ? `${inWords(exactly.tokens)} tokens take ${days}${dollars ? ` and ${dollars}` : ""}` : "It does not fit";
  find("#trained-binds").textContent = binding(trained.result, device);
  const best = optimal(trained.result.flops, ...["a", "b", "alpha", "beta"].map((name) => DATA.law[name]));
  find("#trained-best").textContent = `As many FLOPs train ${inWords(best)} parameters on ${inWords(trained.result.flops / 6 / best)} tokens to the least loss (Besiroglu 2024).`;
  find("#trained-where").textContent = `Efficiency: ${device.origin}.` + (device.price ? ` Price: ${device.price}.` : " No price was found in a source.");
  const length = exactly.prompt + exactly.answer, refused = tooLong(length), longer = tooLong(length + exactly.extra);
  const place = `${exactly.model} on ${exactly.hardware}`, some = exactly.replica > 1 ? `${exactly.replica} × ` : "";
  show("#served", most.fits && !refused ? served : {}, {
    "can serve at most": `Full: one replica of ${exactly.model} on ${some}${exactly.hardware}`,
    "replicas": `At the ${inWords(exactly.requests)} requests a second asked for, ${loaded.batch} at once in a replica`,
  });
  find("#serving").textContent = refused || !most.fits ? "Serve" : `${inWords(exactly.requests)} requests a second take ${served.replicas[1] === 1 ? "one replica" : `${inWords(served.replicas[1])} replicas`}`;
  find("#even").textContent = longer ? "A longer prompt, or tuning, or training?" : `Tuning with LoRA pays after ${inWords(even["lora:16"][1] / each.computed)} requests`;
  find("#even-where").textContent = `${place}: what it has cost after so many requests. A longer prompt costs with each of them, tuning and training once.`;
  find("#served-binds").textContent = refused || (most.fits ? slowest(loaded) : "It does not fit: take more devices in a replica, or fewer bits.");
  find("#served-where").textContent = `Rates: ${DATA.serving.origin}.`;
  find("#plot").hidden = Boolean(longer);
  if (!longer) plot(even, each);
  const bounds = (cost) => [even["lora:16"][0] / (cost * Math.exp(DATA.serving.spread)), even["lora:16"][2] * Math.exp(DATA.serving.spread) / cost];
  const [fewest, many] = bounds(each.computed), [least, most_] = bounds(each.cached);
  const both = (cost) => `${inWords(cost / each.computed)} requests (${inWords(cost / each.cached)} with a prefix cache)`;
  find("#manager").textContent = longer || `A longer prompt and LoRA cost the same at ${both(even["lora:16"][1])}. Both costs are known within bounds only, so put ${inWords(exactly.extra)} tokens into each prompt while fewer than ${inWords(fewest)} (${inWords(least)}) are to come, and tune with LoRA beyond ${inWords(many)} (${inWords(most_)}). Training a model anew costs the same at ${both(even.pretrain[1])}. That is computing alone: examples cost too, and how good answers are must be measured.`;
}
const options = {model: Object.keys(DATA.models), hardware: Object.keys(DATA.hardware), method: Object.keys(Object.values(DATA.models)[0]), precision: Object.keys(DATA.precisions)};
for (const field of fields) {
  const base = POWERS[field.name];
  if (field.tagName === "SELECT") field.append(...options[field.name].map((name) => new Option(name)));
  field.value = base ? Math.log(exactly[field.name]) / Math.log(base) : exactly[field.name];
  field.addEventListener("input", () => {
    const value = field.tagName === "SELECT" ? field.value : +field.value;
    exactly = {...exactly, [field.name]: base === 2 ? 2 ** value : base ? Math.round(+(10 ** value).toPrecision(2) * 100) / 100 : value};
    refresh();
  });
}
refresh();
errors();
addEventListener("resize", refresh);
