// Lists the neurons and the features that tell winners from losers best, below the heads.

// Keys of contrasts of some of many, which their texts name; a key with a suffix says more of them.
const rankedContrasts = remembered(() => data.keys().filter((key) => meaningOf(key).quantity === "contrast"
  && data.entry(key, data.first(key)).axes.join() === "rank" && data.entry(key, data.first(key)).texts));

function rankedBlock() {
  const root = el("div", { class: "ranked" }), blocks = new Map(); // key -> {root, update}

  function draw(got) {
    const keys = rankedContrasts().filter((key) => data.latest(key, state.step) !== null);
    root.hidden = !keys.length;
    for (const [key, block] of blocks) block.root.hidden = !keys.includes(key);
    for (const key of keys) {
      if (!blocks.has(key)) {
        const block = table(cut(visible(meaningOf(key).title ?? parts(key).measure), 80));
        blocks.set(key, block);
        root.append(block.root);
      }
      fill(blocks.get(key), key, data.latest(key, state.step), got);
    }
  }

  function fill({ update }, key, step, got) {
    const entry = data.entry(key, step), values = data.values(key, step) ?? [], q = qAt(key, step);
    const beside = Object.entries(BESIDE_RANKED).filter(([suffix]) => data.entry(`${key}${suffix}`, step)?.shape.join() === entry.shape.join());
    update(["name", entry.unit + late(step), ...(q ? ["false discovery rate"] : []), ...beside.map(([, words]) => words)],
      Array.from(values, (value, i) => [nameCell(entry.texts[i], q?.[i], got), numeric(value), ...(q ? [numeric(q[i])] : []),
        ...beside.map(([suffix]) => numeric(data.number(`${key}${suffix}`, step, i)))]));
  }
  return { root, draw };
}

const BESIDE_RANKED = { _length: BESIDE._length, _run: "the whole run, in sd", _run_q: "its false discovery rate" };

// The name of a neuron or feature; where its activation at each token is at hand, a button shows it.
function nameCell(name, q, got) {
  const props = q < DISCOVERY ? { class: "found", title: "tells winners from losers" } : {};
  const shown = got?.one.measures.find((key) => parts(key).probe === name && data.has(key, got.step));
  if (!shown) return { text: visible(name), by: name, props };
  return { node: el("button", { class: "link", title: "colour the tokens by it", onclick: () => set({ colour: withoutInstrument(shown) }) },
    visible(name)), by: name, props };
}
