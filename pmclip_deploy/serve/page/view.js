// A picture on a canvas: window and level, frames' pixels, zoom, move, a ruler.

// The gray level of each sample through a window, as PS3.3 C.11.2.1 has it and as the service computes it.
export function tableOf(frame, [center, width], inverse) {
  const table = new Uint8Array(65536);
  const exact = frame.voi === "LINEAR_EXACT" || width < 1;
  const [middle, span] = frame.voi === "SIGMOID" || exact ? [center, width] : [center - 0.5, width - 1];
  for (let sample = 0; sample < 65536; sample++) {
    const value = sample * frame.slope + frame.intercept;
    let share;
    if (frame.voi === "SIGMOID") share = 1 / (1 + Math.exp(Math.min(Math.max(-4 * (value - center) / width, -700), 700)));
    else if (span === 0) share = value > middle ? 1 : 0;
    else share = Math.min(Math.max((value - middle) / span + 0.5, 0), 1);
    const gray = Math.floor(share * 255 + 0.5);
    table[sample] = inverse ? 255 - gray : gray;
  }
  return table;
}

export class View {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed; // is told of a new window
    this.pixels = document.createElement("canvas");
    this.frame = null;
    this.measuring = false;
    new ResizeObserver(() => this.draw()).observe(canvas);
    this.listen();
  }

  // A frame as api.frame gives it. The window stays if there is one of a person's choice.
  show(frame, spacing) {
    this.frame = frame;
    this.spacing = spacing;
    this.line = null;
    [this.pixels.width, this.pixels.height] = frame.bitmap ? [frame.bitmap.width, frame.bitmap.height] : [frame.columns, frame.rows];
    this.image = null;
    this.paint();
  }

  fresh() { this.window = null; this.inverted = false; this.zoom = 1; this.move = [0, 0]; this.line = null; }
  clear() { this.frame = this.image = null; this.pixels.width = this.pixels.height = 1; this.fresh(); }
  reset() { this.fresh(); this.paint(); this.changed(); }
  get takesWindow() { return Boolean(this.frame?.samples); }
  get shownWindow() { return this.window ?? this.frame?.window ?? null; }

  setWindow(center, width) {
    if (!this.takesWindow) return;
    this.window = [center, Math.max(width, this.frame.slope ? Math.abs(this.frame.slope) : 1)];
    this.paint();
    this.changed();
  }

  invert() { this.inverted = !this.inverted; this.paint(); this.changed(); }

  // (rows * columns) gray levels as they are painted.
  gray() {
    const { data } = this.pixels.getContext("2d").getImageData(0, 0, this.pixels.width, this.pixels.height);
    return Uint8Array.from({ length: data.length / 4 }, (_, i) => data[4 * i]);
  }

  paint() {
    const { frame } = this;
    if (!frame) return;
    const context = this.pixels.getContext("2d", { willReadFrequently: true });
    context.filter = "none";
    if (frame.bitmap) {
      context.drawImage(frame.bitmap, 0, 0);
      if (this.inverted) {
        context.globalCompositeOperation = "difference";
        context.fillStyle = "white";
        context.fillRect(0, 0, this.pixels.width, this.pixels.height);
        context.globalCompositeOperation = "source-over";
      }
    } else {
      this.image ??= new ImageData(frame.columns, frame.rows);
      const table = this.window ? tableOf(frame, this.window, frame.inverse) : frame.table;
      const colors = new Uint32Array(this.image.data.buffer);
      const flip = this.inverted ? 255 : 0;
      const color = Uint32Array.from(table, (gray) => 0xff000000 | ((gray ^ flip) * 0x010101));
      for (let i = 0; i < frame.samples.length; i++) colors[i] = color[frame.samples[i]];
      context.putImageData(this.image, 0, 0);
    }
    this.draw();
  }

  scale() {
    const { width, height } = this.canvas;
    return this.zoom * Math.min(width / this.pixels.width, height / this.pixels.height);
  }

  // From the canvas to the picture, in pixels of it.
  place(event) {
    const box = this.canvas.getBoundingClientRect(), ratio = this.canvas.width / box.width, scale = this.scale();
    const x = (event.clientX - box.left) * ratio, y = (event.clientY - box.top) * ratio;
    return [(x - this.canvas.width / 2 - this.move[0]) / scale + this.pixels.width / 2,
      (y - this.canvas.height / 2 - this.move[1]) / scale + this.pixels.height / 2];
  }

  draw() {
    if (!this.frame) return;
    const box = this.canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.max(1, Math.round(box.width * ratio));
    this.canvas.height = Math.max(1, Math.round(box.height * ratio));
    const context = this.canvas.getContext("2d"), scale = this.scale();
    context.setTransform(scale, 0, 0, scale, this.canvas.width / 2 + this.move[0] - scale * this.pixels.width / 2,
      this.canvas.height / 2 + this.move[1] - scale * this.pixels.height / 2);
    context.imageSmoothingEnabled = scale < 3;
    context.drawImage(this.pixels, 0, 0);
    if (!this.line) return;
    context.strokeStyle = "#ffcf66";
    context.lineWidth = 2 / scale;
    context.beginPath();
    context.moveTo(...this.line[0]);
    context.lineTo(...this.line[1]);
    context.stroke();
  }

  // What the ruler says: millimetres where the file has Pixel Spacing.
  get length() {
    if (!this.line) return "";
    const [[x0, y0], [x1, y1]] = this.line;
    if (!this.spacing) return `${Math.hypot(x1 - x0, y1 - y0).toFixed(1)} pixels`;
    const millimetres = Math.hypot((x1 - x0) * this.spacing.column_mm, (y1 - y0) * this.spacing.row_mm);
    return `${millimetres.toFixed(1)} mm${this.spacing.at === "detector" ? " at the detector" : ""}`;
  }

  zoomBy(factor) { this.zoom = Math.min(Math.max(this.zoom * factor, 0.2), 40); this.draw(); }

  nudge(center, width) {
    const now = this.shownWindow;
    if (!now || !this.takesWindow) return;
    const step = Math.max(now[1] / 50, Math.abs(this.frame.slope));
    this.setWindow(now[0] + center * step, now[1] + width * step);
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button > 1 || !this.frame) return;
      canvas.setPointerCapture(event.pointerId);
      this.drag = { x: event.clientX, y: event.clientY, window: this.shownWindow, move: [...this.move], from: this.place(event) };
      if (this.measuring) { this.line = [this.drag.from, this.drag.from]; this.draw(); }
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.drag) return;
      const x = event.clientX - this.drag.x, y = event.clientY - this.drag.y;
      if (this.measuring) {
        this.line = [this.drag.from, this.place(event)];
        this.draw();
        this.changed();
      } else if (event.shiftKey || event.buttons === 4 || !this.takesWindow) {
        const ratio = window.devicePixelRatio || 1;
        this.move = [this.drag.move[0] + x * ratio, this.drag.move[1] + y * ratio];
        this.draw();
      } else if (this.drag.window) {
        const unit = Math.max(this.drag.window[1] / 300, Math.abs(this.frame.slope) / 4);
        this.setWindow(this.drag.window[0] + y * unit, this.drag.window[1] + x * unit);
      }
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { this.drag = null; });
  }
}
