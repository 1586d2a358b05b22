// Three keyframes. Each has a frame and a canvas for drawing and for dropped pictures.
import { FRAMES, Timeline } from "./timeline.js";

const SIDE = 512;
const START = [0, 8, 15];

export class Keyframes {
  constructor(root, timeline) {
    this.slots = START.map((frame, slot) => new Slot(root, slot, frame, () => this.timeline?.show()));
    this.timeline = new Timeline(timeline, this.slots, (slot, frame) => {
      slot.frame = frame;
      this.timeline.show();
    });
    document.addEventListener("paste", event => this.take(event.clipboardData));
    // otherwise the browser would open a picture dropped beside them in place of the page
    document.addEventListener("dragover", event => event.preventDefault());
    document.addEventListener("drop", event => {
      event.preventDefault();
      this.take(event.dataTransfer);
    });
    this.timeline.show();
  }

  take(data) {
    const file = [...data.files].find(one => one.type.startsWith("image/"));
    if (file) (this.slots.find(slot => slot.empty) ?? this.slots[0]).load(file);
  }

  given() {
    return this.slots.filter(slot => !slot.empty);
  }

  /** Returns a frame with two keyframes, if there is one. */
  clash() {
    const frames = this.given().map(slot => slot.frame);
    return frames.find((frame, place) => frames.indexOf(frame) < place);
  }
}

class Slot {
  constructor(root, slot, frame, changed) {
    Object.assign(this, { slot, changed, empty: true, strokes: [] });
    this.box = document.createElement("div");
    this.box.className = "keyframe";
    this.box.innerHTML = `
      <canvas width="${SIDE}" height="${SIDE}" aria-label="Keyframe ${slot + 1}: draw here, or choose a file"></canvas>
      <div class="row">
        <label>Frame <input type="number" id="keyframe_${slot}_index" min="0" max="${FRAMES - 1}" value="${frame}"></label>
        <button type="button" data-do="undo" title="Undo" aria-label="Undo in keyframe ${slot + 1}">↶</button>
        <button type="button" data-do="clear" title="Clear" aria-label="Clear keyframe ${slot + 1}">✕</button>
      </div>
      <label class="button file">Picture…
        <input type="file" id="keyframe_${slot}_image_url" accept="image/*" aria-label="Picture of keyframe ${slot + 1}"></label>`;
    root.append(this.box);
    this.canvas = this.box.querySelector("canvas");
    this.context = this.canvas.getContext("2d");
    this.number = this.box.querySelector("input[type=number]");
    this.file = this.box.querySelector("input[type=file]");
    this.number.addEventListener("input", changed);
    this.file.addEventListener("change", () => this.file.files[0] && this.load(this.file.files[0]));
    this.box.querySelector("[data-do=undo]").addEventListener("click", () => this.undo());
    this.box.querySelector("[data-do=clear]").addEventListener("click", () => this.clear());
    this.listen();
    this.paint();
  }

  get frame() {
    return this.number.value === "" ? NaN : Number(this.number.value);
  }

  set frame(frame) {
    this.number.value = frame;
  }

  listen() {
    const at = event => [event.offsetX * SIDE / this.canvas.clientWidth, event.offsetY * SIDE / this.canvas.clientHeight];
    this.canvas.addEventListener("pointerdown", event => {
      this.canvas.setPointerCapture(event.pointerId);
      this.strokes.push([at(event)]);
      this.paint();
    });
    this.canvas.addEventListener("pointermove", event => {
      if (!this.canvas.hasPointerCapture(event.pointerId)) return;
      this.strokes.at(-1).push(at(event));
      this.paint();
    });
    for (const kind of ["dragover", "dragleave", "drop"]) {
      this.box.addEventListener(kind, event => {
        event.preventDefault();
        event.stopPropagation();
        this.box.classList.toggle("over", kind === "dragover");
        if (kind === "drop" && event.dataTransfer.files[0]) this.load(event.dataTransfer.files[0]);
      });
    }
  }

  async load(file) {
    this.picture = await createImageBitmap(file).catch(() => null);
    this.file.setCustomValidity(this.picture ? "" : "This is not a picture.");
    this.file.reportValidity();
    this.strokes = [];
    this.paint();
  }

  undo() {
    if (this.strokes.pop() === undefined) this.picture = null;
    this.paint();
  }

  clear() {
    Object.assign(this, { picture: null, strokes: [] });
    this.file.value = "";
    this.paint();
  }

  paint() {
    const { context, picture } = this;
    context.fillStyle = "#000";
    context.fillRect(0, 0, SIDE, SIDE);
    if (picture) {
      const scale = Math.max(SIDE / picture.width, SIDE / picture.height);
      const [width, height] = [picture.width * scale, picture.height * scale];
      context.drawImage(picture, (SIDE - width) / 2, (SIDE - height) / 2, width, height);
    }
    Object.assign(context, { strokeStyle: "#fff", lineWidth: 8, lineCap: "round", lineJoin: "round" });
    for (const [first, ...rest] of this.strokes) {
      context.beginPath();
      context.moveTo(...first);
      for (const point of rest.length ? rest : [first]) context.lineTo(...point);
      context.stroke();
    }
    this.empty = !picture && !this.strokes.length;
    this.changed();
  }

  blob() {
    return new Promise(resolve => this.canvas.toBlob(resolve, "image/png"));
  }
}
