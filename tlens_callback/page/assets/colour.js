// Chooses colours: sequential for magnitudes, diverging around zero for signed values.

// PALETTE is the package's own: tables of colours as hexadecimal text, and the colours of curves.
const tableFrom = (hex) => hex.match(/.{6}/g)
  .map((colour) => [0, 2, 4].map((i) => parseInt(colour.slice(i, i + 2), 16)));
const SEQUENTIAL = tableFrom(PALETTE.sequential);
const DIVERGING = { light: tableFrom(PALETTE.light), dark: tableFrom(PALETTE.dark) };
const LINES = PALETTE.lines;
const DARK = matchMedia("(prefers-color-scheme: dark)");

// {low, high, diverging, root, given, over}: what a colour stands for. `root`: the square root of
// the magnitude. Without finite limits it is the range of `values`: numbers, or [least, most]; as it
// is, with `open`, where they keep to less than a quarter of the limits and would all look the same;
// but a probability or a share of all says something by being small.
function scaleOf(entry, values, { change = false, root = false, open = false, over } = {}) {
  let [low, high] = change ? [-Infinity, Infinity] : entry.limits ?? [-Infinity, Infinity];
  if (open && low <= 0 && !["probability", "fraction"].includes(entry.unit)) {
    const far = Math.max(...rangeOf(values).map(Math.abs));
    if (far > 0 && far < Math.max(-low, high) / 4) [low, high] = [low && -Infinity, Infinity];
  }
  const given = Number.isFinite(low) && Number.isFinite(high);
  if (!given) {
    let [least, most] = rangeOf(values);
    if (least > most) [least, most] = [0, 1];
    low = Number.isFinite(low) ? low : Math.min(least, 0);
    high = Number.isFinite(high) ? high : most;
  }
  const diverging = change || low < 0;
  if (diverging) {
    high = Math.max(Math.abs(low), Math.abs(high)) || 1;
    low = -high;
  } else if (low >= high) high = low + 1;
  return { low, high, diverging, root, given, over: over ?? "range of what is shown" };
}

function rangeOf(values) {
  let least = Infinity, most = -Infinity;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    if (value < least) least = value;
    if (value > most) most = value;
  }
  return [least, most];
}

// The place of a value in its table of colours; -1 for what is no number. `oneSided`, 1 or -1: from
// the middle of the diverging table to one end, for numbers of this sign behind a text: what is near
// zero has the colour of the paper, and the text can be read.
function placeOf(scale, value) {
  if (!Number.isFinite(value)) return -1;
  if (scale.oneSided) {
    const x = Math.max(0, Math.min(1, (scale.oneSided * value) / scale.high));
    return 128 - Math.round((scale.root ? Math.sqrt(x) : x) * 128);
  }
  if (scale.diverging) {
    let x = Math.max(-1, Math.min(1, value / scale.high));
    if (scale.root) x = Math.sign(x) * Math.sqrt(Math.abs(x));
    return Math.round((x + 1) * 128);
  }
  const x = Math.max(0, Math.min(1, (value - scale.low) / (scale.high - scale.low)));
  return Math.round((scale.root ? Math.sqrt(x) : x) * 255);
}

const tableOf = (scale) => (scale.diverging || scale.oneSided ? DIVERGING[theme()] : SEQUENTIAL);

// [red, green, blue], or null for what is no number.
function shade(scale, value) {
  const place = placeOf(scale, value);
  return place < 0 ? null : tableOf(scale)[place];
}

// A pixel as it lies in ImageData: one integer, lowest byte red.
const packed = ([red, green, blue]) => (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0;
const packedTables = new Map();

// (value) -> packed colour, that of --gap for what is no number.
function packer(scale) {
  const table = tableOf(scale);
  if (!packedTables.has(table)) packedTables.set(table, Uint32Array.from(table, packed));
  const colours = packedTables.get(table), gap = packed(rgbOf("--gap"));
  return (value) => {
    const place = placeOf(scale, value);
    return place < 0 ? gap : colours[place];
  };
}

const css = (rgb) => (rgb ? `rgb(${rgb.join(",")})` : "var(--gap)");
const inkOn = (rgb) =>
  rgb && rgb[0] * 0.299 + rgb[1] * 0.587 + rgb[2] * 0.114 > 140 ? "#111" : "#fff";

function theme() {
  return document.documentElement.dataset.theme || (DARK.matches ? "dark" : "light");
}

// What the colours at these shares of a colour bar's length stand for.
function valueAt(scale, share) {
  if (scale.diverging) {
    const x = 2 * share - 1;
    return (scale.root ? Math.sign(x) * x * x : x) * scale.high;
  }
  const x = scale.root ? share * share : share;
  return scale.oneSided ? scale.oneSided * x * scale.high : scale.low + x * (scale.high - scale.low);
}

// Shares at which round numbers stand: of a root scale from 0, a tenth and four tenths of its end.
function ticksOf(scale) {
  if (scale.diverging) return scale.root ? [0, 0.25, 0.5, 0.75, 1] : [0, 0.5, 1];
  return scale.root ? [0, Math.sqrt(0.1), Math.sqrt(0.4), 1] : [0, 0.5, 1];
}

// A colour bar with its numbers.
function legend(scale, unit) {
  const stops = Array.from({ length: 65 }, (_, i) => css(shade(scale, valueAt(scale, i / 64))));
  const ticks = ticksOf(scale).map((share) => {
    const shift = share === 0 ? 0 : share === 1 ? -100 : -50;
    const place = `position:absolute;left:${share * 100}%;transform:translate(${shift}%)`;
    return el("span", { style: place },
      fmt(+valueAt(scale, share).toPrecision(6)));
  });
  const about = [unit, scale.root ? "square-root scale" : "", scale.given ? "" : scale.over];
  return el("div", { class: "legend" },
    el("div", { class: "bar", style: `background:linear-gradient(90deg,${stops.join(",")})` }),
    el("div", { class: "ticks", style: "position:relative;height:1.4em" }, ...ticks),
    el("div", { class: "unit" }, about.filter(Boolean).join(", ")));
}

// Puts the legend into a node, unless it is there already.
function legendIn(node, scale, unit) {
  const { low, high, diverging, root, given, over, oneSided } = scale;
  const what = JSON.stringify([low, high, diverging, root, given, over, oneSided, unit, theme()]);
  if (node.what === what) return;
  node.what = what;
  node.replaceChildren(legend(scale, unit));
}
