// The ledger and the gauge: rings of the last frames, their percentiles and their charts.

export const RING = 300;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (colour) => colour.match(/[\da-f]{2}/gi).map((part) => parseInt(part, 16));

// The model's own work is imagination, so it has that colour; what only carries data is grey.
const COLOURS = {
  input: "--action",
  step: "--dream-deep",
  predict: "--dream-deep",
  decode: "--dream",
  truth: "--truth",
  gauge: "--gauge",
  unattributed: "--warn",
};
const GREYS = ["#8a95a3", "#5f6b7a", "#aab3bf", "#46515e"];

// Spans too short to be read one by one are shown together; the wire and the replay tools keep them apart.
const TOGETHER = { event: "step", cycle: "gauge", hash: "log", record: "log", ledger: "log" };
const LOG_TITLE = "hash chain, replay file and this table's own row";
const GAUGE_TITLE = "how far the latent is from those seen in training, and how well it survives being drawn and seen again";

export class Percentiles {
  constructor(size) {
    this.values = new Float64Array(size);
    this.clear();
  }

  clear() {
    this.count = 0;
  }

  add(value) {
    this.values[this.count++ % this.values.length] = value;
  }

  at(...shares) {
    const kept = Math.min(this.count, this.values.length);
    if (!kept) return shares.map(() => NaN);
    const sorted = this.values.slice(0, kept).sort();
    return shares.map((share) => sorted[Math.min(kept - 1, Math.floor(share * kept))]);
  }
}

function chart(canvas) {
  const context = canvas.getContext("2d");
  const scale = Math.max(1, devicePixelRatio);
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

function dashed(context, y, width, colour) {
  context.save();
  context.strokeStyle = colour;
  context.globalAlpha = 0.7;
  context.setLineDash([4, 4]);
  context.beginPath();
  context.moveTo(0, y);
  context.lineTo(width, y);
  context.stroke();
  context.restore();
}

export class LedgerView {
  constructor({ bar, body, canvas }) {
    Object.assign(this, { bar, body, canvas });
    this.names = [];
    this.rows = [];
  }

  begin(stages) {
    this.names = [...new Set(stages.map(({ name }) => TOGETHER[name] ?? name)), "unattributed"];
    this.row = [...stages.map(({ name }) => TOGETHER[name] ?? name), "unattributed"].map((name) => this.names.indexOf(name));
    let grey = 0;
    this.colours = this.names.map((name) => COLOURS[name] ?? GREYS[grey++ % GREYS.length]);
    this.spans = this.names.map(() => new Percentiles(RING));
    this.busy = new Percentiles(RING);
    this.history = [];
    this.bar.replaceChildren(...this.names.map(() => document.createElement("i")));
    const titles = {
      ...Object.fromEntries(stages.map(({ name, title }) => [name, title])),
      log: LOG_TITLE,
      gauge: GAUGE_TITLE,
      unattributed: "busy time that no stage explains; it is shown, never hidden",
      busy: "from the beginning of a frame to its end, the sleep that keeps the pace apart",
    };
    this.rows = [...this.names, "busy"].map((name, i) => {
      const row = document.createElement("tr");
      const cells = Array.from({ length: 4 }, () => row.insertCell());
      row.title = titles[name];
      if (i < this.names.length) cells[0].append(document.createElement("i"));
      else row.className = "total";
      cells[0].append(name);
      return { row, cells };
    });
    this.body.replaceChildren(...this.rows.map(({ row }) => row));
    this.theme();
  }

  theme() {
    this.paints = (this.colours ?? []).map((colour) => (colour.startsWith("--") ? css(colour) : colour));
    this.words = this.paints.map((colour) => new Uint32Array(new Uint8Array([...rgb(colour), 255]).buffer)[0]);
    [...this.bar.children].forEach((part, i) => (part.style.background = this.paints[i]));
    this.rows.forEach(({ cells }, i) => cells[0].firstElementChild && (cells[0].firstElementChild.style.background = this.paints[i]));
  }

  add(frame, missed) {
    const spans = new Float64Array(this.names.length);
    frame.spans.forEach((span, i) => (spans[this.row[i]] += span));
    spans.forEach((span, i) => this.spans[i].add(span));
    this.busy.add(frame.busy);
    this.history.push({ spans, missed });
    if (this.history.length > RING) this.history.shift();
  }

  // Behind: a quarter of the last 24 frames or more were ready only after their deadline.
  get behind() {
    return (this.history ?? []).slice(-24).filter(({ missed }) => missed).length >= 6;
  }

  draw() {
    const medians = [];
    [...this.spans, this.busy].forEach((values, i) => {
      const shares = values.at(0.5, 0.95, 0.99);
      shares.forEach((value, column) => {
        const text = Number.isNaN(value) ? "–" : value.toFixed(2);
        const cell = this.rows[i].cells[column + 1];
        if (cell.textContent !== text) cell.textContent = text;
      });
      medians.push(shares[0] || 0);
    });
    medians.pop();
    const total = medians.reduce((sum, value) => sum + value, 0) || 1;
    medians.forEach((value, i) => (this.bar.children[i].style.width = `${(100 * value) / total}%`));
  }

  drawFrames(deadline) {
    const { context, width, height } = chart(this.canvas);
    const [p99] = this.busy.at(0.99);
    const top = deadline > 0 ? deadline * 1.25 : Math.max(1, (p99 || 1) * 1.3);
    this.drawColumns(context, top);
    const column = width / RING;
    context.fillStyle = css("--warn");
    this.history.forEach(({ missed }, i) => {
      if (!missed) return;
      const x = width - (this.history.length - i) * column;
      context.beginPath();
      context.moveTo(x - 3, 1);
      context.lineTo(x + 4, 1);
      context.lineTo(x + 0.5, 8);
      context.fill();
    });
    context.fillStyle = css("--soft");
    context.font = "11px system-ui, sans-serif";
    if (deadline > 0) {
      const y = height - (deadline / top) * height;
      dashed(context, y, width, css("--text"));
      context.fillText(`${deadline.toFixed(1)} ms`, 6, y + 13);
    } else {
      context.fillText(`full height ${top.toFixed(1)} ms, no deadline`, 6, 13);
    }
  }

  // Pixel by pixel: thousands of rectangles several times a second would cost more than the pictures do.
  drawColumns(context, top) {
    const { width, height } = this.canvas;
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const first = RING - this.history.length;
    for (let x = 0; x < width; x++) {
      const frame = this.history[Math.floor((x * RING) / width) - first];
      if (!frame) continue;
      let y = height;
      let sum = 0;
      frame.spans.forEach((span, stage) => {
        sum += span;
        const end = Math.max(0, Math.round(height * (1 - sum / top)));
        while (y > end) pixels[--y * width + x] = this.words[stage];
      });
    }
    context.putImageData(image, 0, 0);
  }
}

export class DriftView {
  constructor(canvas) {
    this.canvas = canvas;
    this.clear();
  }

  clear() {
    this.history = [];
  }

  add({ radius, error, anchored }) {
    this.history.push({ radius, error, anchored });
    if (this.history.length > RING) this.history.shift();
  }

  get insideShare() {
    const known = this.history.filter(({ radius }) => !Number.isNaN(radius));
    return known.length ? known.filter(({ radius }) => radius <= 1).length / known.length : NaN;
  }

  draw() {
    const { context, width, height } = chart(this.canvas);
    const column = width / RING;
    const place = (i) => width - (this.history.length - 0.5 - i) * column;
    const line = (key, full, colour) => {
      context.strokeStyle = colour;
      context.lineWidth = 1.6;
      context.beginPath();
      let drawing = false;
      this.history.forEach((point, i) => {
        const value = point[key];
        if (Number.isNaN(value)) {
          drawing = false;
          return;
        }
        const y = height - 2 - Math.min(1, value / full) * (height - 6);
        if (drawing) context.lineTo(place(i), y);
        else context.moveTo(place(i), y);
        drawing = true;
      });
      context.stroke();
    };
    dashed(context, height - 2 - 0.5 * (height - 6), width, css("--text"));
    this.history.forEach(({ anchored }, i) => {
      if (!anchored) return;
      context.fillStyle = css("--action");
      context.fillRect(place(i) - 1, 0, 2, height);
    });
    line("error", 0.25, css("--truth"));
    line("radius", 2, css("--dream"));
  }
}
