// Follows a run in progress: loads data/index.js, which names the steps, again and again.

const POLL = 2000, POLL_FINISHED = 10_000; // milliseconds
const AT_ONCE = 8; // chunks on their way at a time

const live = {
  named: new Map(), // step -> [stamp, number of large blobs], as the last index says
  taken: new Map(), // step -> stamp of what is decoded
  asked: new Set(), // names of files on their way
  blobs: new Map(), // "00000100-0" -> {stamp, give}: who waits for a large blob
  awaited: null, // steps that the address names; nothing is drawn before them
  last: null, changedAt: 0, lost: false, drawn: 0, filled: false, whole: false, unpacking: 0,

  start() {
    const poll = async () => {
      this.lost = !(await load("data/index.js"));
      if (this.filled && !this.asked.size && !this.unpacking) {
        this.awaited = []; // what did not come may never come
        this.whole = true;
      }
      this.fill();
      this.tell();
      setTimeout(poll, data.about.done ? POLL_FINISHED : POLL);
    };
    poll();
    setInterval(() => this.tell(), 1000);
  },
  index({ steps, title, notes = [], done = false, instruments = {} }) {
    const finished = done !== data.about.done;
    Object.assign(data.about, { title: title ?? data.about.title, notes, done, instruments });
    // A stamp is the time of writing, in milliseconds.
    this.changedAt = Math.max(0, ...steps.map(([, stamp]) => stamp));
    this.named = new Map(steps.map(([step, ...rest]) => [step, rest]));
    const gone = [...this.taken.keys()].filter((step) => !this.named.has(step));
    for (const step of gone) {
      data.drop(step);
      this.taken.delete(step);
    }
    const there = [...this.named.keys()];
    this.awaited ??= there.length ? [nearest(state.step ?? Math.max(...there), there),
      ...(state.other === null ? [] : [nearest(state.other, there)])] : null;
    if (there.length) this.last ??= Math.max(...there);
    if (gone.length || finished) arrived();
  },
  // Asks for what is missing: what the address names, then from the last to the first.
  fill() {
    this.filled = this.named.size > 0;
    const missing = [...this.named].filter(([step, [stamp]]) => this.taken.get(step) !== stamp)
      .map(([step]) => step).sort((a, b) => b - a);
    const first = (step) => Number((this.awaited ?? []).includes(step));
    missing.sort((a, b) => first(b) - first(a));
    const round = (step) => {
      if (step !== undefined && !this.asked.has(step)) {
        this.asked.add(step);
        load(`data/${pad(step)}.js?${this.named.get(step)[0]}`).then(() => {
          this.asked.delete(step);
          round(missing.shift());
        });
      }
    };
    missing.splice(0, AT_ONCE - this.asked.size).forEach(round);
  },
  async chunk(step, stamp, small) {
    this.unpacking += 1;
    const one = await unpack(small).finally(() => { this.unpacking -= 1; });
    // The index may have dropped or renewed this step while the chunk was on its way.
    if (this.named.get(step)?.[0] !== stamp || this.taken.get(step) === stamp) return;
    data.take(step, one);
    this.taken.set(step, stamp);
    // While a long run is read in, not every step is worth a redraw of all.
    if (this.taken.size === this.named.size || Date.now() - this.drawn > 700) arrived();
  },
  // Base64 of a large blob, or null where it is not there (yet).
  async blob(entry) {
    const name = `${pad(entry.step)}-${entry.blob}`, stamp = this.taken.get(entry.step);
    for (let turn = 0; turn < 3; turn++) {
      let text = null;
      const waiting = this.blobs.get(name) ?? { stamp, give: [] };
      waiting.give.push((found) => { text = found; });
      this.blobs.set(name, waiting);
      await load(`data/${name}.js?${stamp}`);
      if (text !== null) return text;
      this.blobs.delete(name);
      if (this.taken.get(entry.step) !== stamp) break; // renewed meanwhile: the chunk comes
      await new Promise((done) => setTimeout(done, POLL / 4));
    }
    return null;
  },
  given(step, stamp, i, text) {
    const name = `${pad(step)}-${i}`, waiting = this.blobs.get(name);
    if (waiting?.stamp !== stamp) return;
    this.blobs.delete(name);
    for (const give of waiting.give) give(text);
  },
  // The usual time between two observations: the median; Infinity where there is none.
  usual() {
    const stamps = data.steps.map((step) => this.named.get(step)[0]);
    const between = stamps.slice(1).map((stamp, i) => Math.abs(stamp - stamps[i]));
    return between.sort((a, b) => a - b)[between.length >> 1] ?? Infinity;
  },
  tell() {
    const node = document.getElementById("status");
    // Whether a run goes on cannot be seen from here, only when it last wrote.
    const words = data.about.done ? ["ended"] : [];
    words.push(data.steps.length ? `last step ${data.steps.at(-1)}` : "no step yet");
    if (this.changedAt && !data.about.done) {
      const since = Date.now() - this.changedAt, told = ago(since / 1000);
      words.push(since > 5 * Math.max(this.usual(), POLL) ? `no news for ${told}`
        : `updated ${told} ago`);
    }
    const missing = this.named.size - this.taken.size;
    if (missing > 0) words.push(`reading ${missing} more`);
    if (this.lost) words.push("data/index.js cannot be read");
    if (node.textContent !== words.join(", ")) node.textContent = words.join(", ");
  },
};
const pad = (step) => String(step).padStart(8, "0");

function ago(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  return whole < 120 ? `${whole} s` : whole < 7200 ? `${Math.round(whole / 60)} min`
    : `${Math.round(whole / 3600)} h`;
}

// Runs a file of the folder; whether it was there. A script, since file:// knows no fetch.
function load(address) {
  return new Promise((done) => {
    const query = address.includes("?") ? "" : `?${Date.now()}`;
    const script = el("script", { src: address + query });
    script.onload = script.onerror = (event) => {
      script.remove();
      done(event.type === "load");
    };
    document.head.append(script);
  });
}

// New steps are in, or old ones gone. A slider at the end stays at the end.
function arrived() {
  if (live.awaited?.some((step) => !live.taken.has(step))) return;
  live.awaited = [];
  if (state.step === null || state.step === live.last) state.step = data.steps.at(-1) ?? null;
  // While a run is read in, the last step that is there is not yet the end.
  live.whole ||= live.taken.size === live.named.size;
  if (live.whole) live.last = data.steps.at(-1);
  live.drawn = Date.now();
  live.tell();
  show();
}
