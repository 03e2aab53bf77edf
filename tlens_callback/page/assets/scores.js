// Lists the scores that the matrix shows: readings [layer, x], and [block, layer, x] one block at a
// time. A score's name is the key; if there are blocks, a comma and the block's label follow.

const MOST_BLOCKS = 64;
const knownScores = { version: -1, all: new Map() };

function allScores() {
  if (knownScores.version === data.version) return knownScores.all;
  const all = new Map();
  for (const key of data.keys()) {
    const entry = data.entry(key, data.first(key));
    if (!entry || !isMatrix(entry) || besideOther(key)) continue;
    const measure = key.slice(parts(key).instrument.length + 1);
    if (entry.axes.length === 2) {
      all.set(key, { key, lead: 0, measure });
      continue;
    }
    for (let lead = 0; lead < Math.min(entry.shape[0], MOST_BLOCKS); lead++) {
      let label = entry.labels?.[entry.axes[0]]?.[lead] ?? `${entry.axes[0]} ${lead}`;
      if (all.has(`${key}, ${label}`)) label += ` (${lead})`;
      all.set(`${key}, ${label}`, { key, lead, measure: `${measure}, ${label}` });
    }
  }
  Object.assign(knownScores, { version: data.version, all });
  return all;
}

// Rollouts are others at every step, so that a matrix of one of them has no course.
function isMatrix({ axes, unit, shape }) {
  return axes[0] !== "rollout" && (axes.length === 2 || axes.length === 3) && axes.at(-2) === "layer"
    && axes.at(-1) !== "rank" && unit !== "index" && shape.every((size) => size > 0);
}

// A spread is said beside its measure, as ±, and is no entry of its own.
function besideOther(key) {
  const { instrument, measure, probe } = parts(key);
  if (!measure.endsWith("_spread")) return false;
  return data.stepsOf(keyOf(instrument, measure.slice(0, -"_spread".length), probe)).length > 0;
}

const keyOf = (...names) => names.filter((name) => name !== null).join("/");

const scores = () => [...allScores().keys()];
const scoreOf = (name) => allScores().get(name) ?? null;

// What a page opens with: which heads attend elsewhere than at first, as far as any does; of one
// look at a model, which of them write the answer.
function usualScore() {
  const all = scores(), keyed = (name) => scoreOf(name).key;
  const known = (wanted) => all.find((name) => wanted(meaningOf(keyed(name))));
  const moved = known(({ quantity }) => quantity === "attention_change");
  const axes = ({ key }) => data.entry(key, data.first(key)).axes;
  if (moved && data.range(keyed(moved))[1] > 0) return moved;
  const written = known(({ quantity }) => quantity === "direct_effect");
  if (isAlone() && written) return written;
  return known(({ headline, role }) => headline && role === "induction")
    ?? all.find((name) => axes(scoreOf(name)).at(-1) === "head") ?? all[0] ?? null;
}

// Where a head lies in a score's values, or -1.
function placeOfHead(entry, layer, head) {
  if (entry.axes.at(-1) !== "head") return -1;
  const row = indexOf(entry, "layer", layer), column = indexOf(entry, "head", head);
  return row < 0 || column < 0 ? -1 : row * entry.shape.at(-1) + column;
}

// A score of one head over training, or null where it has none.
function scoreCurve(name, layer, head) {
  const score = scoreOf(name);
  if (!score) return null;
  const entry = data.entry(score.key, data.first(score.key));
  const place = placeOfHead(entry, layer, head), [rows, columns] = entry.shape.slice(-2);
  if (place < 0) return null;
  const curve = data.curve(score.key, score.lead * rows * columns + place);
  return { ...curve, label: `${score.measure} L${layer}H${head}`, unit: entry.unit, entry };
}

// What a score says of one head at a step, in words: "induction 0.93".
function scoreOfHead(name, at, layer, head) {
  const score = scoreOf(name), step = score && data.latest(score.key, at);
  if (step === null) return "";
  const entry = data.entry(score.key, step), place = placeOfHead(entry, layer, head);
  if (place < 0) return "";
  const [rows, columns] = entry.shape.slice(-2);
  const value = data.number(score.key, step, score.lead * rows * columns + place);
  return `${plain(score.measure)} ${fmt(value)}`;
}

// The range of one step's values, or of their change since the first step. A step's entry never
// changes: one that is written anew is another.
const ranges = new WeakMap();

function rangeAt({ key, lead }, step, change) {
  const entry = data.entry(key, step), since = change ? data.entry(key, data.first(key)) : null;
  if (!ranges.has(entry)) ranges.set(entry, new Map());
  const known = ranges.get(entry).get(`${lead} ${change}`);
  if (known?.since === since) return known.range;
  const values = data.slice(key, step, lead), first = since && data.slice(key, since.step, lead);
  if (!values || (change && !first)) return null;
  const range = rangeOf(change ? changeOf(values, first) : values);
  ranges.get(entry).set(`${lead} ${change}`, { since, range });
  return range;
}

const changeOf = (values, first) => values.map((value, i) => value - first[i]);

// Values of a score at a step or before it, or minus those of the first step, and their scale;
// null where there is none, or none is decoded yet.
function scoreAt(name, at, change) {
  const score = scoreOf(name), step = score && data.latest(score.key, at);
  if (step === null) return null;
  const { key, lead } = score, firstStep = data.first(key), entry = data.entry(key, step);
  const all = data.stepsOf(key).map((one) => [one, rangeAt(score, one, change)]);
  const now = data.slice(key, step, lead), first = data.slice(key, firstStep, lead);
  const missing = all.filter(([, range]) => !range).map(([one]) => one);
  if (!now) missing.push(step);
  if (!first) missing.push(firstStep);
  if (missing.length) fetchScore(score, missing, change);
  if (!now || (change && !first)) return null;
  const over = change ? "largest change of all steps" : "range of all steps";
  return {
    score, entry, step, firstStep, now, first, spread: spreadOf(score, step),
    values: change ? changeOf(now, first) : now,
    scale: scaleOf(entry, all.flatMap(([, range]) => range ?? []),
      { change, over, open: true }),
  };
}

// Large matrices are decoded one after the other: all of them at once may not fit.
const asked = new Set();

async function fetchScore(score, steps, change) {
  const name = (step) => `${change} ${step} ${score.lead} ${score.key}`;
  const wanted = steps.filter((step) => !asked.has(name(step)));
  for (const step of wanted) asked.add(name(step));
  let found = false;
  for (const step of wanted) {
    await data.ready(score.key, data.first(score.key));
    if (!(await data.ready(score.key, step))) continue;
    found = true;
    rangeAt(score, step, change);
  }
  for (const step of wanted) asked.delete(name(step));
  if (found) redraw("score"); // else it would be asked for again at once
}

function spreadOf({ key }, step) {
  const { instrument, measure, probe } = parts(key);
  const spread = keyOf(instrument, `${measure}_spread`, probe), entry = data.entry(spread, step);
  const same = entry && entry.shape.join() === data.entry(key, step).shape.join();
  return same ? data.values(spread, step) : null;
}

// The texts that name what the cells of a matrix stand for: tokens, behind a reading of their ids.
function textsOf({ key, axes, shape, texts }, step) {
  if (texts) return texts;
  for (const other of data.keys()) {
    const entry = data.entry(other, step);
    if (entry?.texts && entry.unit === "index" && parts(other).probe === parts(key).probe
      && entry.axes.join() === axes.join() && entry.shape.join() === shape.join()) {
      return entry.texts;
    }
  }
  return null;
}
