// Says what colours the tokens of rollouts: which reading, its scale, and the numbers of a token.

const MOST_SAMPLED = 200_000;
const SHARE_COLOURED = 0.99; // of all tokens: a few far out would leave all others pale

// The choices: [value, words], a measure of tokens each, and last the attention of a head. Of features
// each step may have others: those of this one, and the one that is chosen.
function tintChoices(one, step) {
  const chosen = tintKey(one);
  const here = one.measures.filter((key) => parts(key).probe === null || data.has(key, step) || key === chosen);
  return [...here, ...(one.attention ? [one.attention] : [])]
    .map((key) => [withoutInstrument(key), key === one.attention ? "attention of the chosen head" : titleIn(one.measures, key)]);
}

// The reading that colours the tokens: the chosen one, or else a headline, or else the first.
function tintKey(one) {
  const keys = [...one.measures, ...(one.attention ? [one.attention] : [])];
  return keys.find((key) => withoutInstrument(key) === state.colour)
    ?? keys.find((key) => meaningOf(key).headline) ?? keys[0] ?? null;
}

// {key, unit, scale, at(rollout, j), isHere}: the scale is null while nothing is decoded.
function tintOf(got) {
  const { one, step } = got, key = tintKey(one), entry = key && data.entry(key, step);
  if (!entry) return { key, unit: "", scale: null, at: () => NaN, isHere: false };
  if (key === one.attention) {
    const rows = new Map(), prompts = new Map();
    for (const { prompt, rollouts } of got.groups) {
      for (const rollout of rollouts) {
        prompts.set(rollout.i, prompt?.length ?? 0);
        rows.set(rollout.i, attentionOf(got, rollout, state.layer, state.head));
      }
    }
    return { key, unit: entry.unit, scale: attentionScale([...rows.values()]), isHere: true,
      at: (rollout, j) => rows.get(rollout.i)?.[prompts.get(rollout.i) + j] ?? NaN };
  }
  const width = entry.shape[1];
  return { key, unit: entry.unit, isHere: true, scale: data.codes(key, step) ? tokenScale(key) : null,
    at: (rollout, j) => (j < width ? data.number(key, step, rollout.i * width + j) : NaN) };
}

// Colours of what the sampled tokens look at: the few tokens that get most of it share one.
function attentionScale(rows) {
  const values = rows.flatMap((row) => (row ? Array.from(row) : [])).filter(Number.isFinite);
  const over = "the largest 2 % share the last colour";
  return values.length ? { ...behindText(quantile(values, 0.98)), over } : null;
}

const tokenScales = new Map(); // key -> {version, decoded, scale}

// Colours over all steps, so that one step can be compared with another.
function tokenScale(key) {
  const version = data.versionOf(key), steps = data.stepsOf(key).filter((step) => data.codes(key, step));
  const known = tokenScales.get(key);
  if (known?.version === version && known.decoded === steps.length) return known.scale;
  const { limits, unit } = data.entry(key, data.first(key));
  const scale = limits?.every(Number.isFinite) && ["probability", "fraction"].includes(unit)
    ? { ...behindText(limits[1]), diverging: limits[0] < 0, oneSided: limits[0] < 0 ? 0 : 1, root: false, given: true }
    : scaleOfSample(sampleOver(key, steps));
  tokenScales.set(key, { version, decoded: steps.length, scale });
  return scale;
}

function sampleOver(key, steps) {
  const each = Math.ceil(MOST_SAMPLED / steps.length), found = [];
  for (const step of steps) {
    const codes = data.codes(key, step), entry = data.entry(key, step);
    const by = Math.max(1, Math.floor(codes.length / each));
    for (let i = 0; i < codes.length; i += by) {
      const value = toFloat(entry, codes[i]);
      if (Number.isFinite(value)) found.push(value);
    }
  }
  return found;
}

function scaleOfSample(values) {
  const [least, most] = rangeOf(values), far = quantile(values.map(Math.abs), SHARE_COLOURED);
  const over = "the largest 1 % of all steps share the last colour";
  const diverging = least < 0 && most > 0;
  return { ...behindText(far), diverging, oneSided: diverging ? 0 : least < 0 ? -1 : 1, over };
}

// By the square root of the magnitude, for small values are many.
const behindText = (far) => ({ low: far > 0 ? -far : -1, high: far > 0 ? far : 1, diverging: false, oneSided: 1, root: true, given: false });

function quantile(values, share) {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? 0;
}

// What a token of a rollout tells: its place and text, then every measure in words.
function toldOfToken(got, rollout, j, name, tint) {
  const lines = got.one.measures.map((key) => {
    const entry = data.entry(key, got.step), width = entry?.shape[1] ?? 0;
    const value = j < width ? data.number(key, got.step, rollout.i * width + j) : NaN;
    return Number.isNaN(value) ? null : `${titleIn(got.one.measures, key)}: ${saidOf(key, value)}`;
  });
  const looked = tint.key === got.one.attention ? tint.at(rollout, j) : NaN;
  if (!Number.isNaN(looked)) lines.push(`attention of L${state.layer}H${state.head} to it: ${fmt(looked)} ${tint.unit}`);
  return [`${j} ${name}`, ...lines.filter(Boolean)];
}
