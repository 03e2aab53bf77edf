// Draws one map of queries and keys: cells, tokens along both axes, and the value of a cell under
// the pointer or chosen by the arrow keys.

// A token with its place; its place alone where it has no name.
function tokenAt(entry, axis, i) {
  const label = entry.labels?.[axis]?.[i];
  return label === undefined ? String(i) : `${i} ${token(label)}`;
}

// Pixels for the names along an axis, of so many letters; the whole token is under the pointer.
function labelRoom(entry, axis, letters) {
  const names = entry.labels?.[axis] ?? [String(entry.shape.at(-1))];
  return Math.min(84, 10 + 6 * longest(names.map((name) => cut(token(name), letters))));
}

function patternMap(pointAt, follow, others) {
  const canvas = el("canvas", { class: "pattern", tabindex: 0, role: "application" });
  const caption = el("figcaption", {}), bar = el("div");
  const axes = el("div", { class: "axes" }, "query ↓ key →");
  const root = el("figure", {}, caption, canvas, axes, bar);
  const image = bitmap();
  const map = { root, draw, cross, shown: null };
  let framed = "", place = null, over = null, pointed = null;

  function draw(given) {
    map.shown = given;
    const { entry, values, scale, note, cell, letters, title } = given;
    const [rows, columns] = entry.shape.slice(-2);
    const masked = isMasked(entry, values, rows, columns), colour = packer(scale);
    const left = labelRoom(entry, "query", letters), top = labelRoom(entry, "key", letters);
    place = { rows, columns, left, top, cell, letters, masked };
    drawFrame(entry);
    const hidden = packed(rgbOf("--masked"));
    image.fill(rows, columns, (i) =>
      (masked && i % columns > Math.floor(i / columns) ? hidden : colour(values[i])));
    cross(given.over);
    write(caption, note);
    legendIn(bar, scale, entry.unit);
    const name = `${title}, ${note}, unit ${entry.unit}; arrow keys move, Enter follows a query`;
    if (canvas.getAttribute("aria-label") !== name) canvas.setAttribute("aria-label", name);
    if (pointed) point(pointed);
  }

  // Tokens along the axes: drawn anew only where they or their size changed.
  function drawFrame(entry) {
    const { rows, columns, left, top, cell, letters } = place;
    const { query = [], key = [] } = entry.labels ?? {};
    const size = [rows, columns, cell, letters, devicePixelRatio];
    const is = [...size, theme(), state.query, ...query, "/", ...key].join("\n");
    if (is === framed) return;
    framed = is;
    const context = canvasOf(canvas, left + columns * cell + 2, top + rows * cell + 2);
    context.textBaseline = "middle";
    const every = Math.ceil(10 / cell);
    const write = (i, names, at) => {
      const own = i === state.query;
      const near = state.query !== null && Math.abs(i - state.query) < every;
      if (!own && (i % every || near)) return;
      context.fillStyle = style(own ? "--ink" : "--faint");
      context.font = `${own ? "bold " : ""}10px system-ui, sans-serif`;
      at(cut(names[i] === undefined ? String(i) : token(names[i]), letters));
    };
    for (let i = 0; i < rows; i++) {
      write(i, query, (text) => {
        context.textAlign = "right";
        context.fillText(text, left - 3, top + (i + 0.5) * cell, left - 4);
      });
    }
    for (let i = 0; i < columns; i++) {
      write(i, key, (text) => upwards(context, text, left + (i + 0.5) * cell, top - 3));
    }
  }

  // The cells, the query that is followed, and the lines through `cell`, [query, key].
  function cross(cell) {
    over = cell;
    if (!place) return;
    const { rows, columns, left, top, cell: size } = place, context = canvas.getContext("2d");
    image.draw(context, left, top, columns * size, rows * size);
    // Around the cells where they are too thin to hold a line.
    const out = size < 6 ? 1 : 0;
    const box = (x, y, width, height, name) => {
      context.lineWidth = 1;
      context.strokeStyle = style(name);
      context.strokeRect(left + x * size + 0.5 - out, top + y * size + 0.5 - out,
        width * size - 1 + 2 * out, height * size - 1 + 2 * out);
    };
    context.save();
    context.beginPath();
    context.rect(left, top, columns * size, rows * size);
    context.clip(); // what is drawn beyond the cells would stay
    if (state.query !== null && state.query < rows) box(0, state.query, columns, 1, "--mark");
    if (over && over[0] < rows && over[1] < columns) {
      box(0, over[0], columns, 1, "--accent");
      box(over[1], 0, 1, rows, "--accent");
    }
    context.restore();
  }

  function describe([query, key]) {
    const { entry, values } = map.shown, i = query * place.columns + key;
    const value = place.masked && key > query ? "masked" : fmt(values[i]);
    return [`query ${tokenAt(entry, "query", query)} → key ${tokenAt(entry, "key", key)}`,
      value, ...others(i)];
  }

  // `pointed` is kept so that what is said stays true while the steps go on.
  function point(event) {
    pointed = event;
    const query = event ? Math.floor((event.offsetY - place.top) / place.cell) : -1;
    const key = event ? Math.floor((event.offsetX - place.left) / place.cell) : -1;
    const inside = query >= 0 && key >= 0 && query < place.rows && key < place.columns;
    const same = inside ? over && over[0] === query && over[1] === key : !over;
    if (!same) pointAt(inside ? [query, key] : null);
    if (inside) tip.show(event, ...describe([query, key]));
    else tip.hide();
    return inside ? query : null;
  }

  function moveTo(query, key) {
    const cell = [within(query, place.rows), within(key, place.columns)];
    pointAt(cell);
    const at = canvas.getBoundingClientRect(), lines = describe(cell);
    tip.show({ clientX: at.left + place.left + (cell[1] + 1) * place.cell,
      clientY: at.top + place.top + (cell[0] + 1) * place.cell }, ...lines);
    say(lines.join("; "));
  }

  canvas.addEventListener("mousemove", ({ offsetX, offsetY, clientX, clientY }) =>
    point({ offsetX, offsetY, clientX, clientY }));
  canvas.addEventListener("mouseleave", () => point(null));
  canvas.addEventListener("blur", () => point(null));
  canvas.addEventListener("click", (event) => {
    const query = point(event);
    if (query !== null) follow(query);
  });
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [query, key] = over ?? [state.query ?? place.rows - 1, 0];
    const to = stepFrom(event.key, query, key);
    if (to) moveTo(...(over ? to : [query, key])); // the first key only shows where the cursor is
    else if (event.key === "Enter" || event.key === " ") follow(query);
    else if (event.key === "Escape") {
      point(null);
      set({ query: null });
    } else return;
    event.preventDefault();
  });
  return map;
}

// Whether nothing above the diagonal can hold attention: there it is not zero but absent.
function isMasked(entry, values, rows, columns) {
  if (entry.tril) return true;
  if (entry.type === "u8" || rows !== columns) return false; // a u8 pattern says so itself
  for (let row = 0; row < rows; row++) {
    for (let i = row * columns + row + 1; i < (row + 1) * columns; i++) {
      if (values[i] !== 0) return false;
    }
  }
  return true;
}
