// Draws the matrix of a score, layer x head or layer x another axis: its value, or its change since
// the first step; and lists the heads with the largest values or changes.

const MOST_LISTED = 8;
const signed = (value) => (value > 0 ? "+" : "") + fmt(value);
const plain = (text) => cut(visible(text), 60);

function matrixView(root) {
  const { root: box, body, heading } = card("Heads");
  const title = heading.firstChild;
  const choose = el("select", { id: "score", "aria-label": "score",
    onchange: () => set({ score: choose.value }) });
  const change = el("input", { type: "checkbox", id: "change",
    onchange: () => set({ change: change.checked }) });
  const changeWords = el("span"), changing = el("label", {}, change, changeWords);
  const canvas = el("canvas", { id: "matrix", tabindex: 0, role: "application" });
  const frame = el("div", { style: "overflow:auto;max-height:75vh" }, canvas);
  const meaning = el("p", { class: "told meaning" });
  const axes = el("div", { class: "axes" }), bar = el("div");
  const told = el("p", { class: "told", id: "matrixtold" });
  const list = topList();
  heading.append(choose, changing);
  body.append(meaning, frame, axes, bar, told, list.root);
  root.append(box);
  const image = bitmap();
  let shape = null, framed = "", room = 0, cursor = [0, 0], pointed = null;
  const wanted = ["data", "step", "score", "change", "layer", "head", "pins", "theme", "size"];

  function draw(changed) {
    if (!wanted.some((name) => changed.has(name))) return;
    if (changed.has("data")) {
      fillScores(choose);
      const [first] = data.steps, since = checkpointAt(first) ? stepName(first) : "the first step";
      write(changeWords, ` change since ${since}`);
      changing.title = wholeNames(first);
      changing.hidden = isAlone();
    }
    choose.value = state.score ?? "";
    write(meaning, describedBy(parts(scoreOf(state.score)?.key ?? "").instrument).sentence ?? "");
    change.checked = state.change;
    const got = scoreAt(state.score, state.step, state.change);
    for (const node of [frame, axes, bar, list.root]) node.hidden = !got;
    if (!got) {
      shape = null;
      const score = scoreOf(state.score), first = score && data.first(score.key);
      return write(told, !score ? "There is no matrix of layers in these data."
        : first > state.step ? `Not measured until step ${first}.` : "Being read …");
    }
    if (!room || [...changed].some((name) => name !== "step")) room = body.clientWidth;
    shape = { ...got, ...layout(got.entry, room) };
    const { entry, rows, columns, values, scale } = shape;
    drawFrame();
    const colour = packer(scale);
    image.fill(rows, columns, (i) => colour(values[i]));
    drawCells();
    legendIn(bar, scale, entry.unit);
    write(told, got.step === state.step ? "" : `measured at step ${got.step}`);
    title.data = shape.ofHeads ? "Heads" : "Layers";
    write(axes, `layer ↓ ${entry.axes.at(-1)} →`);
    list.draw(shape);
    if (pointed) point(pointed);
    const cell = whereIs();
    canvas.setAttribute("aria-label", `${state.score} at step ${got.step}; `
      + (cell ? describe(...cell)[0] : `L${state.layer}H${state.head} is not in it`));
  }

  // Names along the axes: drawn anew only where they or the room for them changed.
  function drawFrame() {
    const { entry, rows, columns, left, top, width, height, across, down, upright } = shape;
    const is = JSON.stringify([across, down, left, top, width, height, theme(), devicePixelRatio]);
    if (is === framed) return;
    framed = is;
    const context = canvasOf(canvas, left + columns * width + 2, top + rows * height + 2);
    context.fillStyle = style("--faint");
    context.font = "10px system-ui";
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (let row = 0; row < rows; row += Math.ceil(11 / height)) {
      context.fillText(down[row], left - 4, top + (row + 0.5) * height);
    }
    const every = Math.ceil((upright ? 11 : 6 * longest(across) + 4) / width);
    for (let column = 0; column < columns; column += every) {
      const x = left + (column + 0.5) * width;
      if (upright) upwards(context, across[column], x, top - 4);
      else {
        context.textAlign = "center";
        context.fillText(across[column], x, top - 8);
      }
    }
  }

  function drawCells() {
    const { rows, columns, left, top, width, height } = shape, context = canvas.getContext("2d");
    image.draw(context, left, top, columns * width, rows * height);
    const mark = ([row, column], name, line, inside = 0) => {
      context.lineWidth = line;
      context.strokeStyle = style(name);
      const edge = inside + line / 2;
      context.strokeRect(left + column * width + edge, top + row * height + edge,
        width - 2 * edge, height - 2 * edge);
    };
    for (const cell of shape.ofHeads ? state.pins.map(whereIs).filter(Boolean) : []) {
      mark(cell, "--mark", 2);
      mark(cell, "--paper", 1, 2);
    }
    const own = whereIs();
    if (!own || (!shape.ofHeads && document.activeElement !== canvas)) return;
    mark(own, "--ink", 2); // one of the two is seen on any colour
    mark(own, "--paper", 1.5, 2);
  }

  // The cell of a head; of a matrix without heads, the cell that the arrow keys have come to.
  function whereIs([layer, head] = [state.layer, state.head]) {
    if (!shape.ofHeads) return [within(cursor[0], shape.rows), within(cursor[1], shape.columns)];
    const place = placeOfHead(shape.entry, layer, head);
    return place < 0 ? null : [Math.floor(place / shape.columns), place % shape.columns];
  }

  // "L5H1 induction 0.93 ± 0.02", and what it was at the first step.
  function describe(row, column) {
    const { score, now, firstStep, step, spread } = shape, i = row * shape.columns + column;
    const first = isAlone() ? null : shape.first;
    const name = `${cellName(shape.entry, row, column)} ${plain(score.measure)}`;
    const text = textsOf(shape.entry, step)?.[i];
    const value = fmt(now[i]) + (spread ? ` ± ${fmt(spread[i])}` : "")
      + (text === undefined ? "" : ` ${token(text)}`);
    const before = first ? `${fmt(first[i])} at step ${firstStep}` : "";
    const by = first ? signed(now[i] - first[i]) : "";
    if (state.change) return [`${name} change ${by}`, `${value} at step ${step}, ${before}`];
    return [`${name} ${value}`, ...(first ? [`${before}, change ${by}`] : [])];
  }

  function cellAt(event) {
    if (!shape) return null;
    const column = Math.floor((event.offsetX - shape.left) / shape.width);
    const row = Math.floor((event.offsetY - shape.top) / shape.height);
    const inside = row >= 0 && row < shape.rows && column >= 0 && column < shape.columns;
    return inside ? [row, column] : null;
  }

  function choosing([row, column]) {
    const { entry } = shape;
    return [numberOf(entry, "layer", row), numberOf(entry, "head", column)];
  }

  // Keys move the head, or the cursor of a matrix that has none; the value is said and shown.
  function move(row, column) {
    [row, column] = [within(row, shape.rows), within(column, shape.columns)];
    if (shape.ofHeads) {
      const [layer, head] = choosing([row, column]);
      set({ layer, head });
    } else {
      cursor = [row, column];
      drawCells();
    }
    const { left, top, width, height } = shape, x = left + column * width, y = top + row * height;
    const { scrollLeft, scrollTop, clientWidth, clientHeight } = frame;
    if (x < scrollLeft + left || x + width > scrollLeft + clientWidth) frame.scrollLeft = x - left;
    if (y < scrollTop + top || y + height > scrollTop + clientHeight) frame.scrollTop = y - top;
    const at = canvas.getBoundingClientRect(), lines = describe(row, column);
    tip.show({ clientX: at.left + x + width, clientY: at.top + y + height }, ...lines);
    say(lines.join("; "));
  }

  // `pointed` is kept so that what is said stays true while the steps go on.
  function point(event) {
    pointed = event;
    const cell = event && cellAt(event);
    if (cell) tip.show(event, ...describe(...cell));
    else tip.hide();
  }
  canvas.addEventListener("mousemove", ({ offsetX, offsetY, clientX, clientY }) =>
    point({ offsetX, offsetY, clientX, clientY }));
  canvas.addEventListener("mouseleave", () => point(null));
  canvas.addEventListener("blur", () => {
    tip.hide();
    if (shape) drawCells();
  });
  canvas.addEventListener("focus", () => shape && drawCells());
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (!cell) return;
    if (!shape.ofHeads) {
      cursor = cell;
      return drawCells();
    }
    const [layer, head] = choosing(cell);
    if (event.shiftKey) pin(layer, head);
    else set({ layer, head });
  });
  canvas.addEventListener("keydown", (event) => {
    if (!shape || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = stepFrom(event.key, ...(whereIs() ?? [0, 0]));
    const pinning = shape.ofHeads && (event.key === "Enter" || event.key === "p");
    if (to) move(...to);
    else if (pinning) pin(state.layer, state.head);
    else if (event.key === "Escape") tip.hide();
    else return;
    event.preventDefault();
  });
  return { draw };
}

const longest = (names) => names.reduce((most, name) => Math.max(most, name.length), 0);

// The size of the cells, and the room for names beside and above them.
function layout(entry, room) {
  const [rows, columns] = entry.shape.slice(-2), axis = entry.axes.at(-1);
  const names = (of, size) => Array.from({ length: size }, (_, i) => plain(nameOf(entry, of, i)));
  const down = names("layer", rows).map((name) => cut(name, 10));
  const across = names(axis, columns).map((name) => cut(name, 14));
  const left = 10 + 6 * longest(down);
  const width = Math.max(columns > 128 ? 2 : 6, Math.min(34, Math.floor((room - left) / columns)));
  const numbers = across.every((name) => /^\D?\d+$/.test(name));
  const upright = !numbers && 6 * longest(across) > width;
  const height = Math.max(rows > 80 ? 5 : 8, Math.min(22, Math.floor(520 / rows)));
  return { rows, columns, left, width, height, across, down, upright,
    top: upright ? 10 + 6 * longest(across) : 18, ofHeads: axis === "head" };
}

function upwards(context, text, x, y) {
  context.save();
  context.translate(x, y);
  context.rotate(-Math.PI / 2);
  context.textAlign = "left";
  context.fillText(text, 0, 0);
  context.restore();
}

// "L5H1", "L5 q_proj", "L5 expert 3".
function cellName(entry, row, column) {
  const axis = entry.axes.at(-1), layer = plain(nameOf(entry, "layer", row));
  const name = plain(nameOf(entry, axis, column));
  if (axis === "head") return layer + name;
  return entry.labels?.[axis] ? `${layer} ${name}` : `${layer} ${axis} ${name}`;
}

// The cells of largest magnitude, highest or lowest value: rank, name, value, change.
function topList() {
  const order = el("select", { id: "order", "aria-label": "which to list",
    onchange: () => draw(last) },
    el("option", { value: "size" }, "largest"), el("option", { value: "high" }, "highest"),
    el("option", { value: "low" }, "lowest"), el("option", { value: "moved" }, "most changed"));
  const cell = (tag, child, side = "right") =>
    el(tag, { style: `padding:0 10px 0 0;text-align:${side}` }, child);
  const measure = el("span"), since = el("span"), body = el("tbody");
  let last = null;
  const rows = Array.from({ length: MOST_LISTED }, (_, i) => {
    const look = "max-width:210px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap";
    const name = el("button", { style: look, onclick: () => set(last.found[i].head) });
    const one = { name, value: el("span"), change: el("span") };
    one.root = el("tr", {}, cell("td", String(i + 1)), cell("td", name, "left"),
      cell("td", one.value), cell("td", one.change));
    body.append(one.root);
    return one;
  });
  const head = el("tr", {}, cell("th", ""), cell("th", order, "left"), cell("th", measure),
    cell("th", since));
  const look = "font-size:12px;border-collapse:collapse;margin-top:6px";
  const root = el("table", { id: "top-heads", style: look }, el("thead", {}, head), body);

  function draw(shape) {
    const { entry, now, firstStep, columns, ofHeads } = last = shape;
    const alone = isAlone(), first = alone ? null : shape.first;
    order.lastChild.hidden = alone;
    const moved = order.value === "moved" && first;
    const values = moved ? changeOf(now, first) : shape.values;
    const weigh = { high: (value) => value, low: (value) => -value }[order.value] ?? Math.abs;
    write(measure, plain(shape.score.measure));
    write(since, alone ? "" : `since step ${firstStep}`);
    since.title = wholeNames(firstStep);
    last.found = foremost(values, weigh).map((i) => {
      const row = Math.floor(i / columns), column = i % columns;
      const head = { layer: numberOf(entry, "layer", row), head: numberOf(entry, "head", column) };
      return { i, row, column, head };
    });
    rows.forEach((one, rank) => {
      const found = last.found[rank];
      if (one.root.hidden !== !found) one.root.hidden = !found;
      if (!found) return;
      const { i, row, column, head } = found;
      write(one.name, cellName(entry, row, column));
      write(one.value, fmt(now[i]));
      write(one.change, first ? signed(now[i] - first[i]) : "");
      one.name.disabled = !ofHeads;
      const chosen = ofHeads && head.layer === state.layer && head.head === state.head;
      if (one.chosen === chosen) return;
      one.chosen = chosen;
      one.name.setAttribute("aria-pressed", chosen);
      one.name.style.borderColor = chosen ? "var(--ink)" : "";
    });
  }
  return { root, draw };
}

// Indices of the few values that weigh most, of equal ones the first before the others.
function foremost(values, weigh) {
  const found = [], weights = [];
  for (let i = 0; i < values.length; i++) {
    if (!Number.isFinite(values[i])) continue;
    const weight = weigh(values[i]);
    if (found.length === MOST_LISTED && weight <= weights.at(-1)) continue;
    let at = found.length;
    while (at && weights[at - 1] < weight) at--;
    found.splice(at, 0, i);
    weights.splice(at, 0, weight);
    if (found.length > MOST_LISTED) found.length = weights.length = MOST_LISTED;
  }
  return found;
}

function pin(layer, head) {
  const there = state.pins.some((pin) => pin[0] === layer && pin[1] === head);
  if (!there && state.pins.length >= MOST_PINS) return say(`${MOST_PINS} heads are pinned already`);
  set({ pins: there ? state.pins.filter((pin) => pin[0] !== layer || pin[1] !== head)
    : [...state.pins, [layer, head]] });
}

// An open list would close if it were filled again with the same.
function fillScores(choose) {
  const names = scores().join("\n");
  if (choose.names === names) return;
  choose.names = names;
  const groups = new Map();
  for (const [name, { key, measure }] of allScores()) {
    const { instrument } = parts(key);
    if (!groups.has(instrument)) {
      groups.set(instrument, el("optgroup", { label: plain(instrument) }));
    }
    groups.get(instrument).append(el("option", { value: name, title: describedBy(instrument).sentence ?? "" },
      plain(`${instrument}: ${measure}`)));
  }
  choose.replaceChildren(...groups.values());
}
