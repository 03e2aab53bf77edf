// Draws the readings of every instrument by their axes and unit, whoever wrote the instrument.

function panelsView(root) {
  const sections = new Map(); // instrument -> section
  const box = el("div", { class: "sections" });
  root.append(box);
  const visible = new IntersectionObserver((seen) => {
    for (const one of seen) {
      const section = sections.get(one.target.dataset.instrument);
      section.seen = one.isIntersecting;
      if (section.seen) redraw("panels");
    }
  }, { rootMargin: "200px" });

  function draw(changed) {
    if (changed.has("data")) {
      for (const instrument of new Set(data.keys().map((key) => parts(key).instrument))) {
        if (sections.has(instrument) || !ofInstrument(instrument, null).length) continue;
        const section = sectionOf(instrument);
        sections.set(instrument, section);
        box.append(section.root);
        visible.observe(section.root);
      }
    }
    for (const section of sections.values()) if (section.seen) section.draw();
  }
  return { draw };
}

// Keys of an instrument that a panel shows: those of one probe, and of none. null: of all.
function ofInstrument(instrument, probe) {
  return data.keys().filter((key) => {
    const own = parts(key), { axes, shape } = data.entry(key, data.first(key));
    return own.instrument === instrument && !shape.includes(0) && (probe === null || own.probe === null || own.probe === probe)
      && !axes.includes("query") && !axes.includes("update") && axes[0] !== "event"
      && !own.measure.endsWith("_spread") && key !== CHECKPOINT && !isShownAsRollouts(key);
  });
}

// A measure, and its probe where the section has others beside it that are of none.
function measureOf(key) {
  const { instrument, measure, probe } = parts(key);
  const beside = probe !== null && ofInstrument(instrument, probe)
    .some((other) => parts(other).probe === null);
  return beside ? `${measure} of ${plain(probe)}` : measure;
}

function sectionOf(instrument) {
  const body = el("div", { class: "panels" }), note = el("small"), meaning = describedBy(instrument).sentence ?? "";
  const root = el("details", { class: "card section", open: true, "data-instrument": instrument },
    el("summary", {}, el("h2", {}, instrument.replaceAll("_", " "), note)),
    ...(meaning ? [el("p", { class: "told meaning" }, meaning)] : []), body);
  root.addEventListener("toggle", () => redraw("data"));
  const panels = new Map(); // what it shows -> panel
  const section = { root, seen: false, draw };

  function draw() {
    if (!root.open || !data.steps.length) return;
    const keys = ofInstrument(instrument, state.probe ?? "");
    const wanted = panelsOf(instrument, keys);
    for (const [name, make] of wanted) if (!panels.has(name)) panels.set(name, make());
    const shown = wanted.map(([name]) => panels.get(name));
    if (shown.some((panel, i) => body.children[i] !== panel.root) || body.children.length !== shown.length) {
      body.replaceChildren(...shown.map((panel) => panel.root));
    }
    for (const panel of shown) panel.draw();
    const ofProbe = keys.every((key) => parts(key).probe !== null);
    write(note, !keys.length ? `no readings of ${plain(state.probe ?? "")}`
      : !wanted.length ? "shown above, under the logit lens"
      : ofProbe ? `of ${plain(state.probe)}` : "");
  }
  return section;
}

// [name, how to make it] of each panel for these readings.
function panelsOf(instrument, keys) {
  const wanted = [], group = (test) => keys.filter((key) => {
    const entry = data.entry(key, data.first(key));
    return test(entry.axes, entry);
  });
  const add = (kind, some, make) => {
    if (some.length) wanted.push([`${kind} ${some.join(" ")}`, () => make(some)]);
  };
  const inLens = new Set(lensKeys().flatMap((key) => [key, numbersOfTexts(key)]));
  if (keys.some((key) => meaningOf(key).quantity === "direct_effect")) add("parts", keys, partsPanel);
  add("numbers", group((axes) => axes.length === 0), numbersPanel);
  const named = (axes, entry) => entry.unit === "index" && entry.texts;
  for (const key of group((axes, entry) => axes.join() === "layer" && !named(axes, entry))) add("line", [key], linePanel);
  for (const key of group((axes, entry) => axes.length === 2 && axes[1] !== "rank" && !named(axes, entry))) add("map", [key], mapPanel);
  for (const lead of new Set(keys.map((key) => data.entry(key, data.first(key)).axes.slice(0, 2).join()))) {
    if (!lead.endsWith(",rank")) continue;
    const ranked = group((axes) => axes.length <= 3 && axes.slice(0, 2).join() === lead);
    if (!ranked.every((key) => inLens.has(key))) add("ranked", ranked, rankedPanel);
  }
  const single = group((axes, entry) => axes.length === 1 && (axes[0] !== "layer" || named(axes, entry)));
  for (const axis of new Set(single.map((key) => data.entry(key, data.first(key)).axes[0]))) {
    add("list", single.filter((key) => data.entry(key, data.first(key)).axes[0] === axis), listPanel);
  }
  const deep = group((axes) => axes.length >= 3 && axes[1] !== "rank");
  for (const axes of new Set(deep.map((key) => data.entry(key, data.first(key)).axes.join()))) {
    add("slices", deep.filter((key) => data.entry(key, data.first(key)).axes.join() === axes), mapPanel);
  }
  return wanted;
}

// The values of a reading; of a large one null until it is decoded, which draws the panels anew.
function valuesOf(key, step) {
  const values = data.values(key, step);
  if (!values) data.ready(key, step).then((there) => there && redraw("panels"));
  return values;
}

function linePanel([key]) {
  const first = data.entry(key, data.first(key));
  const chart = lineChart(measureOf(key), first.unit, first.axes[0]);
  function draw() {
    const step = data.latest(key, state.step);
    chart.root.hidden = step === null;
    if (step === null) return;
    const entry = data.entry(key, step), before = data.first(key);
    const series = [{ name: stepName(step, 20), values: data.values(key, step), colour: style("--accent") }];
    const other = state.other === null ? null : data.latest(key, state.other);
    if (other !== null && other !== step) series.unshift({ name: stepName(other, 20), values: data.values(key, other), colour: style("--mark") });
    if (before !== step && before !== other) series.unshift({ name: stepName(before, 20), values: data.values(key, before), colour: style("--faint"), dash: "3 3" });
    const names = Array.from({ length: entry.shape[0] }, (_, i) => nameOf(entry, entry.axes[0], i));
    const limits = entry.limits?.every(Number.isFinite) ? entry.limits : data.range(key);
    chart.update({ names, series, limits });
  }
  return { root: chart.root, draw };
}

// A reading of two axes as a map; of more, one slice of it, chosen by its leading axes. Of several
// readings of the same axes, one is chosen.
function mapPanel(keys) {
  const choices = el("div", { class: "choices" }), root = el("div", {}, choices);
  let key = keys[0], map = null, chosen = [];

  function pick(row, column) {
    const entry = data.entry(key, data.latest(key, state.step));
    if (entry.axes.slice(-2).join() !== "layer,head") return;
    set({ layer: numberOf(entry, "layer", row), head: numberOf(entry, "head", column) });
  }
  function choose(name) {
    key = name;
    chosen = [];
    map?.root.remove();
    map = heatMap(measureOf(key), pick);
    root.append(map.root);
    const { axes, shape } = data.entry(key, data.first(key)), entry = data.entry(key, data.first(key));
    const several = keys.length < 2 ? [] : [el("select", { "aria-label": "measure",
      onchange: (event) => { choose(event.target.value); draw(); },
    }, ...keys.map((one) => el("option", { value: one, selected: one === key }, measureOf(one))))];
    choices.replaceChildren(...several, ...axes.slice(0, -2).map((axis, j) => el("label", {}, `${axis} `,
      el("select", { onchange: (event) => { chosen[j] = event.target.selectedIndex; draw(); } },
        ...Array.from({ length: shape[j] }, (_, i) => el("option", {}, nameOf(entry, axis, i)))))));
  }
  function draw() {
    const step = data.latest(key, state.step);
    map.root.hidden = step === null;
    if (step === null) return;
    const entry = data.entry(key, step), values = valuesOf(key, step);
    if (!values) return;
    const at = entry.shape.slice(0, -2)
      .reduce((sum, n, j) => sum * n + Math.min(chosen[j] ?? 0, n - 1), 0);
    const [rows, columns] = entry.shape.slice(-2), [down, across] = entry.axes.slice(-2);
    const names = (axis, n) => Array.from({ length: n }, (_, i) => nameOf(entry, axis, i));
    const slice = [at * rows * columns, (at + 1) * rows * columns];
    map.update({ rows: names(down, rows), columns: names(across, columns),
      values: values.subarray(...slice), unit: entry.unit + late(step),
      texts: entry.texts?.slice(...slice), axes: `${down} ↓ ${across} →`,
      scale: scaleOf(entry, data.range(key), { open: true, over: "range of all steps" }) });
  }
  choose(key);
  return { root, draw };
}

// What each head, MLP, embedding and bias writes towards the answer: the largest, as bars.
function partsPanel(keys) {
  const chart = barChart(), title = el("figcaption");
  const root = el("figure", { class: "chart parts" }, title, chart.root);
  const MOST = 16;
  function draw() {
    const items = [], used = [];
    let unit = "", since = state.step;
    for (const key of keys) {
      const { measure } = parts(key), step = data.latest(key, state.step);
      if (step === null || !["head", "attention", "mlp", "embed", "bias"].includes(measure)) continue;
      const entry = data.entry(key, step), values = valuesOf(key, step);
      const first = valuesOf(key, data.first(key));
      if (!values || !first) continue;
      if (measure === "attention" && keys.some((one) => parts(one).measure === "head")) continue;
      unit = entry.unit;
      since = Math.min(since, data.first(key));
      used.push(...data.range(key));
      values.forEach((value, i) => {
        const [row, column] = entry.axes.length === 2 ? [Math.floor(i / entry.shape[1]), i % entry.shape[1]] : [i, null];
        const name = !entry.axes.length ? measure : nameOf(entry, "layer", row)
          + (column === null ? ` ${measure}` : nameOf(entry, "head", column));
        items.push({ name, value, before: first[i] });
      });
    }
    items.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    title.textContent = `the ${Math.min(MOST, items.length)} largest of ${items.length} parts, ${unit}${isAlone() ? "" : `; outline: at ${stepName(since, 20)}`}`;
    chart.update(items.slice(0, MOST), unit, Math.max(1e-9, ...used.map(Math.abs)));
  }
  return { root, draw };
}
