// The page's half of protocol.py: a frame message is a header, the spans, and one or two RGB pictures.

const VERSION = 2;
const HEADER_BYTES = 104;
const TYPES = [null, "image/webp", "image/jpeg"];

export const FLAG = { truth: 1, recording: 2, replaying: 4, missed: 8, outside: 16, anchored: 32, first: 64 };

export function decode(buffer) {
  const view = new DataView(buffer);
  if (view.getUint8(0) !== 0x57 || view.getUint8(1) !== 0x4c || view.getUint8(2) !== VERSION) {
    throw new Error(`the server speaks another version than this page (${VERSION}); reload the page`);
  }
  const flags = view.getUint8(3);
  const numSpans = view.getUint16(4, true);
  const width = view.getUint16(62, true);
  const height = view.getUint16(64, true);
  const side = view.getUint16(66, true);
  const spans = new Float64Array(numSpans + 1); // ms; the last one is what no stage explains
  for (let i = 0; i <= numSpans; i++) spans[i] = view.getUint32(HEADER_BYTES + 4 * i, true) / 1000;
  const start = HEADER_BYTES + 4 * (numSpans + 1);
  const bytes = view.getUint32(92, true);
  return {
    flags,
    id: Number(view.getBigUint64(6, true)),
    chain: Array.from(new Uint8Array(buffer, 14, 16), (byte) => byte.toString(16).padStart(2, "0")).join(""),
    inputTime: view.getFloat64(30, true),
    inputFrame: Number(view.getBigUint64(38, true)),
    busy: view.getUint32(46, true) / 1000,
    period: view.getUint32(50, true) / 1000,
    dropped: view.getUint32(54, true),
    missed: view.getUint32(58, true),
    radius: view.getFloat32(68, true),
    cycle: view.getFloat32(72, true),
    error: view.getFloat32(76, true),
    target: [view.getFloat32(80, true), view.getFloat32(84, true)],
    spans,
    width,
    height,
    type: TYPES[view.getUint8(88)],
    picture: new Uint8Array(buffer, start, bytes),
    side,
    truth: flags & FLAG.truth ? new Uint8Array(buffer, start + bytes, view.getUint32(96, true)) : null,
  };
}

// An encoded frame's pictures as RGB rows; a raw one's are that already.
export async function developed(frame) {
  if (frame.type === null) return frame;
  const [picture, truth] = await Promise.all([rgb(frame.picture, frame.type), frame.truth && rgb(frame.truth, frame.type)]);
  return { ...frame, picture, truth };
}

async function rgb(bytes, type) {
  const bitmap = await createImageBitmap(new Blob([bytes], { type }), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { alpha: false, willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
  const out = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    out[to] = rgba[from];
    out[to + 1] = rgba[from + 1];
    out[to + 2] = rgba[from + 2];
  }
  return out;
}
