// The frames of the clip. Each keyframe has a handle, moved with the pointer or with the arrow keys.

/** About as many cells as can have a number. */
const NUMBERED = 16;

export class Timeline {
  /** `slots` have a number, a frame of `frames` and a drawing. `move(slot, frame)` is called for every change. */
  constructor(root, slots, frames, move) {
    Object.assign(this, { root, slots, move, selected: slots[0] });
    this.handles = slots.map(slot => this.handle(slot));
    this.resize(frames);
  }

  /** Makes a cell for each frame. */
  resize(frames) {
    this.frames = frames;
    this.root.style.setProperty("--frames", frames);
    const every = Math.ceil(frames / NUMBERED);
    this.root.classList.toggle("dense", every > 1);
    const cells = Array.from({ length: frames }, (_, frame) => {
      const cell = document.createElement("div");
      cell.className = "cell";
      if (frame % every === 0) cell.textContent = frame;
      cell.style.gridColumn = frame + 1;
      cell.addEventListener("click", () => this.place(this.selected, frame));
      return cell;
    });
    this.root.replaceChildren(...cells, ...this.handles);
    for (const handle of this.handles) handle.setAttribute("aria-valuemax", frames - 1);
  }

  handle(slot) {
    const handle = document.createElement("canvas");
    Object.assign(handle, { className: "handle", width: 64, height: 64, tabIndex: 0, role: "slider" });
    const about = { valuemin: 0, label: `Frame of keyframe ${slot.slot + 1}` };
    for (const [name, value] of Object.entries(about)) handle.setAttribute(`aria-${name}`, value);
    handle.addEventListener("focus", () => this.select(slot));
    handle.addEventListener("pointerdown", event => {
      handle.setPointerCapture(event.pointerId);
      handle.focus();
      event.preventDefault();
    });
    handle.addEventListener("pointermove", event => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      const box = this.root.getBoundingClientRect();
      this.place(slot, Math.floor((event.clientX - box.left) / box.width * this.frames));
    });
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -4, PageUp: 4, Home: -Infinity, End: Infinity };
    handle.addEventListener("keydown", event => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.place(slot, slot.frame + steps[event.key]);
    });
    return handle;
  }

  select(slot) {
    this.selected = slot;
    this.show();
  }

  place(slot, frame) {
    this.selected = slot;
    this.move(slot, Math.min(this.frames - 1, Math.max(0, frame)));
  }

  show() {
    for (const [place, slot] of this.slots.entries()) {
      const handle = this.handles[place];
      const inside = Number.isInteger(slot.frame) && slot.frame >= 0 && slot.frame < this.frames;
      handle.hidden = !inside;
      if (!inside) continue;
      handle.style.gridColumn = slot.frame + 1;
      const shared = this.slots.some(other => other !== slot && !other.empty && !slot.empty && other.frame === slot.frame);
      handle.className = ["handle", slot.empty && "empty", shared && "clash", slot === this.selected && "selected"]
        .filter(Boolean).join(" ");
      handle.setAttribute("aria-valuenow", slot.frame);
      handle.setAttribute("aria-valuetext", `frame ${slot.frame}${slot.empty ? ", no picture yet" : ""}`);
      this.paint(handle, slot);
    }
  }

  paint(handle, slot) {
    const context = handle.getContext("2d");
    context.drawImage(slot.drawing.canvas, 0, 0, handle.width, handle.height);
    context.font = "700 30px system-ui, sans-serif";
    Object.assign(context, { textAlign: "center", textBaseline: "middle", lineWidth: 8, strokeStyle: "#000", fillStyle: "#fff" });
    context.strokeText(slot.slot + 1, 32, 34);
    context.fillText(slot.slot + 1, 32, 34);
  }
}
