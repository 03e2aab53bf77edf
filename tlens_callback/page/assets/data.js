// Holds the readings of a run: decodes them, and answers questions about them.
//
// data.steps                    observed steps, ascending: where the slider stops
// data.keys()                   keys in order of appearance
// data.has(key, step)           data.stepsOf(key)         data.latest(key, step): step at or before
// data.entry(key, step)         {key, axes, unit, shape, limits, labels, texts, select, step}
// data.values(key, step)        Float32Array to read, or null if it is not decoded yet
// data.slice(key, step, lead)   Float32Array [rows * columns] of the last two axes, or null
// data.number(key, step, i)     one value
// data.curve(key, i)            {steps, values}
// data.range(key)               [low, high] over all steps decoded so far, [] if none is
// data.version, .versionOf(key) grow when the data (of a key) change
// await data.ready(key, step)   decodes a large reading (patterns); true if that worked

const MOST_DECODED = 256e6; // bytes of large readings that are kept decoded

const data = {
  about: {}, steps: [], version: 0,
  series: new Map(), // key -> {steps, at: step -> entry, version, range}
  large: new Map(), // step -> base64 of its large blobs
  decoded: new Map(), decodedBytes: 0, waiting: new Map(),

  keys() { return [...this.series].filter(([, one]) => one.steps.length).map(([key]) => key); },
  stepsOf(key) { return this.series.get(key)?.steps ?? []; },
  has(key, step) { return this.series.get(key)?.at.has(step) ?? false; },
  entry(key, step) { return this.series.get(key)?.at.get(step) ?? null; },
  latest(key, step) {
    const steps = this.stepsOf(key);
    return steps[after(steps, step) - 1] ?? null;
  },
  first(key) { return this.stepsOf(key)[0] ?? null; },
  versionOf(key) { return this.series.get(key)?.version ?? 0; },

  codes(key, step) {
    const entry = this.entry(key, step);
    return entry ? entry.codes ?? this.decoded.get(`${step} ${key}`) ?? null : null;
  },
  number(key, step, i) {
    const entry = this.entry(key, step), codes = this.codes(key, step);
    if (!codes || entry.tril || entry.select) return this.values(key, step)?.[i] ?? NaN;
    return i < codes.length ? toFloat(entry, codes[i]) : NaN;
  },
  values(key, step) {
    const entry = this.entry(key, step), codes = this.codes(key, step);
    if (!codes) return null;
    if (entry.axes.length >= 2 && (entry.tril || entry.select)) {
      const [rows, columns] = entry.shape.slice(-2), size = rows * columns;
      const lead = product(entry.shape.slice(0, -2));
      const out = new Float32Array(lead * size).fill(NaN);
      for (let i = 0; i < lead; i++) {
        const one = this.slice(key, step, i);
        if (one) out.set(one, i * size);
      }
      return out;
    }
    return floats(entry, codes);
  },
  slice(key, step, lead) {
    const entry = this.entry(key, step), codes = this.codes(key, step);
    if (!codes) return null;
    if (entry.select) {
      lead = entry.select.indexOf(lead);
      if (lead < 0) return null;
    }
    const [rows, columns] = entry.shape.slice(-2);
    const size = entry.tril ? (rows * (rows + 1)) / 2 : rows * columns;
    if ((lead + 1) * size > codes.length) return null;
    const found = floats(entry, codes.subarray(lead * size, (lead + 1) * size));
    if (!entry.tril) return found;
    const out = new Float32Array(rows * columns);
    for (let row = 0, at = 0; row < rows; at += ++row) {
      out.set(found.subarray(at, at + row + 1), row * columns);
    }
    return out;
  },
  curve(key, i = 0) {
    const steps = this.stepsOf(key).filter((step) => this.codes(key, step));
    return { steps, values: steps.map((step) => this.number(key, step, i)) };
  },
  range(key) {
    const series = this.series.get(key);
    if (!series) return [];
    series.range ??= this.extent(key);
    return series.range;
  },
  extent(key) {
    let low = Infinity, high = -Infinity;
    for (const step of this.stepsOf(key)) {
      for (const value of this.values(key, step) ?? []) {
        if (!Number.isFinite(value)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    return low <= high ? [low, high] : [];
  },

  async ready(key, step) {
    const entry = this.entry(key, step);
    if (!entry) return false;
    const name = `${step} ${key}`;
    if (entry.codes) return true;
    if (this.decoded.has(name)) {
      const codes = this.decoded.get(name); // to the end: it was wanted last
      this.decoded.delete(name);
      this.decoded.set(name, codes);
      return true;
    }
    if (this.waiting.get(name)?.entry !== entry) {
      const promise = this.decode(entry).finally(() => {
        if (this.waiting.get(name)?.promise === promise) this.waiting.delete(name);
      });
      this.waiting.set(name, { entry, promise });
    }
    await this.waiting.get(name).promise;
    return this.decoded.has(name);
  },
  async decode(entry) {
    // The chain of differences back to one that is whole, or is decoded already.
    const chain = [entry], steps = this.stepsOf(entry.key);
    let base = null;
    for (let i = steps.indexOf(entry.step); chain[0].delta && !base; ) {
      const before = this.entry(entry.key, steps[--i]);
      base = this.decoded.get(`${before.step} ${before.key}`) ?? null;
      if (!base) chain.unshift(before);
    }
    const texts = await Promise.all(chain.map((one) => this.blob(one)));
    if (texts.some((text) => text === null)) return;
    const raw = await Promise.all(texts.map(inflate));
    for (const [i, one] of chain.entries()) {
      base = integers(one, raw[i], one.delta ? base : null);
      // A live page may have taken another version of this step in meanwhile.
      if (this.entry(one.key, one.step) !== one) continue;
      this.keep(`${one.step} ${one.key}`, base);
      this.series.get(one.key).range = null;
    }
  },
  keep(name, codes) {
    this.forget(name);
    this.decoded.set(name, codes);
    this.decodedBytes += codes.byteLength;
    for (const old of this.decoded.keys()) {
      if (this.decodedBytes <= MOST_DECODED || this.decoded.size < 24) break;
      this.forget(old);
    }
  },
  forget(name) {
    this.decodedBytes -= this.decoded.get(name)?.byteLength ?? 0;
    this.decoded.delete(name);
  },
  async blob(entry) { return this.large.get(entry.step)?.[entry.blob] ?? live.blob(entry); },

  // Takes an unpacked step in, with its large blobs (base64) where they are at hand.
  take(step, { entries, payloads }, large = null) {
    this.drop(step);
    if (large?.length) this.large.set(step, large);
    for (const given of entries) {
      if (!this.series.has(given.key)) {
        this.series.set(given.key, { steps: [], at: new Map(), version: 0, range: null });
      }
      const series = this.series.get(given.key), place = after(series.steps, step);
      const before = series.at.get(series.steps[place - 1]);
      const entry = given.same ? { ...before, ...given } : given;
      entry.step = step;
      entry.codes = undefined;
      if (!given.same) {
        entry.labels ??= {};
        entry.limits = entry.limits?.map((end, i) => end ?? (i ? Infinity : -Infinity)) ?? null;
      }
      if (given.blob === undefined) {
        delete entry.blob;
        const base = entry.delta ? before.codes : null;
        entry.codes = integers(entry, payloads.subarray(entry.at), base);
      } else delete entry.at;
      series.steps.splice(place, 0, step);
      series.at.set(step, entry);
      this.touched(series);
    }
    // Where there is only the observer's comparison with the model, nothing was looked at.
    if (entries.every(({ key }) => parts(key).instrument === "fidelity")) return;
    this.steps.splice(after(this.steps, step), 0, step);
  },
  drop(step) {
    const place = after(this.steps, step) - 1;
    if (this.steps[place] === step) this.steps.splice(place, 1);
    this.large.delete(step);
    for (const [key, series] of this.series) {
      if (!series.at.delete(step)) continue;
      series.steps.splice(after(series.steps, step) - 1, 1);
      this.touched(series);
      this.forget(`${step} ${key}`);
    }
  },
  touched(series) {
    series.version = ++this.version;
    series.range = null;
  },
};

// How many of the ascending `steps` are at or before `step`.
function after(steps, step) {
  let low = 0, high = steps.length;
  if (high && steps[high - 1] <= step) return high;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low;
}

// What a whole key says. The names that a trainer logs have slashes of their own, and no probe.
function parts(key) {
  const [instrument, measure, ...rest] = key.split("/");
  if (instrument === "trainer") return { instrument, measure: [measure, ...rest].join("/"), probe: null };
  return { instrument, measure, probe: rest.length ? rest.join("/") : null };
}

// What an instrument says about itself, and of a key: {title, quantity, headline, role, ...}, as
// far as it says so.
function describedBy(instrument) {
  const told = data.about.instruments ?? {};
  return Object.hasOwn(told, instrument) ? told[instrument] : {};
}
function meaningOf(key) {
  const { instrument, measure } = parts(key), { measures = {}, others = {} } = describedBy(instrument);
  return Object.hasOwn(measures, measure) ? measures[measure] : others;
}
