// Draws the attention of the chosen and the pinned heads over a probe's tokens: at the slider's
// step and, if another step is chosen to compare with, at that step and the difference.

function patternView(root) {
  const { root: box, body, heading } = card("Attention");
  const probe = el("select", { id: "probe", "aria-label": "probe",
    onchange: () => set({ probe: probe.value, query: null }) });
  const kind = el("select", { id: "kind", "aria-label": "what is shown of the attention",
    onchange: () => set({ pattern: isAttention(kind.value) ? null : kind.value }) });
  const other = el("select", { id: "other", "aria-label": "compare with step",
    onchange: () => set({ other: other.value === "" ? null : Number(other.value) }) });
  const pinning = el("button", { id: "pin", onclick: () => pin(state.layer, state.head) }, "pin");
  heading.append(probe, kind, other, pinning);
  const told = el("p", { class: "told", id: "patterntold" });
  const maps = el("div", { class: "maps row", id: "maps" });
  const queryTold = el("p", { class: "told", id: "querytold" });
  body.append(told, maps, queryTold);
  root.append(box);
  const blocks = []; // of one head each; kept from one step to the next
  const wanted = ["data", "step", "other", "layer", "head", "probe", "pattern", "query", "pins",
    "score", "theme", "size"];
  let turn = 0, room = 0, over = null;

  function draw(changed) {
    if (!wanted.some((name) => changed.has(name))) return;
    if (changed.has("data") || changed.has("probe")) fillPatternChoices(probe, kind, other);
    probe.value = state.probe ?? "";
    other.value = state.other ?? "";
    other.title = wholeNames(state.other);
    const pinned = state.pins.some(([layer, head]) => layer === state.layer && head === state.head);
    const full = !pinned && state.pins.length >= MOST_PINS;
    pinning.disabled = full;
    write(pinning, full ? `${MOST_PINS} heads are pinned`
      : `${pinned ? "unpin" : "pin"} L${state.layer}H${state.head}`);
    if (!room || [...changed].some((name) => name !== "step")) room = body.clientWidth;
    const mine = ++turn, key = shownPattern();
    kind.value = key ? kindOf(key) : state.pattern ?? [...kind.options].map(({ value }) => value).find(isAttention) ?? "";
    const steps = (state.other === null ? [state.step] : [state.step, state.other])
      .map((step) => (key ? data.latest(key, step) : null));
    const missing = steps.filter((step) => step !== null && !data.codes(key, step));
    if (!missing.length) return show(key, steps);
    const { version } = data;
    Promise.all(missing.map((step) => data.ready(key, step))).then(() => {
      // Else another drawing comes: a later step was asked for meanwhile, or this one was dropped.
      if (mine === turn && version === data.version) show(key, steps);
    });
  }

  function show(key, steps) {
    const absent = !key || steps[0] === null;
    write(told, !absent ? "" : !key ? noPattern() : `Not measured until step ${data.first(key)}.`);
    maps.hidden = queryTold.hidden = absent;
    if (absent) return;
    const entry = data.entry(key, steps[0]), across = state.other === null ? 1 : 3;
    const heads = [[state.layer, state.head],
      ...state.pins.filter(([layer, head]) => layer !== state.layer || head !== state.head)];
    while (blocks.length < heads.length) blocks.push(headBlock(pointAt, follow));
    if (maps.children.length !== heads.length) {
      maps.replaceChildren(...blocks.slice(0, heads.length).map((block) => block.root));
    }
    const perRow = across === 1 ? Math.min(3, heads.length) : 3;
    const size = sizes(entry, room, perRow, heads.length * across);
    heads.forEach((head, i) => blocks[i].draw({ key, steps, head, size, over }));
    const followed = state.query !== null && state.query < entry.shape.at(-2);
    write(queryTold, !followed ? ""
      : `query ${tokenAt(entry, "query", state.query)} is followed; Esc lets go`);
    const next = data.steps[data.steps.indexOf(state.step) + 1];
    if (next !== undefined) data.ready(key, data.latest(key, next)); // play asks for it soon
  }

  // The same query and key in all maps; null: none.
  function pointAt(cell) {
    over = cell;
    for (const block of blocks) if (block.root.isConnected) block.cross(over);
  }
  function follow(query) { set({ query: query === state.query ? null : query }); }
  return { draw };
}

const isAttention = (kind) => meaningOf(kind).quantity === "attention";
const kindOf = (key) => key.split("/", 2).join("/");

// The pattern that the card shows: attention, unless another is chosen.
function shownPattern() {
  const own = patterns().filter((key) => [state.probe, null].includes(parts(key).probe));
  if (state.pattern) return own.find((key) => kindOf(key) === state.pattern) ?? null;
  return own.find((key) => isAttention(kindOf(key))) ?? own[0] ?? null;
}

function noPattern() {
  const what = state.pattern ?? "attention pattern";
  const others = patterns().filter((key) => !state.pattern || kindOf(key) === state.pattern);
  const names = [...new Set(others.map((key) => plain(parts(key).probe ?? key)))];
  return `There is no ${plain(what)} of the probe ${plain(state.probe ?? "")}. `
    + (names.length ? `These have one: ${names.join(", ")}.` : "No probe has one.");
}

// Filled only where they say something else, as an open list would close.
function fillPatternChoices(probe, kind, other) {
  const having = new Set(patterns().map((key) => parts(key).probe));
  const fill = (choose, options) => {
    const what = JSON.stringify(options);
    if (choose.what === what) return;
    choose.what = what;
    choose.replaceChildren(...options.map(([value, text]) => el("option", { value }, text)));
  };
  const lacking = (name) => (having.has(name) ? "" : " (no patterns)");
  fill(probe, probes().map((name) => [name, plain(name) + lacking(name)]));
  const all = [...new Set(patterns().map(kindOf))];
  const kinds = all.sort((a, b) => isAttention(b) - isAttention(a));
  fill(kind, kinds.map((name) => [name, isAttention(name) ? "attention" : plain(name)]));
  kind.hidden = kinds.length < 2;
  fill(other, [["", "compare with step …"],
    ...data.steps.map((step) => [step, `compare with ${stepName(step)}`])]);
  other.hidden = isAlone();
}

// Pixels a token, and letters of its name at the axes: one map is large, several share the width,
// none is too small to point at.
function sizes(entry, room, perRow, count) {
  const letters = count === 1 ? 10 : 7, names = labelRoom(entry, "query", letters) + 4;
  const most = Math.min(count === 1 ? 560 : Math.max(180, room / perRow - 12 - names),
    Math.max(260, innerHeight - 420)); // the last row, which answers, is seen without scrolling
  const side = Math.min(most, Math.max(180, room - names));
  const cell = Math.floor(side / Math.max(...entry.shape.slice(-2)));
  return { letters, cell: Math.max(2, Math.min(32, cell)) };
}

// One head: its name, its score, and a map for each step and their difference.
function headBlock(pointAt, follow) {
  const name = el("strong"), score = el("span");
  const close = el("button", { class: "close", onclick: () => pin(...head) }, "×");
  const told = el("p", { class: "told" });
  const offer = el("select", { "aria-label": "a head that is in the page",
    onchange: () => {
      const [layer, head] = offer.value.split(".").map(Number);
      set({ layer, head });
    } });
  const figures = el("div", { class: "row" });
  const look = "display:flex;gap:8px;align-items:center;font-size:12px;min-height:26px";
  const heading = el("div", { style: look }, name, score, close);
  const root = el("div", { class: "headblock" }, heading, told, offer, figures);
  const maps = [];
  let head = null;

  function draw({ key, steps, head: given, size, over }) {
    head = given;
    const [layer, number] = head, title = `L${layer}H${number}`;
    const pinned = state.pins.some((pin) => pin[0] === layer && pin[1] === number);
    write(name, title);
    write(score, scoreOfHead(state.score, state.step, layer, number));
    close.hidden = !pinned;
    if (close.title !== `unpin ${title}`) close.title = `unpin ${title}`;
    const found = steps.map((step) => step !== null && patternOf(key, step, layer, number));
    const missing = found.findIndex((one) => !one);
    figures.hidden = missing >= 0;
    offer.hidden = missing < 0 || steps[missing] === null;
    write(told, missing < 0 ? "" : absence(key, steps[missing], title));
    if (!offer.hidden) fillOffer(offer, key, steps[missing]);
    if (missing >= 0) return;
    const asked = [state.step, state.other];
    const shown = found.map((one, i) => ({ ...one, note: noteOf(one.step, asked[i]) }));
    if (shown.length === 2) shown.push(difference(...shown));
    while (maps.length < shown.length) maps.push(patternMap(pointAt, follow, (i) => said(i)));
    if (figures.children.length !== shown.length) {
      figures.replaceChildren(...maps.slice(0, shown.length).map((map) => map.root));
    }
    shown.forEach((one, i) => maps[i].draw({ ...one, ...size, over, title }));
  }

  // The values of one cell in all maps of this head.
  function said(i) {
    if (maps.length < 2 || figures.children.length < 2) return [];
    return [maps.map(({ shown }) => `${shown.short} ${fmt(shown.values[i])}`).join(", ")];
  }
  const cross = (over) => maps.forEach((map) => map.root.isConnected && map.cross(over));
  return { root, draw, cross };
}

const noteOf = (step, asked) =>
  (step === asked ? stepName(step) : `${stepName(step)}, the latest by step ${asked}`);

function patternOf(key, step, layer, head) {
  const entry = data.entry(key, step), row = indexOf(entry, "layer", layer);
  const column = indexOf(entry, "head", head);
  if (row < 0 || column < 0) return null;
  const values = data.slice(key, step, row * entry.shape[1] + column);
  const short = `step ${step}`;
  return values && { entry, step, values, short, scale: scaleOf(entry, values, { root: true }) };
}

// Of the same limits everywhere, so that one head compares with another.
function difference(a, b) {
  const values = a.values.map((value, i) => value - b.values[i]);
  const span = a.entry.limits?.every(Number.isFinite)
    ? (a.entry.limits[1] - Math.min(0, a.entry.limits[0])) : 0;
  const limits = span ? [-span, span] : null;
  let most = 0;
  for (const value of values) most = Math.max(most, Math.abs(value) || 0);
  return { entry: a.entry, step: a.step, values, short: "difference",
    scale: scaleOf({ limits }, values, { root: true, change: !limits }),
    note: `step ${a.step} − step ${b.step}, at most ${fmt(most)}` };
}

function headsIn(entry) {
  const columns = entry.shape[1];
  const places = entry.select ?? Array.from({ length: entry.shape[0] * columns }, (_, i) => i);
  return places.map((i) =>
    [numberOf(entry, "layer", Math.floor(i / columns)), numberOf(entry, "head", i % columns)]);
}

function absence(key, step, title) {
  if (step === null) return `Not measured until step ${data.first(key)}.`;
  if (!data.codes(key, step)) return `The pattern of step ${step} is not here yet.`;
  const entry = data.entry(key, step), count = headsIn(entry).length;
  return entry.select
    ? `${title} is not in this page at step ${step}, which holds the patterns of ${count} heads.`
    : `The attention of ${title} was not recorded, only that of ${count} heads.`;
}

function fillOffer(offer, key, step) {
  const what = `${key} ${step}`;
  if (offer.what === what) return;
  offer.what = what;
  const ask = { value: "", disabled: true, selected: true };
  offer.replaceChildren(el("option", ask, "go to a head that is here"),
    ...headsIn(data.entry(key, step)).map(([layer, head]) =>
      el("option", { value: `${layer}.${head}` }, `L${layer}H${head}`)));
}
