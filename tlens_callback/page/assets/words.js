// The texts of a probe's tokens, and how they read as one text.

// The texts of a probe's tokens, from whatever was measured at them; null: a token not named.
function tokensOf(keys) {
  const found = (axis) => keys.map((key) => data.entry(key, data.first(key)))
    .find((entry) => entry.axes.at(-1) === axis);
  const whole = found("key") ?? found("pos");
  if (whole) {
    return whole.labels[whole.axes.at(-1)] ?? Array.from({ length: whole.shape.at(-1) }, (_, i) => String(i));
  }
  const entry = found("token");
  const labels = entry?.labels.token ?? [], { measure } = parts(entry?.key ?? "");
  // The loss of a token is that of predicting it, so the first has none and is not named.
  return entry?.unit === "nats" && ["loss", "change"].includes(measure) ? [null, ...labels] : labels;
}

// What to write at each token: a character whose bytes, <0xE4>, are in several tokens stands at the
// first of them, with the marks that are drawn on it, and the others have "".
function joinedBytes(tokens) {
  const words = [...tokens], isPart = (text) => text !== null && /<0x[0-9A-F]{2}>/.test(text);
  for (let first = 0, end; first < tokens.length; first = end) {
    for (end = first; end < tokens.length && isPart(tokens[end]); end++) words[end] = "";
    if (end > first) spread(tokens.slice(first, end).map(bytesOf), (i, text) => { words[first + i] += text; });
    else end++;
  }
  return words;
}

// The bytes of a token: those that are written out, and those of the other characters.
function bytesOf(text) {
  return text.match(/<0x[0-9A-F]{2}>|<|[^<]+/g).flatMap((part) =>
    (part.startsWith("<0x") ? [parseInt(part.slice(3, 5), 16)] : [...new TextEncoder().encode(part)]));
}

// Calls add(token, character) for each character of neighbouring tokens' bytes.
function spread(parts, add) {
  const bytes = Uint8Array.from(parts.flat()), owners = parts.flatMap((part, i) => part.map(() => i));
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  let owner = null, last = "";
  for (let at = 0, length; at < bytes.length; at += length) {
    const lead = bytes[at];
    length = lead < 0x80 ? 1 : lead >> 5 === 6 ? 2 : lead >> 4 === 14 ? 3 : 4;
    let text;
    try {
      text = decoder.decode(bytes.slice(at, at + length));
    } catch {
      length = 1; // no character
      text = `<0x${lead.toString(16).toUpperCase().padStart(2, "0")}>`;
    }
    const drawnOn = /^[\p{M}\u200d\u{1f3fb}-\u{1f3ff}]$/u.test(text) || last === "\u200d";
    if (owner === null || !drawnOn) owner = owners[at];
    add(owner, text);
    last = text;
  }
}
