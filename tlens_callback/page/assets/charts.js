// Draws charts, made once and then given new numbers: lines over layers, bars, maps, sparklines.

// Lines over the indices of one axis. update({names, series: [{name, values, colour, dash}], limits})
function lineChart(title, unit, across) {
  const width = 330, height = 150, left = 46, right = 8, top = 8, bottom = 30;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  const legends = el("span", { class: "legends" });
  const root = el("figure", { class: "chart" },
    el("figcaption", {}, title, el("small", {}, unit), legends), picture);
  let shown = null;

  function update({ names, series, limits }) {
    const finite = series.flatMap((one) => Array.from(one.values)).filter(Number.isFinite);
    const given = limits?.every(Number.isFinite) ? limits : null;
    let [low, high] = given ?? [Math.min(...finite, Infinity), Math.max(...finite, -Infinity)];
    if (!(low <= high)) [low, high] = [0, 1];
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    const n = names.length;
    const x = (i) => left + (n > 1 ? (i / (n - 1)) * (width - left - right) : (width - left - right) / 2);
    const y = (value) => top + (1 - (value - low) / (high - low)) * (height - top - bottom);
    const parts = [];
    for (const value of ticks(low, high)) {
      parts.push(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value),
        class: value === 0 ? "zero" : "grid" }));
      parts.push(words(left - 4, y(value) + 3, tickText(value, tickSize(low, high)), "end"));
    }
    const every = Math.max(1, Math.ceil(n / 8));
    names.forEach((name, i) => {
      if (i % every === 0) parts.push(words(x(i), height - bottom + 12, cut(name, 8), "middle"));
    });
    parts.push(words((left + width - right) / 2, height - 4, across, "middle"));
    for (const { values, colour, dash } of series) {
      const runs = [];
      Array.from(values).forEach((value, i, all) => {
        if (!Number.isFinite(value)) return;
        runs.push(`${i && Number.isFinite(all[i - 1]) ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`);
      });
      parts.push(svg("path", { d: runs.join(""), stroke: colour, class: "line", "stroke-dasharray": dash ?? "" }));
      if (n === 1 && Number.isFinite(values[0])) {
        parts.push(svg("circle", { cx: x(0), cy: y(values[0]), r: 3, fill: colour }));
      }
    }
    picture.replaceChildren(...parts);
    picture.setAttribute("aria-label", `${title}, ${unit}, over ${across}`);
    shown = { names, series, x, n };
    legends.replaceChildren(...series.map(({ name, colour, dash }) =>
      el("span", { class: "curve" }, sampleOf(colour, dash), name)));
  }
  picture.addEventListener("mousemove", (event) => {
    if (!shown) return;
    const across = event.clientX - picture.getBoundingClientRect().left;
    const at = (across - left) / (width - left - right) * Math.max(1, shown.n - 1);
    const i = Math.max(0, Math.min(shown.n - 1, Math.round(at)));
    tip.show(event, `${shown.names[i]} ${title}`,
      ...shown.series.map((one) => `${one.name}: ${fmt(one.values[i])}`));
  });
  picture.addEventListener("mouseleave", tip.hide);
  return { root, update };
}

function words(x, y, text, anchor) {
  const node = svg("text", { x, y, "text-anchor": anchor });
  node.textContent = text;
  return node;
}

// The distance of two to five round numbers within a range; 0 for a range that has no length.
function tickSize(low, high) {
  if (!(high > low)) return 0;
  const raw = (high - low) / 3, size = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((k) => k * size).find((one) => one >= raw);
}

function ticks(low, high) {
  const step = tickSize(low, high), out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) {
    out.push(Number((k * step).toPrecision(12)));
  }
  return out;
}

// A number at an axis, with as many digits as tell it from the one beside it.
function tickText(value, by) {
  const digits = Math.ceil(-Math.log10(by) - 1e-9);
  if (value === 0 || digits > 6 || Math.abs(value) >= 1e6) return fmt(value);
  return value.toFixed(Math.max(0, digits)).replace("-", "−");
}

// A map with the names of rows and columns. update({rows, columns, values, scale, unit, texts, axes})
// and, where cells can be chosen with the keyboard too: `chosen`, [row, column] or null; `marks`,
// cells that are outlined; `more(i)`, lines that pointing at cell i adds; `room`, its largest width.
function heatMap(title, onpick = null) {
  const canvas = el("canvas", { role: "img" }), bar = el("div");
  const named = el("div", { class: "axes" });
  const root = el("figure", { class: "chart" }, el("figcaption", {}, title), canvas, named, bar);
  let shown = null;

  function update({ rows, columns, values, scale, unit, texts, axes, chosen, marks = [], more = () => [], room = 420 }) {
    const long = columns.some((name) => name.length > 4);
    const left = 10 + 6 * Math.min(14, Math.max(...rows.map((name) => name.length)));
    const top = long ? 12 + 5.5 * Math.min(12, Math.max(...columns.map((name) => name.length))) : 18;
    const width = Math.max(6, Math.min(long ? 16 : 24, Math.floor((room - (room < 420 ? left : 0)) / columns.length)));
    const height = Math.max(6, Math.min(16, Math.floor(330 / rows.length)));
    const context = canvasOf(canvas, left + columns.length * width + 4, top + rows.length * height + 4);
    paint(context, left, top, columns.length * width, rows.length * height, rows.length, columns.length,
      (row, column) => shade(scale, values[row * columns.length + column]));
    context.fillStyle = style("--faint");
    context.font = "10px system-ui";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const everyRow = Math.ceil(11 / height), everyColumn = Math.ceil((long ? 11 : 22) / width);
    rows.forEach((name, i) => {
      if (i % everyRow === 0) context.fillText(cut(name, 14), left - 4, top + (i + 0.5) * height);
    });
    columns.forEach((name, i) => {
      if (i % everyColumn) return;
      context.save();
      context.translate(left + (i + 0.5) * width, top - 4);
      if (long) context.rotate(-Math.PI / 2);
      context.textAlign = long ? "left" : "center";
      context.fillText(cut(name, 12), 0, long ? 0 : -5);
      context.restore();
    });
    write(named, axes);
    legendIn(bar, scale, unit);
    shown = { rows, columns, values, texts, left, top, width, height, chosen, more };
    for (const cell of marks) outline(context, cell, "--mark", 1);
    if (chosen) outline(context, chosen, "--ink", -1); // around it, so that a mark is seen too
    canvas.setAttribute("aria-label", [`${title}, ${unit}`, ...(chosen ? describe(chosen) : [])].join("; "));
    if (chosen === undefined) return;
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
  }
  // Two lines, one of which is seen on any colour; `inside`: how far within the cell's edge.
  function outline(context, [row, column], name, inside) {
    const line = (colour, thick, edge) => {
      context.lineWidth = thick;
      context.strokeStyle = style(colour);
      context.strokeRect(shown.left + column * shown.width + edge, shown.top + row * shown.height + edge,
        shown.width - 2 * edge, shown.height - 2 * edge);
    };
    line(name, 2, inside);
    line("--paper", 1, inside + 1.5);
  }
  function describe([row, column]) {
    const i = row * shown.columns.length + column;
    return [`${shown.rows[row]} ${shown.columns[column]} ${title}`,
      fmt(shown.values[i]) + (shown.texts ? ` ${token(shown.texts[i])}` : ""), ...shown.more(i)];
  }
  function cellAt(event) {
    const column = Math.floor((event.offsetX - shown.left) / shown.width);
    const row = Math.floor((event.offsetY - shown.top) / shown.height);
    const inside = row >= 0 && column >= 0 && row < shown.rows.length && column < shown.columns.length;
    return inside ? [row, column] : null;
  }
  canvas.addEventListener("click", (event) => {
    const cell = shown && cellAt(event);
    if (cell) onpick?.(...cell);
  });
  canvas.addEventListener("mousemove", (event) => {
    const cell = shown && cellAt(event);
    if (!cell) return tip.hide();
    tip.show(event, ...describe(cell));
  });
  canvas.addEventListener("keydown", (event) => {
    if (shown?.chosen === undefined || !bare(event)) return;
    const to = stepFrom(event.key, ...(shown.chosen ?? [0, 0]));
    if (event.key === "Escape") tip.hide();
    else if (!to) return;
    else {
      const cell = [within(to[0], shown.rows.length), within(to[1], shown.columns.length)];
      const { left, top, width, height } = shown, box = canvas.getBoundingClientRect();
      onpick?.(...cell);
      tip.show({ clientX: box.left + left + (cell[1] + 1) * width, clientY: box.top + top + (cell[0] + 1) * height }, ...describe(cell));
      say(describe(cell).join("; "));
    }
    event.preventDefault();
  });
  canvas.addEventListener("blur", tip.hide);
  canvas.addEventListener("mouseleave", tip.hide);
  return { root, update };
}

// Bars to the left and right of zero; a bar of `most` is as long as one can be.
// update([{name, value, before}], unit, most)
function barChart() {
  const root = el("div", { class: "bars" });

  function update(items, unit, most) {
    while (root.children.length > items.length) root.lastChild.remove();
    items.forEach((item, i) => {
      const line = root.children[i] ?? root.appendChild(el("div", { class: "bar-line" },
        el("span", { class: "name" }), el("span", { class: "track" }, el("i"), el("b")),
        el("span", { class: "number" })));
      const [name, track, number] = line.children;
      name.textContent = item.name;
      const place = (node, value) => {
        const share = Number.isFinite(value) ? (Math.abs(value) / most) * 50 : 0;
        node.style.left = `${value < 0 ? 50 - share : 50}%`;
        node.style.width = `${share}%`;
      };
      place(track.children[0], item.value);
      track.children[0].style.background = css(DIVERGING[theme()][item.value < 0 ? 46 : 209]);
      place(track.children[1], item.before);
      number.textContent = fmt(item.value);
      line.title = `${item.name}: ${fmt(item.value)} ${unit}, at first ${fmt(item.before)}`;
    });
  }
  return { root, update };
}

// A small curve over training, with the slider's step on it. draw() returns its picture.
function spark(key) {
  const width = 110, height = 20, line = svg("polyline"), mark = svg("line", { y1: 0, y2: height });
  const picture = svg("svg", { width, height, class: "spark", "aria-hidden": "true" }, line, mark);
  let drawn = "";
  function draw() {
    const steps = data.stepsOf(key), first = Math.min(data.steps[0], steps[0]);
    const last = Math.max(data.steps.at(-1), steps.at(-1));
    const x = (step) => 3 + ((step - first) / (last - first || 1)) * (width - 6);
    const now = `${first} ${last} ${steps.length}`;
    if (now !== drawn) {
      drawn = now;
      const [low, high] = data.range(key);
      const y = (value) => 3 + (1 - (value - low) / (high - low || 1)) * (height - 6);
      const points = steps.map((step) => [step, data.number(key, step, 0)])
        .filter(([, value]) => Number.isFinite(value));
      line.setAttribute("points", points.map(([s, v]) => `${x(s).toFixed(1)},${y(v).toFixed(1)}`).join(" "));
    }
    mark.setAttribute("x1", x(state.step));
    mark.setAttribute("x2", x(state.step));
    return picture;
  }
  return { draw };
}
