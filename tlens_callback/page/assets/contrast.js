// Draws which heads tell winners from losers: a matrix, the discoveries in words, and what the
// chosen head looks at in a winner and in a loser.

const DISCOVERY = 0.05; // false discovery rate
const MOST_NAMED = 12;

function contrastBlock() {
  const choose = el("select", { id: "contrast", "aria-label": "contrast", onchange: () => set({ contrast: choose.value }) });
  const explained = el("p", { class: "told" }), found = el("p", { id: "discoveries" });
  const marksTold = el("p", { class: "told marks" }, el("i", { class: "mark" }), " tells winners from losers ",
    el("i", { class: "mark chosen" }), " the head that is shown");
  const map = heatMap("winners minus losers", pick), frame = el("div", { class: "contrastmap" }, map.root, marksTold);
  const looks = attentionLines(), ranked = rankedBlock();
  const root = el("section", { id: "contrasts" },
    el("h3", {}, "Which heads tell winners from losers? ", choose), explained, found,
    el("div", { class: "contrastrow" }, frame, looks.root), ranked.root);
  let entry = null, room = 0;

  function pick(row, column) {
    set({ layer: numberOf(entry, "layer", row), head: numberOf(entry, "head", column) });
  }

  function draw(changed, got) {
    const keys = contrasts(), key = keys.find((one) => one === state.contrast) ?? keys[0] ?? null;
    const step = key && data.latest(key, state.step);
    ranked.draw(got);
    root.hidden = !keys.length && !got?.one.attention && ranked.root.hidden;
    choose.hidden = explained.hidden = found.hidden = frame.hidden = step === null;
    if (step !== null) {
      fillContrasts(choose, keys);
      choose.value = key;
      write(explained, meaningOf(key).explanation ?? "");
      entry = data.entry(key, step);
      // Asking lays the page out, which a moving slider has no time for.
      if (!room || changed.has("size")) room = Math.min(420, root.clientWidth - 20 || 420);
      drawMap(key, step);
    }
    looks.draw(changed, got);
  }

  function drawMap(key, step) {
    const values = data.values(key, step), q = qAt(key, step), [rows, columns] = entry.shape;
    const names = (axis, n) => Array.from({ length: n }, (_, i) => nameOf(entry, axis, i));
    const places = q ? discoveriesIn(q) : [], place = placeOfHead(entry, state.layer, state.head);
    const cell = (i) => [Math.floor(i / columns), i % columns];
    map.update({ rows: names("layer", rows), columns: names("head", columns), values: values ?? [], axes: "layer ↓ head →",
      unit: entry.unit + late(step), marks: places.map(cell), chosen: place < 0 ? null : cell(place),
      scale: scaleOf(entry, data.range(key), { change: true, over: "range of all steps" }),
      room,
      more: (i) => [...(q ? [Number.isNaN(q[i]) ? "not tested"
        : `false discovery rate ${fmt(q[i])}${q[i] < DISCOVERY ? ": tells winners from losers" : ""}`] : []), ...saidBeside(key, step, i)] });
    found.replaceChildren(...(q ? discoveryWords(places, rows * columns, cell) : ["These contrasts were not tested at this step."]));
  }

  function discoveryWords(places, count, cell) {
    const rate = `false discovery rate ${DISCOVERY * 100} %`;
    if (!places.length) return [`No head tells winners from losers (${rate}).`];
    const link = (i) => {
      const [row, column] = cell(i);
      return el("button", { class: "link", onclick: () => pick(row, column) }, cellName(entry, row, column));
    };
    const named = places.slice(0, MOST_NAMED).flatMap((i) => [", ", link(i)]).slice(1);
    const rest = places.length - MOST_NAMED;
    return [`${places.length} of ${count} heads ${places.length === 1 ? "tells" : "tell"} winners from losers (${rate}): `, ...named,
      rest > 0 ? ` and ${rest} more.` : "."];
  }
  return { root, draw };
}

// The false discovery rates beside a contrast at a step, or null.
function qAt(key, step) {
  const beside = `${key}_q`, entry = data.entry(beside, step);
  const fits = entry && meaningOf(beside).quantity === "contrast_q" && entry.shape.join() === data.entry(key, step).shape.join();
  return fits ? data.values(beside, step) : null;
}

// What else is known of one head's contrast, in words.
function saidBeside(key, step, i) {
  return Object.entries(BESIDE).filter(([suffix, words]) => words && data.has(`${key}${suffix}`, step))
    .map(([suffix, words]) => `${words} ${fmt(data.number(`${key}${suffix}`, step, i))}`);
}

// Indices of the discoveries, the surest first.
const discoveriesIn = (q) => Array.from(q.keys()).filter((i) => q[i] < DISCOVERY).sort((a, b) => q[a] - q[b]);

function fillContrasts(choose, keys) {
  const words = keys.join("\n");
  if (choose.words === words) return;
  choose.words = words;
  choose.replaceChildren(...keys.map((key) => el("option", { value: key }, cut(visible(titleIn(keys, key)), 60))));
}

// What the chosen head looks at, from the tokens sampled: a text of tokens for each rollout that has
// it, the winner first.
function attentionLines() {
  const heads = ["layer", "head"].map((axis) => el("select", { "aria-label": `${axis} that is looked at`,
    onchange: ({ target }) => set({ [axis]: Number(target.value) }) }));
  const title = el("h4"), bar = el("div"), none = el("p", { class: "told" }), holder = el("div");
  const root = el("div", { class: "looks" }, title, el("div", { class: "controls" }, ...heads), holder, bar, none), lines = [];

  function draw(changed, got) {
    const one = got?.one, entry = one?.attention && data.entry(one.attention, got.step);
    root.hidden = !one?.attention;
    if (root.hidden) return;
    write(title, `What L${state.layer}H${state.head} looks at from the sampled tokens: in the prompt, and below the line in what was sampled`);
    const of = !entry ? [] : got.groups.flatMap(({ prompt, rollouts }) => rollouts.map((rollout) => ({ prompt, rollout,
      row: attentionOf(got, rollout, state.layer, state.head) }))).filter(({ row }) => row)
      .sort((a, b) => b.rollout.advantage - a.rollout.advantage);
    const scale = attentionScale(of.map(({ row }) => row));
    heads.forEach((select, i) => fillHeads(select, entry ?? data.entry(one.attention, data.first(one.attention)), ["layer", "head"][i]));
    const said = of.length ? "" : !entry ? "Its attention at this step is not in this page, for want of room. "
      : data.codes(one.attention, got.step) ? "This head was not read." : "Being read …";
    none.replaceChildren(said, ...(entry ? [] : [linkToNearest(one.attention, got.step)]));
    bar.hidden = !scale;
    if (scale) legendIn(bar, scale, entry.unit);
    while (lines.length < of.length) {
      lines.push(attentionLine());
      holder.append(lines.at(-1).root);
    }
    lines.forEach((line, i) => line.draw(of[i] ?? null, { scale, unit: entry?.unit, best: i === 0, alone: of.length < 2 }));
  }
  return { root, draw };
}

function fillHeads(select, entry, axis) {
  const items = Array.from({ length: entry.shape[entry.axes.indexOf(axis)] }, (_, i) => [numberOf(entry, axis, i), nameOf(entry, axis, i)]);
  const words = JSON.stringify(items);
  if (select.words !== words) select.replaceChildren(...items.map(([value, text]) => el("option", { value }, text)));
  select.words = words;
  select.value = state[axis];
}

function attentionLine() {
  const name = el("p", { class: "told" });
  let prompt = 0, row = [], unit = "", texts = "";
  const text = tokenText("tokens that a head looks at", (i, word) =>
    [`${i} ${word}`, i < prompt ? "in the prompt" : "sampled", Number.isNaN(row[i]) ? "no value" : `attention ${fmt(row[i])} ${unit}`]);
  const root = el("div", { class: "looksat" }, name, text.root);

  function draw(of, { scale, unit: of_, best, alone }) {
    root.hidden = !of;
    if (!of) return;
    const before = of.prompt ?? [], tokens = [...before, ...(of.rollout.tokens ?? [])];
    [prompt, row, unit] = [before.length, of.row, of_];
    const role = alone ? "Rollout" : best ? "Winner" : "Loser";
    write(name, `${role} ${plain(of.rollout.name)}, advantage ${advantageOf(of.rollout)}`);
    const given = tokens.length ? tokens : Array.from(row).flatMap((value, i) => (Number.isNaN(value) ? [] : [` ${i}`]));
    const same = JSON.stringify([prompt, given]);
    if (same !== texts) {
      text.put(given, prompt);
      text.split();
    }
    texts = same;
    text.colour((i) => (scale ? shade(scale, row[i]) : null));
  }
  return { root, draw };
}
