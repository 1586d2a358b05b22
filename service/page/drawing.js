// A square to draw on. Its marks are pictures, strokes and clearings, painted in order, so that each can be undone.
export const SIDE = 512;

export class Drawing {
  /** `tools` has the brush's size and whether it erases. `changed` is called after every change. */
  constructor(canvas, tools, changed) {
    Object.assign(this, { canvas, tools, changed, marks: [] });
    canvas.width = canvas.height = SIDE;
    this.context = canvas.getContext("2d");
    canvas.addEventListener("pointerdown", event => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.add({ points: [this.place(event)], size: tools.size, erase: tools.erase });
    });
    canvas.addEventListener("pointermove", event => {
      if (!canvas.hasPointerCapture(event.pointerId)) return;
      const stroke = this.marks.at(-1);
      stroke?.points?.push(this.place(event));
      if (stroke?.points) this.stroke(stroke, stroke.points.length - 1);
      this.changed();
    });
    this.paint();
  }

  place(event) {
    const scale = SIDE / this.canvas.clientWidth;
    return [Math.round(event.offsetX * scale), Math.round(event.offsetY * scale)];
  }

  /** The marks since the last one that covered all before it. */
  get visible() {
    return this.marks.slice(Math.max(0, this.marks.findLastIndex(mark => mark.picture || mark.clear)));
  }

  get empty() {
    return !this.visible.some(mark => mark.picture || (mark.points && !mark.erase));
  }

  add(mark) {
    this.marks.push(mark);
    this.paint();
    this.changed();
  }

  /** Shows a picture file. Returns false if it is none. */
  async load(file) {
    const picture = await createImageBitmap(file).catch(() => null);
    if (picture) this.add({ picture, file });
    return picture !== null;
  }

  undo() {
    this.marks.pop();
    this.paint();
    this.changed();
  }

  clear() {
    if (!this.empty) this.add({ clear: true });
  }

  paint() {
    this.context.fillStyle = "#000";
    this.context.fillRect(0, 0, SIDE, SIDE);
    for (const mark of this.visible) {
      if (mark.picture) this.cover(mark.picture);
      if (mark.points) this.stroke(mark, 0);
    }
  }

  /** Draws a picture so that it fills the square. */
  cover(picture) {
    const scale = Math.max(SIDE / picture.width, SIDE / picture.height);
    const [width, height] = [picture.width * scale, picture.height * scale];
    this.context.drawImage(picture, (SIDE - width) / 2, (SIDE - height) / 2, width, height);
  }

  /** Draws a stroke from one of its points on: a dot at its first point, then lines. It looks the same in one go or in parts. */
  stroke({ points, size, erase }, first) {
    const { context } = this;
    Object.assign(context, { strokeStyle: erase ? "#000" : "#fff", lineWidth: size, lineCap: "round" });
    for (let place = first; place < points.length; place++) {
      context.beginPath();
      context.moveTo(...points[Math.max(0, place - 1)]);
      context.lineTo(...points[place]);
      context.stroke();
    }
  }

  blob() {
    return new Promise(resolve => this.canvas.toBlob(resolve, "image/png"));
  }

  /** What is needed to paint it again: files and strokes. */
  saved() {
    return this.visible.filter(mark => !mark.clear).map(({ picture, ...mark }) => mark);
  }

  async restore(marks) {
    const restored = await Promise.all(marks.map(async mark =>
      mark.file ? { ...mark, picture: await createImageBitmap(mark.file).catch(() => null) } : mark));
    this.marks = [...restored.filter(mark => mark.picture || mark.points), ...this.marks];
    this.paint();
  }
}
