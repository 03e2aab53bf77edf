// Draws tables: numbers of one instrument, ranked lists, lists along one axis, events.

const MOST_ROWS = 40;
const LONG = 40; // Letters: a longer text is no token, and is wrapped.

// A table whose body is filled anew. Its head sorts; what is long is cut, with a button for all.
// A row is a list of cells: a text, or {text or node, props, by}, `by` being what it is sorted by.
function table(caption) {
  const head = el("thead"), body = el("tbody"), more = el("button", { class: "more" });
  const root = el("div", { class: "table" },
    el("table", {}, caption ? el("caption", {}, caption) : null, head, body), more);
  let all = false, last = [[], []], sorting = null; // {column, down}
  more.addEventListener("click", () => {
    all = !all;
    fill();
  });

  function update(columns, rows) {
    if (columns.join("\n") !== last[0].join("\n")) {
      head.replaceChildren(el("tr", {}, ...columns.map((name, i) => el("th", { scope: "col" },
        el("button", { class: "link", onclick: () => sort(i) }, name)))));
      sorting = null;
    }
    last = [columns, rows];
    fill();
  }
  function sort(column) {
    const down = sorting?.column === column ? !sorting.down : true;
    sorting = { column, down };
    [...head.firstChild.children].forEach((cell, i) =>
      (i === column ? cell.setAttribute("aria-sort", down ? "descending" : "ascending")
        : cell.removeAttribute("aria-sort")));
    fill();
  }
  function fill() {
    let rows = last[1];
    if (sorting) {
      const by = (row) => row[sorting.column]?.by ?? -Infinity, sign = sorting.down ? -1 : 1;
      rows = rows.toSorted((a, b) => (by(a) > by(b) ? sign : by(a) < by(b) ? -sign : 0));
    }
    const shown = all ? rows : rows.slice(0, MOST_ROWS);
    while (body.children.length > shown.length) body.lastChild.remove();
    shown.forEach((cells, i) => {
      const line = body.children[i] ?? body.appendChild(el("tr"));
      while (line.children.length > cells.length) line.lastChild.remove();
      cells.forEach((cell, j) => fillCell(line.children[j] ?? line.appendChild(el("td")), cell));
    });
    more.hidden = rows.length <= MOST_ROWS;
    more.textContent = all ? `show ${MOST_ROWS}` : `show all ${rows.length}`;
  }
  return { root, update };
}

function fillCell(node, cell) {
  if (cell?.node) {
    if (node.firstChild !== cell.node) node.replaceChildren(cell.node);
  } else {
    const text = cell?.text ?? cell ?? "";
    if (node.textContent !== text) node.textContent = text;
  }
  node.className = cell?.props?.class ?? "";
  node.title = cell?.props?.title ?? "";
}

const numeric = (value) => ({ text: fmt(value), by: Number.isNaN(value) ? -Infinity : value,
  props: { class: "number" } });

// The readings without axes: value, first value, curve.
function numbersPanel(keys) {
  const { root, update } = table(), curves = keys.map((key) => spark(key));
  function draw() {
    const before = isAlone() ? [] : ["first", "over the steps"];
    update(["measure", "value", ...before, "unit"], keys.map((key, i) => {
      const step = data.latest(key, state.step), first = data.first(key);
      const name = parts(key).measure, numbers = [numeric(data.number(key, first, 0))];
      if (before.length) numbers.push({ node: curves[i].draw() });
      return [{ text: name + late(step), by: name },
        step === null ? "" : numeric(data.number(key, step, 0)),
        ...(before.length ? numbers : []), data.entry(key, first).unit];
    }));
  }
  return { root, draw };
}

const late = (step) =>
  (step === state.step ? "" : step === null ? " (not yet measured)" : ` (step ${step})`);

// Readings [axis, "rank", ...] of one instrument: a row for each thing that is listed.
function rankedPanel(keys) {
  const { root, update } = table();
  function draw() {
    const there = keys.filter((key) => data.latest(key, state.step) !== null);
    const entries = there.map((key) => data.entry(key, data.latest(key, state.step)));
    if (!entries.length) return update(["not yet measured"], []);
    const values = entries.map((entry) => valuesOf(entry.key, entry.step));
    const lead = entries[0].axes[0], [rows, ranks] = entries[0].shape;
    const peak = entries.findIndex(({ key }) => parts(key).measure === "peak");
    const shown = entries.map((_, i) => i).filter((i) =>
      i !== peak && entries[i].shape[0] === rows && entries[i].shape[1] === ranks);
    const columns = shown.map((i) => parts(entries[i].key).measure
      + (entries[i].axes.length > 2 ? " at its peak" : "") + late(entries[i].step));
    const out = [];
    for (let row = 0; row < rows; row++) {
      for (let rank = 0; rank < ranks; rank++) {
        const at = row * ranks + rank;
        out.push([{ text: nameOf(entries[0], lead, row), by: row }, { text: String(rank), by: rank },
          ...shown.map((i) => listed(entries[i], values[i], at, values[peak]?.[at] ?? null))]);
      }
    }
    update([lead, "rank", ...columns], out);
  }
  return { root, draw };
}

// One cell: a text with its number behind it, a number, or of [..., pos] the value at its peak.
function listed(entry, values, at, peak) {
  if (!values) return "…";
  if (entry.axes.length === 2) {
    const number = numeric(values[at]);
    return entry.texts ? textCell(entry, at, number) : number;
  }
  const n = entry.shape[2], own = values.subarray(at * n, at * n + n);
  let i = peak;
  if (peak === null || !(peak < n)) {
    i = 0;
    own.forEach((value, j) => { if (Math.abs(value) > Math.abs(own[i])) i = j; });
  }
  return { text: `${fmt(own[i])} at ${nameOf(entry, entry.axes[2], i)}`, by: own[i], props: { class: "number" } };
}

// A text, with its number in the title where it only stands for the text, else beside it. Of a
// context the token that is meant is marked; a long text that is named is read as a text.
function textCell(entry, i, number) {
  const text = entry.texts[i], context = /^([^]*)\[\[([^]*)\]\]([^]*)$/.exec(text);
  if (entry.unit === "index" && text.length > LONG) {
    const lines = text.split("\n").map(visible).join("\n");
    return { text: lines, by: text, props: { class: "long", title: number.text } };
  }
  if (entry.unit === "index") return { text: token(text), by: text, props: { title: number.text } };
  if (!context) return { text: `${token(text)} ${number.text}`, by: number.by };
  const [, before, meant, after] = context.map((piece) => piece && token(piece));
  const node = el("span", {}, before, el("mark", {}, meant), after, el("small", {}, ` ${number.text}`));
  return { node, by: number.by };
}

// Readings along one axis that is none of layers: a row for each index, a column for each measure.
function listPanel(keys) {
  const { root, update } = table();
  function draw() {
    const there = keys.filter((key) => data.latest(key, state.step) !== null);
    const entries = there.map((key) => data.entry(key, data.latest(key, state.step)));
    if (!entries.length) return update(["not yet measured"], []);
    const axis = entries[0].axes[0], n = Math.max(...entries.map((entry) => entry.shape[0]));
    const columns = entries.map((entry) => parts(entry.key).measure + late(entry.step));
    update([axis, ...columns], Array.from({ length: n }, (_, i) => [
      { text: nameOf(entries[0], axis, i), by: i },
      ...entries.map((entry) => {
        if (i >= entry.shape[0]) return "";
        const number = numeric(data.number(entry.key, entry.step, i));
        return entry.texts ? textCell(entry, i, number) : number;
      })]));
  }
  return { root, draw };
}

// Everything that happened, in order; a click goes there.
function eventsView(root) {
  const { root: box, body } = card("Events", { id: "events" });
  root.append(box);
  function draw(changed) {
    if (!changed.has("data") && !changed.has("step")) return;
    const found = [];
    for (const key of data.keys()) {
      for (const step of data.stepsOf(key)) {
        const entry = data.entry(key, step);
        if (entry.axes.join() !== "event") break;
        for (const text of entry.texts ?? entry.labels.event ?? []) found.push([step, text]);
      }
    }
    found.sort((a, b) => a[0] - b[0]);
    box.hidden = !found.length;
    body.replaceChildren(el("ol", { class: "events" }, ...found.map(([step, text]) => el("li", {},
      el("button", { class: "link", "aria-current": step === state.step ? "step" : false,
        onclick: () => set({ step }) }, `step ${step}`), ` ${text}`))));
  }
  return { draw };
}
