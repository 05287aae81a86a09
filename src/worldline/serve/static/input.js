// Hands to edges: key downs and ups and pointer positions, each with the time of this browser's clock.

const KEYS = new Set(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "KeyA", "KeyD", "KeyW", "KeyS"]);

const typing = (target) => target instanceof HTMLElement && target.matches("input:not([type=checkbox]), select, textarea, dialog *");

export class Input {
  constructor(canvas, send, shortcuts) {
    const held = new Set();

    addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
      if (KEYS.has(event.code)) {
        event.preventDefault(); // arrows must not scroll the page
        if (event.repeat || held.has(event.code)) return;
        held.add(event.code);
        send({ t: "key", code: event.code, down: true, time: event.timeStamp });
      } else if (!event.repeat && shortcuts[event.key.toLowerCase()]) {
        event.preventDefault();
        shortcuts[event.key.toLowerCase()]();
      }
    });
    addEventListener("keyup", (event) => {
      if (held.delete(event.code)) send({ t: "key", code: event.code, down: false, time: event.timeStamp });
    });
    addEventListener("blur", () => {
      held.clear();
      send({ t: "blur" });
    });

    let pressed = false;
    const point = (event, down) => {
      const box = canvas.getBoundingClientRect();
      const share = (value, low, size) => Math.min(1, Math.max(0, (value - low) / size));
      this.pointer = { x: share(event.clientX, box.left, box.width), y: share(event.clientY, box.top, box.height), down };
      send({ t: "pointer", ...this.pointer, time: event.timeStamp });
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      pressed = true;
      canvas.setPointerCapture(event.pointerId);
      point(event, true);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (pressed) point(event, true);
    });
    const release = (event) => {
      if (!pressed) return;
      pressed = false;
      point(event, false);
    };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    this.pointer = null;
  }
}
