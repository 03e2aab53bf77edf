// Holds what is shown: step, head, probe, ... It is in the address, so that a link shows the same.

const START = Object.freeze({
  step: null, // the slider
  other: null, // a second step to compare with, or null
  score: null, // name of what the matrix shows
  change: false, // the matrix as change since the first step
  layer: null, head: null,
  pattern: null, // what the attention card shows, "instrument/measure"; null: attention
  probe: null, // whose patterns and tokens are shown
  query: null, // the token that is looked from
  pins: [], // [[layer, head], ...]
  rollouts: null, // the instrument whose rollouts are shown; null: the first
  colour: null, // the measure that colours their tokens; null: the usual one
  contrast: null, // key of the contrast of winners and losers; null: the first
  numbers: false, // all numbers of a rollout, not only the first few
  curves: null, // keys of further curves; null: the usual ones
});
const MOST_PINS = 12;
const state = { ...START };
const views = []; // {draw(changed)}: `changed` is a Set of the names above, "data", "size", "theme"

let pending = null;

function set(values) {
  const changed = Object.keys(values).filter((name) => values[name] !== state[name]);
  if (!changed.length) return;
  Object.assign(state, values);
  redraw(...changed);
  writeAddress(changed.some((name) => !["step", "query", "other"].includes(name)));
}

function redraw(...changed) {
  if (!pending) {
    pending = new Set();
    requestAnimationFrame(() => {
      const what = pending;
      pending = null;
      for (const view of views) view.draw(what);
    });
  }
  for (const name of changed) pending.add(name);
}

let writing = 0, turned = false;

// `turn`: a choice that "back" should undo; a moving slider is none.
function writeAddress(turn = false) {
  turned ||= turn;
  clearTimeout(writing); // browsers refuse more than a hundred of these in half a minute
  writing = setTimeout(() => {
    const address = `#${addressOf()}`, push = turned;
    turned = false;
    if (address === location.hash) return;
    try {
      history[push ? "pushState" : "replaceState"](null, "", address);
    } catch {
      // A frame without an address of its own (srcdoc) has none to write to.
    }
  }, 150);
}

function addressOf() {
  const words = new URLSearchParams();
  // A page that follows a run follows it again when it is opened anew.
  if (!(data.about.live && state.step === data.steps.at(-1))) words.set("step", state.step);
  if (state.other !== null) words.set("other", state.other);
  if (state.score) words.set("score", state.score);
  if (state.change) words.set("change", 1);
  words.set("head", `${state.layer}.${state.head}`);
  if (state.pattern !== null) words.set("pattern", state.pattern);
  if (state.probe !== null) words.set("probe", state.probe);
  if (state.query !== null) words.set("query", state.query);
  if (state.pins.length) words.set("pins", state.pins.map((pin) => pin.join(".")).join(","));
  for (const name of ["rollouts", "colour", "contrast"]) if (state[name] !== null) words.set(name, state[name]);
  if (state.numbers) words.set("numbers", 1);
  for (const key of state.curves ?? []) words.append("curves", key);
  if (state.curves && !state.curves.length) words.set("curves", "");
  return words;
}

// What the address says, or else the page itself of how it opens, as values for all of `state`.
function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1) || (data.about.view ?? ""));
  const whole = (text) => (/^\d{1,15}$/.test(text ?? "") ? Number(text) : null);
  const pair = (text) =>
    (/^\d{1,9}\.\d{1,9}$/.test(text ?? "") ? text.split(".").map(Number) : null);
  const [layer, head] = pair(words.get("head")) ?? [null, null];
  return {
    step: whole(words.get("step")),
    other: whole(words.get("other")),
    score: words.get("score"),
    change: words.has("change"),
    layer, head,
    pattern: words.get("pattern"),
    probe: words.get("probe"),
    query: whole(words.get("query")),
    pins: words.get("pins")?.split(",").map(pair).filter(Boolean) ?? [],
    rollouts: words.get("rollouts"),
    colour: words.get("colour"),
    contrast: words.get("contrast"),
    numbers: words.has("numbers"),
    curves: words.has("curves") ? words.getAll("curves").filter(Boolean) : null,
  };
}

const nearest = (step, steps = data.steps) =>
  steps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));

// Brings what the address or a click says to what there is.
function settle() {
  if (!data.steps.length) return;
  state.step = nearest(state.step ?? data.steps.at(-1));
  if (isAlone()) Object.assign(state, { other: null, change: false });
  if (state.other !== null) state.other = nearest(state.other);
  if (!scores().includes(state.score)) state.score = usualScore();
  if (!probes().includes(state.probe)) state.probe = probes()[0] ?? null;
  if (!isHead(state.layer, state.head)) [state.layer, state.head] = usualHead();
  const pins = new Map(state.pins.map((pin) => [pin.join("."), pin]));
  state.pins = [...pins.values()].filter((pin) => isHead(...pin)).slice(0, MOST_PINS);
}

// Entries with layers and heads: of the score that is shown, of other scores, of patterns.
function headEntries() {
  const keys = [state.score, ...scores()].map((name) => scoreOf(name)?.key);
  const attention = [...allRollouts().values()].map((one) => one.attention);
  return [...new Set([...keys, ...patterns(), ...attention])].filter((key) => key && data.first(key) !== null)
    .map((key) => data.entry(key, data.latest(key, state.step) ?? data.first(key)))
    .filter(({ axes, shape }) => axes.includes("layer") && axes.includes("head") && product(shape));
}

function isHead(layer, head) {
  return layer !== null && headEntries().some((entry) =>
    indexOf(entry, "layer", layer) >= 0 && indexOf(entry, "head", head) >= 0);
}

// The head with the highest value of the score, since most heads do little; of those whose
// attention can be shown, where there are any.
function usualHead() {
  const [entry] = headEntries(), score = scoreOf(state.score), key = shownPattern();
  if (!entry) return [0, 0];
  const shown = score?.key === entry.key && data.slice(entry.key, entry.step, score.lead);
  const heads = entry.shape[entry.axes.indexOf("head")];
  const nameAt = (i) =>
    [numberOf(entry, "layer", Math.floor(i / heads)), numberOf(entry, "head", i % heads)];
  const pattern = key && data.entry(key, data.latest(key, state.step) ?? data.first(key));
  const there = new Set(pattern ? headsIn(pattern).map(String) : []);
  let best = -1;
  (shown || []).forEach((value, i) => {
    if (there.size && !there.has(String(nameAt(i)))) return;
    if (value > (shown[best] ?? -Infinity)) best = i;
  });
  return best < 0 && there.size ? headsIn(pattern)[0] : nameAt(Math.max(best, 0));
}

// Keys of attention patterns [layer, head, query, key].
function patterns() {
  return data.keys().filter((key) => {
    const { axes } = data.entry(key, data.first(key));
    return axes.join() === "layer,head,query,key";
  });
}

function probes() {
  const named = data.keys().map((key) => parts(key).probe);
  const ofPatterns = patterns().map((key) => parts(key).probe);
  return [...new Set([...ofPatterns, ...named])].filter((name) => name !== null);
}
