// Pictures: small RGB frames drawn with hard pixels, the difference of two, and the trail of the action's target.

const TRAIL = 24;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

class Pixels {
  // A canvas of the picture's own size; the style sheet enlarges it without smoothing.
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.image = null;
  }

  size(width, height) {
    if (this.image?.width !== width || this.image.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
      this.image = this.context.createImageData(width, height);
      this.image.data.fill(255);
    }
    return this.image.data;
  }

  paint() {
    this.context.putImageData(this.image, 0, 0);
  }

  show(rgb, width, height) {
    const out = this.size(width, height);
    for (let from = 0, to = 0; from < rgb.length; from += 3, to += 4) {
      out[to] = rgb[from];
      out[to + 1] = rgb[from + 1];
      out[to + 2] = rgb[from + 2];
    }
    this.paint();
  }
}

export class Stage {
  constructor({ imagined, overlay, truth, diff }) {
    this.imagined = new Pixels(imagined);
    this.truth = new Pixels(truth);
    this.diff = new Pixels(diff);
    this.overlay = overlay;
    this.context = overlay.getContext("2d");
    const scale = Math.max(1, Math.round(devicePixelRatio));
    overlay.width = overlay.height = 512 * scale;
    this.trail = [];
    this.theme();
  }

  theme() {
    this.action = css("--action");
    this.still = false;
    this.warn = css("--warn").match(/[\da-f]{2}/gi)?.map((part) => parseInt(part, 16)) ?? [213, 94, 0];
  }

  show(frame, { difference, pointer }) {
    this.imagined.show(frame.picture, frame.width, frame.height);
    if (frame.truth) {
      this.truth.show(frame.truth, frame.side, frame.side);
      if (difference && frame.side === frame.width) this.showDifference(frame);
    }
    this.drawTrail(pointer);
  }

  // Every frame leaves its mark, also one that came too late to be painted.
  follow(target, first) {
    if (first) this.trail = [];
    this.trail.push(target);
    if (this.trail.length > TRAIL) this.trail.shift();
  }

  showDifference(frame) {
    // The true picture, pale and grey, so that the eye finds its place; on it, the difference in the warning colour.
    const out = this.diff.size(frame.width, frame.height);
    const [red, green, blue] = this.warn;
    for (let from = 0, to = 0; from < frame.picture.length; from += 3, to += 4) {
      const t0 = frame.truth[from];
      const t1 = frame.truth[from + 1];
      const t2 = frame.truth[from + 2];
      const gap = Math.max(Math.abs(frame.picture[from] - t0), Math.abs(frame.picture[from + 1] - t1), Math.abs(frame.picture[from + 2] - t2));
      const grey = 200 + 0.2 * (0.3 * t0 + 0.6 * t1 + 0.1 * t2);
      const share = Math.min(1, gap / 128);
      out[to] = grey + (red - grey) * share;
      out[to + 1] = grey + (green - grey) * share;
      out[to + 2] = grey + (blue - grey) * share;
    }
    this.diff.paint();
  }

  drawTrail(pointer) {
    const { context, overlay, trail } = this;
    const [x, y] = trail.at(-1) ?? [NaN, NaN];
    const still = !pointer?.down && trail.every(([x0, y0]) => x0 === x && y0 === y);
    if (still && this.still) return;
    this.still = still && trail.length === TRAIL;
    const size = overlay.width;
    context.clearRect(0, 0, size, size);
    context.strokeStyle = context.fillStyle = this.action;
    context.lineCap = "round";
    for (let i = 1; i < trail.length; i++) {
      const [x0, y0] = trail[i - 1];
      const [x1, y1] = trail[i];
      if (Number.isNaN(x0) || Number.isNaN(x1)) continue;
      context.globalAlpha = (0.75 * i) / trail.length;
      context.lineWidth = (size / 512) * (0.8 + (1.7 * i) / trail.length);
      context.beginPath();
      context.moveTo(x0 * size, y0 * size);
      context.lineTo(x1 * size, y1 * size);
      context.stroke();
    }
    context.globalAlpha = 1;
    context.lineWidth = (2 * size) / 512;
    if (!Number.isNaN(x)) {
      context.beginPath();
      context.arc(x * size, y * size, (5 * size) / 512, 0, 2 * Math.PI);
      context.stroke();
    }
    if (pointer?.down) {
      context.globalAlpha = 0.5;
      context.beginPath();
      context.arc(pointer.x * size, pointer.y * size, (12 * size) / 512, 0, 2 * Math.PI);
      context.stroke();
      context.globalAlpha = 1;
    }
  }
}
