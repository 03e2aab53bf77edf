// Finds the readings of rollouts, completions that a model sampled while it learned from rewards,
// and arranges those of one step: groups that share a prompt, and in each the best first.

const ROLLOUT_AXES = { token: "rollout,pos", prompt: "group,pos", group: "rollout", advantage: "rollout",
  reward: "rollout,function", attention: "rollout,layer,head,key" };

// Instrument -> {token, prompt, group, advantage, reward, attention: key or undefined, facts: keys of
// one number a rollout, measures: keys of one number a token}.
const allRollouts = remembered(() => {
  const all = new Map();
  for (const key of data.keys()) {
    const { axes, texts, unit } = data.entry(key, data.first(key)), along = axes.join();
    const { instrument } = parts(key), kind = (meaningOf(key).quantity ?? "").replace(/^rollout_/, "");
    if (!all.has(instrument)) all.set(instrument, { instrument, facts: [], measures: [] });
    const one = all.get(instrument);
    if (ROLLOUT_AXES[kind] === along) one[kind] ??= key;
    else if (along === "rollout") one.facts.push(key);
    else if (along === "rollout,pos" && !texts && unit !== "index") one.measures.push(key);
  }
  return new Map([...all].filter(([, one]) => one.group ?? one.advantage ?? one.token));
});

// Keys of contrasts of winners and losers, one number a head.
const contrasts = remembered(() => data.keys().filter((key) => meaningOf(key).quantity === "contrast"
  && data.entry(key, data.first(key)).axes.join() === "layer,head"));

// Whether a key says more of a contrast: "contrast_direct_length" of "contrast_direct".
function isBesideContrast(key) {
  const of = [...contrasts(), ...rankedContrasts()].find((one) => key.startsWith(`${one}_`));
  return of !== undefined && key.slice(of.length) in BESIDE;
}
const BESIDE = { _p: "share of chance that does as much", _length: "correlation with length", _sign: "mean sign so far",
  _run: "", _run_q: "" };

const hasRollouts = () => allRollouts().size > 0 || contrasts().length > 0;

// What is asked for often and changes only with the data.
function remembered(make) {
  let version = -1, value = null;
  return () => {
    if (version !== data.version) [value, version] = [make(), data.version];
    return value;
  };
}

// Whether the section of rollouts shows a reading, so that no other panel has to.
function isShownAsRollouts(key) {
  const { axes } = data.entry(key, data.first(key)), { quantity } = meaningOf(key);
  if (quantity === "contrast" || quantity === "contrast_q" || isBesideContrast(key)) return true;
  const along = axes.join();
  return allRollouts().has(parts(key).instrument)
    && (["rollout", "rollout,pos"].includes(along) || Object.values(ROLLOUT_AXES).includes(along));
}

const chosenRollouts = () => allRollouts().get(state.rollouts) ?? [...allRollouts().values()][0] ?? null;

// The rollouts at a step or before it: {step, names, groups: [{name, prompt, rollouts: [{i, name,
// advantage, rewards, tokens}]}]}; prompt and tokens are texts, or null where none are at hand. All
// are of one step: those of another step are other completions.
function rolloutsAt(one, at) {
  const base = one.group ?? one.advantage ?? one.token, step = data.latest(base, at);
  if (step === null) return null;
  const entryOf = (key) => (key ? data.entry(key, step) : null);
  const valuesAt = (key) => (entryOf(key) ? data.values(key, step) : null);
  const [count] = entryOf(base).shape, names = namesOf(one, step, count);
  const rows = valuesAt(one.group), advantages = valuesAt(one.advantage), rewards = valuesAt(one.reward);
  const functions = entryOf(one.reward)?.shape[1] ?? 0, groups = new Map();
  for (let i = 0; i < count; i++) {
    const row = Number.isFinite(rows?.[i]) ? rows[i] : 0;
    if (!groups.has(row)) groups.set(row, groupOf(entryOf(one.prompt), row));
    groups.get(row).rollouts.push({ i, name: names[i], advantage: advantages?.[i] ?? NaN,
      tokens: tokensOfRow(entryOf(one.token), i),
      rewards: Array.from({ length: functions }, (_, j) =>
        [nameOf(entryOf(one.reward), "function", j), rewards?.[i * functions + j] ?? NaN]) });
  }
  const weight = ({ advantage }) => (Number.isNaN(advantage) ? -Infinity : advantage);
  for (const { rollouts } of groups.values()) {
    rollouts.sort((a, b) => (weight(a) < weight(b) ? 1 : weight(a) > weight(b) ? -1 : a.i - b.i));
  }
  return { one, step, names, groups: [...groups].sort(([a], [b]) => a - b).map(([, group]) => group) };
}

function groupOf(prompt, row) {
  return { name: prompt?.labels.group?.[row] ?? String(row + 1), prompt: tokensOfRow(prompt, row), rollouts: [] };
}

// "1.2": the second of the first group, as any of the readings says.
function namesOf(one, step, count) {
  const named = [one.token, one.group, one.advantage, one.reward, ...one.facts, ...one.measures]
    .map((key) => key && data.entry(key, step)?.labels.rollout).find((labels) => labels?.length === count);
  return named ?? Array.from({ length: count }, (_, i) => String(i + 1));
}

// The texts of one row's tokens, without what fills it up at its end; null where there are none.
function tokensOfRow(entry, row) {
  if (!entry?.texts || !(row < entry.shape[0])) return null;
  let end = (row + 1) * entry.shape[1];
  while (end > row * entry.shape[1] && entry.texts[end - 1] === "") end--;
  return entry.texts.slice(row * entry.shape[1], end);
}

// The name of a measure in plain words: its title, where no other of these has the same.
function titleIn(keys, key) {
  const { title } = meaningOf(key), { measure } = parts(key);
  const alone = (other) => meaningOf(other).title !== title || parts(other).measure === measure;
  return (title && keys.every(alone) ? title : measure.replaceAll("_", " ")) + ofWhat(key);
}
// What a measure is of, where there are several: ": sparse_features 5".
const ofWhat = (key) => (parts(key).probe === null ? "" : `: ${parts(key).probe}`);

const withoutInstrument = (key) => key.slice(parts(key).instrument.length + 1);

// Whether all values of a reading are yes or no, 1 or 0.
const yesOrNo = new Map(); // key -> {version, is}

function isYesOrNo(key) {
  const version = data.versionOf(key);
  if (yesOrNo.get(key)?.version === version) return yesOrNo.get(key).is;
  const { limits, unit } = data.entry(key, data.first(key));
  const is = limits?.join() === "0,1" && unit !== "probability" && data.stepsOf(key).every((step) =>
    (data.values(key, step) ?? []).every((value) => value === 0 || value === 1 || Number.isNaN(value)));
  yesOrNo.set(key, { version, is });
  return is;
}

// A number with its unit, in words.
function saidOf(key, value) {
  if (Number.isNaN(value)) return "unknown";
  if (isYesOrNo(key)) return value ? "yes" : "no";
  return `${fmt(value)} ${data.entry(key, data.first(key)).unit}`;
}

// The attention of one head to the tokens of a rollout, [key]: first those of the prompt; null where
// that rollout has none here, or it is not decoded yet.
function attentionOf(got, rollout, layer, head) {
  const key = got.one.attention, entry = key && data.entry(key, got.step);
  if (!entry) return null;
  const labels = entry.labels.rollout, row = labels ? labels.indexOf(rollout.name) : rollout.i;
  const line = indexOf(entry, "layer", layer), column = indexOf(entry, "head", head);
  if (row < 0 || row >= entry.shape[0] || line < 0 || column < 0) return null;
  const size = entry.shape[3];
  return data.slice(key, got.step, row * entry.shape[1] + line)?.subarray(column * size, (column + 1) * size) ?? null;
}
