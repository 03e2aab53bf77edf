// Decodes the bytes of a page into numbers: base64, deflate, byte planes, differences, codes.

const HALF = new Float32Array(65536);
for (let bits = 0; bits < 65536; bits++) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  HALF[bits] = sign * (exponent === 31 ? (fraction ? NaN : Infinity)
    : exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

const product = (sizes) => sizes.reduce((a, b) => a * b, 1);

async function inflate(text) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// A small blob: what is in the step, and the bytes of all that is not large.
async function unpack(small) {
  const bytes = await inflate(small);
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const entries = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  return { entries, payloads: bytes.subarray((4 + length + 3) & ~3) };
}

// Byte planes, lowest first, to integers; `base` is what they are the difference to.
function integers(entry, bytes, base) {
  const lead = entry.select ? entry.select.length : product(entry.shape.slice(0, -2));
  const [rows, columns] = [entry.shape.at(-2) ?? 1, entry.shape.at(-1) ?? 1];
  const count = lead * (entry.tril ? (rows * (rows + 1)) / 2 : rows * columns);
  const Type = { u8: Uint8Array, f16: Uint16Array, bf16: Uint16Array, f32: Uint32Array }[entry.type];
  const out = new Type(count);
  const planes = Type.BYTES_PER_ELEMENT;
  if (planes === 1) out.set(bytes.subarray(0, count));
  else for (let plane = 0; plane < planes; plane++) {
    const at = plane * count, shift = 8 * plane;
    for (let i = 0; i < count; i++) out[i] |= bytes[at + i] << shift;
  }
  if (base && planes === 1) for (let i = 0; i < count; i++) out[i] += base[i];
  // 0, 1, 2, 3, 4, ... stand for differences of 0, -1, 1, -2, 2, ...
  else if (base) for (let i = 0; i < count; i++) out[i] = base[i] + ((out[i] >>> 1) ^ -(out[i] & 1));
  return out;
}

const word = new DataView(new ArrayBuffer(4));

function toFloat(entry, code) {
  if (entry.type === "f16") return HALF[code];
  if (entry.type === "f32" || entry.type === "bf16") {
    word.setUint32(0, entry.type === "f32" ? code : code << 16);
    return word.getFloat32(0);
  }
  return byteTable(entry)[code];
}

function floats(entry, codes) {
  if (entry.type === "f32") return new Float32Array(codes.buffer, codes.byteOffset, codes.length);
  if (entry.type === "bf16") {
    return new Float32Array(Uint32Array.from(codes, (code) => code << 16).buffer);
  }
  const table = entry.type === "f16" ? HALF : byteTable(entry);
  const out = new Float32Array(codes.length);
  for (let i = 0; i < out.length; i++) out[i] = table[codes[i]];
  return out;
}

// What each of the 256 codes stands for.
function byteTable(entry) {
  const { scale, signed } = entry;
  if (entry.table?.scale === scale && entry.table.signed === signed) return entry.table.of;
  const of = Float32Array.from({ length: 256 }, (_, code) => {
    if (code === 255) return NaN;
    if (!signed) return (code / 254) ** 2 * scale;
    const x = (code - 127) / 127;
    return Math.sign(x) * x * x * scale;
  });
  entry.table = { scale, signed, of };
  return of;
}
