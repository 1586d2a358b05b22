// Three keyframes. Each has a frame and a drawing, which also takes dropped, pasted and chosen pictures.
import { Drawing, SIDE } from "./drawing.js";
import { Timeline } from "./timeline.js";
import { Tools, paintSkin } from "./tools.js";

const START = [0, 8, 15], FRAMES = 16;

/** Says whether a model makes clips without keyframes, from the number that it was trained with; null if it does. */
export const need = number => number === null ? "Keyframes are optional."
  : `The model was trained with ${number} keyframe${number === "1" ? "" : "s"}: with other numbers its clips may be poor.`;

export class Keyframes {
  /** `changed` is called after every change, to save it. */
  constructor(root, timeline, tools, changed) {
    this.tools = new Tools(tools, () => this.showCursor(), () => this.show());
    this.slots = START.map((frame, slot) => new Slot(root, slot, frame, this.tools, () => {
      this.last = this.slots[slot];
      this.show();
      changed();
    }));
    this.timeline = new Timeline(timeline, this.slots, FRAMES, (slot, frame) => {
      slot.frame = frame;
      slot.changed();
    });
    document.addEventListener("paste", event => this.take(event.clipboardData));
    // otherwise the browser would open a picture dropped beside them in place of the page
    document.addEventListener("dragover", event => event.preventDefault());
    document.addEventListener("drop", event => {
      event.preventDefault();
      this.take(event.dataTransfer);
    });
    document.addEventListener("keydown", event => {
      const writes = event.target.matches("textarea, input:not([type=range], [type=radio], [type=checkbox], [type=file])");
      if (writes || event.key !== "z" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.last?.drawing.undo();
    });
    new ResizeObserver(() => this.showCursor()).observe(root);
    this.resize(this.timeline.frames);
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

  /** Follows the clip's number of frames. Keyframes keep their place in the clip, also if it becomes longer again. */
  resize(frames) {
    const last = this.timeline.frames - 1;
    this.timeline.resize(frames);
    for (const slot of this.slots) slot.move(last, frames - 1);
    this.show();
  }

  show() {
    this.timeline.show();
    const inOrder = this.given().toSorted((one, other) => one.frame - other.frame);
    for (const slot of this.slots) {
      slot.skin.hidden = !this.tools.onion;
      if (slot.skin.hidden) continue;
      const before = inOrder.findLast(other => other !== slot && other.frame < slot.frame);
      const after = inOrder.find(other => other !== slot && other.frame > slot.frame);
      paintSkin(slot.skin, before?.drawing.canvas, after?.drawing.canvas);
    }
  }

  showCursor() {
    for (const { drawing } of this.slots) drawing.canvas.style.cursor = this.tools.cursor(drawing.canvas.clientWidth / SIDE);
  }

  saved() {
    const of = this.timeline.frames;
    return this.slots.map(slot => ({ frame: slot.number.value, of, marks: slot.drawing.saved() }));
  }

  async restore(saved) {
    await Promise.all(this.slots.map((slot, place) => {
      const { frame, of, marks } = saved[place], { frames } = this.timeline;
      slot.frame = frame;
      if (of && of !== frames) slot.move(of - 1, frames - 1);  // the endpoint makes clips of another length now
      return slot.drawing.restore(marks);
    }));
    this.show();
  }
}

class Slot {
  constructor(root, slot, frame, tools, changed) {
    Object.assign(this, { slot, changed });
    this.box = document.createElement("div");
    this.box.className = "keyframe";
    this.box.setAttribute("role", "group");
    this.box.setAttribute("aria-label", `Keyframe ${slot + 1}`);
    this.box.innerHTML = `
      <div class="paper">
        <canvas class="drawing" role="img" aria-label="Drawing of keyframe ${slot + 1}"></canvas>
        <canvas class="skin" aria-hidden="true" hidden></canvas>
        <span class="number" aria-hidden="true">${slot + 1}</span>
      </div>
      <div class="row">
        <label>Frame <input type="number" id="keyframe_${slot}_index" min="0" value="${frame}"></label>
        <button type="button" data-do="undo" title="Undo" aria-label="Undo in keyframe ${slot + 1}">↶</button>
        <button type="button" data-do="clear" title="Clear" aria-label="Clear keyframe ${slot + 1}">✕</button>
      </div>
      <label class="button file">Picture…
        <input type="file" id="keyframe_${slot}_image_url" accept="image/*" aria-label="Picture of keyframe ${slot + 1}"></label>`;
    root.append(this.box);
    const find = selector => this.box.querySelector(selector);
    this.skin = find(".skin");
    this.number = find("input[type=number]");
    this.file = find("input[type=file]");
    this.drawing = new Drawing(find(".drawing"), tools, changed);
    this.number.addEventListener("input", () => {
      this.place = undefined;
      changed();
    });
    this.file.addEventListener("change", () => this.file.files[0] && this.load(this.file.files[0]));
    find("[data-do=undo]").addEventListener("click", () => this.drawing.undo());
    find("[data-do=clear]").addEventListener("click", () => this.drawing.clear());
    for (const kind of ["dragover", "dragleave", "drop"]) {
      this.box.addEventListener(kind, event => {
        event.preventDefault();
        event.stopPropagation();
        this.box.classList.toggle("over", kind === "dragover");
        if (kind === "drop" && event.dataTransfer.files[0]) this.load(event.dataTransfer.files[0]);
      });
    }
  }

  get frame() {
    return this.number.value === "" ? NaN : Number(this.number.value);
  }

  set frame(frame) {
    this.number.value = frame;
    this.place = undefined;
  }

  /** Moves to the frame that is at the same place between the first and the new last frame. */
  move(before, last) {
    this.number.max = last;
    const place = this.place ?? (before ? this.frame / before : 0);
    if (Number.isNaN(place)) return;
    this.frame = Math.round(place * last);
    this.place = place;
  }

  get empty() {
    return this.drawing.empty;
  }

  async load(file) {
    const taken = await this.drawing.load(file);
    this.file.value = "";  // so that the same file can be chosen again
    this.file.setCustomValidity(taken ? "" : "This is not a picture.");
    this.file.reportValidity();
  }
}
