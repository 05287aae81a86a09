// One WebSocket with retries; the page never needs a reload after the server comes back.

const RETRY_MS = [500, 1000, 2000, 4000];

export class Socket {
  constructor({ onFrame, onEvent, onOpen, onGone }) {
    this.handlers = { onFrame, onEvent, onOpen, onGone };
    this.attempt = 0;
    this.connect();
  }

  connect() {
    clearTimeout(this.timer);
    const url = new URL("ws", document.baseURI);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    url.search = location.search; // carries the token, where there is one
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => {
      this.attempt = 0;
      this.handlers.onOpen();
    };
    socket.onmessage = ({ data }) => {
      if (typeof data === "string") this.handlers.onEvent(JSON.parse(data));
      else this.handlers.onFrame(data);
    };
    socket.onclose = ({ code, reason }) => {
      if (this.socket !== socket) return;
      const wait = RETRY_MS[Math.min(this.attempt++, RETRY_MS.length - 1)];
      this.timer = setTimeout(() => this.connect(), wait);
      this.handlers.onGone({ code, reason, wait });
    };
  }

  get open() {
    return this.socket.readyState === WebSocket.OPEN;
  }

  send(message) {
    if (this.open) this.socket.send(JSON.stringify(message));
  }
}
