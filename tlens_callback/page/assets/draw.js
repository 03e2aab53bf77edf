// Makes elements, formats numbers and tokens, and shows the tooltip. Text is never read as HTML.

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, value);
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A node's text, which stays the same node, and is left alone where it says so already.
function write(node, text) {
  if (!node.firstChild) node.append(text);
  else if (node.firstChild.data !== text) node.firstChild.data = text;
}

function fmt(value) {
  if (Number.isNaN(value)) return "not a number";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value).replace("-", "−");
  const text = size >= 1e5 || size < 1e-4 ? value.toExponential(2)
    : size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1)
    : size >= 0.1 ? value.toFixed(3).replace(/0$/, "") : value.toPrecision(3);
  return text.replaceAll("-", "−");
}

// A text as it can be seen: what has no shape, or turns the text around it, as its escape. A joiner
// between two emoji makes one of them.
function visible(text) {
  const joiner = /(?<=\p{Extended_Pictographic}\p{M}?)\u200d(?=\p{Extended_Pictographic})/u.source;
  return text.replace(new RegExp(`(?! |${joiner})[\\p{C}\\p{Z}]`, "gu"), (c) =>
    `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);
}

// A token: its spaces and line ends as signs.
function token(text) {
  if (text === "") return "∅";
  return visible(text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥"));
}

function cut(text, most) {
  if (text.length <= most) return text;
  const letters = [...text.slice(0, 2 * most)]; // whole ones: no half of a surrogate pair
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : text;
}

// The name of an index along an axis: L5, H1, a token with its place, or its label.
function nameOf(entry, axis, i) {
  const label = entry.labels?.[axis]?.[i];
  const letter = { layer: "L", head: "H" }[axis];
  if (letter && (label === undefined || /^\d+$/.test(label))) return letter + (label ?? i);
  if (label === undefined) return String(i);
  // A loss has no first token: the place along "token" is not that in the text.
  if (axis === "token") return token(label);
  return ["pos", "query", "key"].includes(axis) ? `${i} ${token(label)}` : visible(label);
}

// "layer" of a selection of layers: index along the axis of layer number n, or -1.
function indexOf(entry, axis, n) {
  const labels = entry.labels?.[axis];
  if (labels?.every((name) => /^\d+$/.test(name))) return labels.indexOf(String(n));
  return n < entry.shape[entry.axes.indexOf(axis)] ? n : -1;
}
function numberOf(entry, axis, i) {
  const label = entry.labels?.[axis]?.[i];
  return label !== undefined && /^\d+$/.test(label) ? Number(label) : i;
}

const tip = {
  show(event, ...lines) {
    const node = document.getElementById("tip");
    node.replaceChildren(...lines.map((line) => el("div", {}, line)));
    node.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = node;
    node.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    const below = event.clientY + 16 + height < innerHeight;
    node.style.top = `${below ? event.clientY + 16 : Math.max(4, event.clientY - height - 10)}px`;
  },
  hide() { document.getElementById("tip").hidden = true; },
};

// Where a key leads from a cell, [row, column], not yet held within the edges; null for others.
function stepFrom(key, row, column) {
  const by = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
    ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
    Home: [row, 0], End: [row, Infinity] };
  return Object.hasOwn(by, key) ? by[key] : null;
}

const within = (at, size) => Math.max(0, Math.min(size - 1, at));

function say(text) { document.getElementById("say").textContent = text; }

// A canvas of coloured cells with sharp edges. Returns the context, in CSS pixels.
function canvasOf(canvas, width, height) {
  // A canvas wider or higher than a browser has is blank.
  const ratio = Math.min(devicePixelRatio || 1, 32000 / Math.max(width, height));
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// rows x columns pixels, scaled up without smoothing. Keeps its image from one step to the next.
function bitmap() {
  let small = null, image = null, pixels = null;
  return {
    // `colourOf(i)`: the packed colour of cell i in row-major order.
    fill(rows, columns, colourOf) {
      if (!small || small.width !== columns || small.height !== rows) {
        small = new OffscreenCanvas(columns, rows);
        image = new ImageData(columns, rows);
        pixels = new Uint32Array(image.data.buffer);
      }
      for (let i = 0; i < pixels.length; i++) pixels[i] = colourOf(i);
      small.getContext("2d").putImageData(image, 0, 0);
    },
    draw(context, x, y, width, height) {
      context.imageSmoothingEnabled = false;
      context.drawImage(small, x, y, width, height);
    },
  };
}

const scratch = new Map(); // "rows x columns" -> bitmap, so that a step makes no new ones

// rows x columns colours ([r, g, b], or null for a gap) as one image.
function paint(context, x, y, width, height, rows, columns, colourAt) {
  const size = `${rows} x ${columns}`;
  if (!scratch.has(size)) {
    if (scratch.size > 32) scratch.clear();
    scratch.set(size, bitmap());
  }
  const gap = packed(rgbOf("--gap")), image = scratch.get(size);
  image.fill(rows, columns, (i) => {
    const rgb = colourAt(Math.floor(i / columns), i % columns);
    return rgb ? packed(rgb) : gap;
  });
  image.draw(context, x, y, width, height);
}

const styles = { of: null, known: new Map() }; // asking the browser costs a frame its time

function style(name) {
  if (styles.of !== theme()) {
    styles.of = theme();
    styles.known.clear();
  }
  if (!styles.known.has(name)) {
    const all = getComputedStyle(document.documentElement);
    styles.known.set(name, all.getPropertyValue(name).trim());
  }
  return styles.known.get(name);
}

function rgbOf(name) {
  const hex = style(name).slice(1);
  return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function card(title, props = {}) {
  const body = el("div", { class: "body" });
  const heading = el("h2", {}, title);
  return { root: el("section", { class: "card", ...props }, heading, body), body, heading };
}
