// Shows what a lens reads in each layer: tokens with their probability, and the other readings of
// the same instrument for each layer, at the slider's step and at the step compared with it.

function lensView(root) {
  const { root: box, body, heading } = card("Logit lens", { id: "lens" });
  const probe = el("strong"), none = el("p", { class: "told", id: "nolens" });
  const holder = el("div", { class: "lenses" });
  heading.append(probe);
  body.append(none, holder);
  root.append(box);
  const blocks = new Map(); // key -> block
  const wanted = ["data", "step", "other", "probe", "theme"];

  function draw(changed) {
    if (!wanted.some((name) => changed.has(name))) return;
    const keys = lensKeys();
    write(probe, state.probe === null ? "" : `of ${cut(token(state.probe), 40)}`);
    none.hidden = keys.some((key) => parts(key).probe !== null);
    write(none, "No lens reads this probe.");
    for (const key of keys) if (!blocks.has(key)) blocks.set(key, lensBlock(key));
    const shown = keys.map((key) => blocks.get(key).root);
    if (holder.children.length !== shown.length || shown.some((one, i) => holder.children[i] !== one)) {
      holder.replaceChildren(...shown);
    }
    for (const key of keys) blocks.get(key).draw(changed.has("data"));
  }
  return { draw };
}

// Readings [layer, rank] of texts, of this probe and of none.
function lensKeys() {
  return data.keys().filter((key) => {
    const { axes, texts } = data.entry(key, data.first(key));
    return texts && axes.join() === "layer,rank" && [state.probe, null].includes(parts(key).probe);
  });
}

// Keys of the same instrument and probe whose axes are these.
function besideKey(key, axes) {
  const { instrument, probe } = parts(key);
  return data.keys().filter((one) => {
    const own = parts(one);
    return own.instrument === instrument && own.probe === probe
      && data.entry(one, data.first(one)).axes.join() === axes;
  });
}

// The numbers that belong to a reading of texts: those of the same axes, a probability first.
function numbersOfTexts(key) {
  const keys = besideKey(key, data.entry(key, data.first(key)).axes.join()).filter((one) => {
    const { texts, unit } = data.entry(one, data.first(one));
    return !texts && unit !== "index";
  });
  return keys.find((one) => data.entry(one, data.first(one)).unit === "probability") ?? keys[0] ?? null;
}

function lensBlock(key) {
  const { instrument, measure, probe } = parts(key), told = el("p", { class: "told" });
  const bar = el("div"), row = el("div", { class: "row" });
  const root = el("section", { class: "lensblock", "data-key": key },
    el("h3", {}, `${instrument} ${measure}`.replaceAll("_", " ")), told, row, bar);
  const tables = [lensTable(key), lensTable(key)];
  let target = null, known = -1, numbers = null, sides = [], last = "";

  // What is the same at every step, asked once.
  function survey() {
    known = data.version;
    target = targetOf(key);
    numbers = numbersOfTexts(key);
    const layers = (one) => data.entry(one, data.first(one)).shape[0];
    sides = besideKey(key, "layer").filter((one) => layers(one) === layers(key)).map((side) => ({ side, bar: barOf(side) }));
    const tokens = tokensOf(data.keys().filter((one) => parts(one).probe === probe));
    last = tokens.length ? `, ${tokens.length - 1} ${cut(token(tokens.at(-1) ?? ""), 24)}` : "";
  }

  function draw() {
    if (known !== data.version) survey();
    const steps = (state.other === null ? [state.step] : [state.step, state.other])
      .map((step) => data.latest(key, step));
    const scale = numbers && scaleOf(data.entry(numbers, data.first(numbers)), data.range(numbers),
      { root: true, over: "range over all steps" });
    write(told, wordsOfLens());
    if (row.children.length !== steps.length) {
      row.replaceChildren(...tables.slice(0, steps.length).map((table) => table.root));
    }
    steps.forEach((step, i) => tables[i].draw({ step, asked: [state.step, state.other][i],
      against: steps.length === 2 ? steps[1 - i] : null, numbers, sides, scale, target }));
    bar.hidden = !scale;
    if (!scale) return;
    const names = new Set([parts(numbers).measure, data.entry(numbers, data.first(numbers)).unit]);
    legendIn(bar, scale, [...names].join(", "));
  }

  function wordsOfLens() {
    const said = [];
    if (probe === null) said.push("Of no single probe.");
    else if (measure === "token" && numbers?.includes("/top/")) said.push(`Read at the last token${last}.`);
    if (target) said.push(`Target: ${cut(token(target.text), 40)}, outlined.`);
    if (state.other !== null) said.push("A bar at the left: not among the tokens of the other step.");
    return said.join(" ");
  }
  return { root, draw };
}

// The target's id and text. A lens says only its rank: where that is among the tokens listed, it
// is the token of this place. null where it never is.
function targetOf(key) {
  const { instrument, probe } = parts(key), rank = [instrument, "rank", probe].join("/");
  const counts = new Map();
  for (const step of data.stepsOf(rank)) {
    const entry = data.entry(key, step);
    if (!entry || data.entry(rank, step).axes.join() !== "layer") continue;
    const [layers, places] = entry.shape;
    for (let layer = 0; layer < layers; layer++) {
      const place = data.number(rank, step, layer);
      if (!(place < places)) continue;
      const at = layer * places + place, id = data.number(key, step, at);
      const one = counts.get(id) ?? { id, text: entry.texts[at], count: 0 };
      one.count++; // tokens of equal logits share a rank, so that one place may be another's
      counts.set(id, one);
    }
  }
  return [...counts.values()].sort((a, b) => b.count - a.count)[0] ?? null;
}

// One step's table. Its cells are kept as long as its layers, places and measures are the same.
function lensTable(key) {
  const caption = el("caption"), head = el("thead"), rows = el("tbody");
  const root = el("div", { class: "table" }, el("table", { class: "lens" }, caption, head, rows));
  let made = null, shown = null, cells = [], current = [0, 0];

  function draw(given) {
    const { step, asked, against, numbers, scale, target } = given, bars = given.sides.map(({ bar }) => bar);
    write(caption, step === null ? `not measured at or before step ${asked}`
      : noteOf(step, asked));
    head.hidden = rows.hidden = step === null;
    if (step === null) return;
    const entry = data.entry(key, step), [layers, places] = entry.shape;
    const sides = given.sides.map(({ side }) => side);
    const fresh = JSON.stringify([layers, places, entry.labels, sides]);
    if (made !== fresh) build(entry, sides);
    made = fresh;
    shown = { ...given, entry, sides, steps: sides.map((one) => data.latest(one, step)) };
    const values = numbers && data.has(numbers, step) ? data.values(numbers, step) : null;
    const before = against === null ? null : data.entry(key, against), ids = data.values(key, step);
    const old = before && data.values(key, against);
    for (let layer = 0, at = 0; layer < layers; layer++) {
      const read = reads(entry, layer);
      const there = old && read && reads(before, layer)
        && new Set(old.subarray(layer * before.shape[1], (layer + 1) * before.shape[1]));
      for (let place = 0; place < places; place++, at++) {
        const cell = cells[layer][place], rgb = read && values && scale && shade(scale, values[at]);
        write(cell, read ? shortToken(entry.texts[at]) : "–");
        const mark = (read && target?.id === ids[at] ? " target" : "")
          + (there && !there.has(ids[at]) ? " new" : "");
        paintCell(cell, rgb ? css(rgb) : "transparent", rgb ? inkOn(rgb) : "", `token${mark}`);
      }
      sides.forEach((side, j) => {
        const cell = cells[layer][places + j], one = shown.steps[j];
        const value = one === null ? NaN : data.number(side, one, layer);
        write(cell, one === null ? "" : fmt(value));
        paintCell(cell, one === null ? "none" : bars[j](value), "", "number");
      });
    }
  }

  function build(entry, sides) {
    const [layers, places] = entry.shape, { axes } = entry;
    const title = (side) => {
      const { unit } = data.entry(side, data.first(side)), { measure } = parts(side);
      return measure === unit ? measure : `${measure.replaceAll("_", " ")}, ${unit}`;
    };
    head.replaceChildren(el("tr", {}, el("th", { scope: "col" }, "layer"),
      ...Array.from({ length: places }, (_, i) => el("th", { scope: "col" }, `${i ? "" : `${axes[1]} `}${nameOf(entry, axes[1], i)}`)),
      ...sides.map((side) => el("th", { scope: "col", class: "number" }, title(side)))));
    current = [Math.min(current[0], layers - 1), 0];
    cells = Array.from({ length: layers }, (_, layer) => Array.from({ length: places + sides.length }, (_, i) =>
      el("td", { tabindex: layer === current[0] && i === 0 ? 0 : -1, "data-at": `${layer}.${i}` })));
    rows.replaceChildren(...cells.map((line, layer) =>
      el("tr", {}, el("th", { scope: "row" }, nameOf(entry, "layer", layer)), ...line)));
  }

  function describe(layer, i) {
    const { entry, numbers, sides, step, steps, target, against } = shown, places = entry.shape[1];
    const name = nameOf(entry, "layer", layer);
    if (i >= places) {
      const side = sides[i - places], one = steps[i - places], { unit } = data.entry(side, data.first(side));
      return [`${name} ${parts(side).measure.replaceAll("_", " ")}`,
        one === null ? "not measured" : `${fmt(data.number(side, one, layer))} ${unit}`,
        ...(one === null || one === step ? [] : [`measured at step ${one}`])];
    }
    if (!reads(entry, layer)) return [`${name}, rank ${i}: nothing to read`];
    const at = layer * places + i, id = data.number(key, step, at);
    const value = numbers && data.has(numbers, step) ? [`${parts(numbers).measure} ${fmt(data.number(numbers, step, at))}`] : [];
    const fresh = cells[layer][i].classList.contains("new");
    return [`${name}, rank ${i}: ${token(entry.texts[at])}`, ...value, `token ${id}`,
      ...(target?.id === id ? ["the target"] : []), ...(fresh ? [`not among these at step ${against}`] : [])];
  }

  const cellOf = (event) => event.target.dataset?.at?.split(".").map(Number);
  rows.addEventListener("mouseover", (event) => {
    const at = cellOf(event);
    if (at) tip.show(event, ...describe(...at).map((line) => cut(line, 2200)));
    else tip.hide();
  });
  rows.addEventListener("mouseleave", tip.hide);
  rows.addEventListener("focusin", (event) => {
    const at = cellOf(event);
    if (!at) return;
    cells[current[0]][current[1]].tabIndex = -1;
    current = at;
    event.target.tabIndex = 0;
    say(describe(...at).map((line) => cut(line, 200)).join(", "));
  });
  rows.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    if (!move) return;
    const [line, i] = current.map((at, j) => at + move[j]);
    const row = cells[Math.max(0, Math.min(cells.length - 1, line))];
    row[Math.max(0, Math.min(row.length - 1, i))].focus();
    event.preventDefault();
  });
  return { root, draw };
}

const shortTokens = new Map(); // the same few tokens come at every step

function shortToken(text) {
  if (!shortTokens.has(text)) shortTokens.set(text, cut(token(cut(text, 40)), 14));
  return shortTokens.get(text);
}

// A layer where all texts are empty has nothing to read, as a difference of zero has.
function reads({ texts, shape }, layer) {
  for (let i = layer * shape[1]; i < (layer + 1) * shape[1]; i++) if (texts[i] !== "") return true;
  return false;
}

function paintCell(cell, background, ink, name) {
  const look = `${background} ${ink} ${name}`;
  if (cell.look === look) return;
  cell.look = look;
  cell.style.background = background;
  cell.style.color = ink;
  cell.className = name;
}

// (value) -> a bar behind a number, of the range over all steps; of ranks that of the logarithm.
function barOf(key) {
  const entry = data.entry(key, data.first(key)), { low, high } = scaleOf(entry, data.range(key));
  const on = entry.unit === "rank" ? (x) => Math.log1p(Math.max(0, x)) : (x) => x;
  const place = (x) => (100 * (on(x) - on(low))) / (on(high) - on(low) || 1);
  return (value) => {
    if (!Number.isFinite(value)) return "none";
    const ends = [place(Math.max(low, 0)), place(value)].sort((a, b) => a - b).map((x) => `${x.toFixed(1)}%`);
    return `linear-gradient(90deg, transparent ${ends[0]}, var(--lensbar) ${ends[0]} ${ends[1]}, transparent ${ends[1]})`;
  };
}

// Title and rows for the panel of one token: what the lens reads there in each layer.
function lensAt(keys, i, tokens) {
  const entryOf = (key) => data.entry(key, data.latest(key, state.step) ?? data.first(key));
  const texts = keys.filter((key) => entryOf(key).texts && entryOf(key).axes[0] === "layer");
  const byToken = texts.find((key) => ["layer,pos", "layer,token"].includes(entryOf(key).axes.join()));
  const last = i === tokens.length - 1 && texts.find((key) => entryOf(key).axes.join() === "layer,rank");
  const key = byToken ?? (last || null);
  if (!key) {
    return texts.length ? [meaningOf(texts[0]).explanation ?? "only the last token was read", []]
      : [null, []];
  }
  const step = data.latest(key, state.step), entry = entryOf(key), numbers = numbersOfTexts(key);
  const [layers, n] = entry.shape, at = key === byToken ? i - offsetOf(entry, tokens) : 0;
  if (step === null || !(at >= 0 && at < n)) return [null, []];
  const scale = numbers && scaleOf(entryOf(numbers), data.range(numbers), { root: true });
  const values = numbers && data.has(numbers, step);
  const others = key === byToken ? besideKey(key, entry.axes.join()).filter((one) => one !== numbers && one !== key)
    : [];
  const rows = Array.from({ length: layers }, (_, layer) => {
    const value = values ? data.number(numbers, step, layer * n + at) : NaN;
    return [`${nameOf(entry, "layer", layer)} ${cut(token(entry.texts[layer * n + at]), 24)}`,
      values ? fmt(value) : "", others.map((one) => `${parts(one).measure.replace(/_by_pos$/, "")} `
        + `${data.has(one, step) ? fmt(data.number(one, step, layer * n + at)) : "–"}`).join(", "),
      values ? shade(scale, value) : null];
  });
  return [`${parts(key).instrument.replaceAll("_", " ")} reads here${values ? ` (${entryOf(numbers).unit})` : ""}`, rows];
}

const SPANS = new WeakMap(); // entry -> Map(lead -> [least, most])

// The range of a reading's last axis at one step; null where it is not decoded yet.
function spanOf(key, step, lead) {
  const entry = data.entry(key, step), n = entry.shape.at(-1) ?? 1;
  if (!SPANS.has(entry)) SPANS.set(entry, new Map());
  const known = SPANS.get(entry);
  if (!known.has(lead)) {
    if (!data.codes(key, step)) return null;
    known.set(lead, rangeOf(Array.from({ length: n }, (_, i) => data.number(key, step, lead * n + i))));
  }
  return known.get(lead);
}

// The colours of one row of a reading: fixed, by its limits or else over all steps.
function scaleOver(key, lead, { root = false } = {}) {
  const entry = data.entry(key, data.first(key)), given = entry.limits?.every(Number.isFinite);
  const ends = given ? [] : data.stepsOf(key).flatMap((step) => spanOf(key, step, lead) ?? []);
  return scaleOf(entry, ends, { root, over: "range over all steps" });
}

// Another measure of the same things at the same step: the number of a neuron, what it writes.
function numberBeside(entry, measure, lead, before = "") {
  const { instrument, probe } = parts(entry.key), key = [instrument, measure, probe].join("/");
  const beside = data.entry(key, entry.step);
  if (beside?.axes.join() !== entry.axes.slice(0, -1).join()) return "";
  return before + fmt(data.number(key, entry.step, lead));
}

// What stands before the last axis, in words: "L3 neuron 512", "feature 77".
function nameOfLead(entry, lead) {
  const neuron = numberBeside(entry, "neuron", lead, "neuron "), words = [];
  for (let at = lead, j = entry.axes.length - 2; j >= 0; at = Math.floor(at / entry.shape[j--])) {
    const axis = entry.axes[j], name = nameOf(entry, axis, at % entry.shape[j]);
    words.unshift(axis === "rank" && neuron ? neuron : axis === "layer" ? name : `${axis} ${name}`);
  }
  return words.join(" ");
}

// A titled list that keeps its rows: [what, how much, a note, its colour].
function listing(root, id) {
  const title = el("h4"), rows = el("ol"), box = el("section", { id }, title, rows);
  root.append(box);
  return (heading, items) => {
    box.hidden = heading === null;
    write(title, heading ?? "");
    while (rows.children.length > items.length) rows.lastChild.remove();
    while (rows.children.length < items.length) rows.append(el("li", {}, el("b"), el("span"), el("small")));
    items.forEach(([what, much, note, rgb], i) => {
      const line = rows.children[i];
      [what, much, note ?? ""].forEach((text, j) => write(line.children[j], text));
      const colour = rgb ? css(rgb) : "transparent";
      if (line.colour !== colour) {
        line.colour = colour;
        line.children[1].style.background = colour;
        line.children[1].style.color = rgb ? inkOn(rgb) : "";
      }
    });
  };
}
