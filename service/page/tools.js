// The drawing tools, shared by all keyframes: brush or eraser, its size, and the onion skin.
export class Tools {
  /** `resized` is called when the brush has another size, `skinned` when the onion skin is switched. */
  constructor(root, resized, skinned) {
    this.root = root;
    this.range = root.querySelector("#brush");
    this.skin = root.querySelector("#onion");
    this.range.addEventListener("input", () => {
      root.querySelector("#brush-size").value = this.size;
      resized();
    });
    this.skin.addEventListener("change", skinned);
  }

  get size() {
    return Number(this.range.value);
  }

  get erase() {
    return this.root.querySelector("[name=tool]:checked").value === "erase";
  }

  get onion() {
    return this.skin.checked;
  }

  /** A ring of the brush's size as a cursor, in pixels of the screen. */
  cursor(scale) {
    const side = Math.max(6, Math.round(this.size * scale)), middle = side / 2;
    const ring = (radius, colour) => `<circle cx='${middle}' cy='${middle}' r='${radius}' fill='none' stroke='${colour}'/>`;
    const svg = `<svg xmlns='http://www.w3.org/2000/svg' width='${side}' height='${side}'>`
      + `${ring(middle - 1.5, "black")}${ring(middle - .5, "white")}</svg>`;
    return `url("data:image/svg+xml,${encodeURIComponent(svg)}") ${middle} ${middle}, crosshair`;
  }
}

const SKIN = 256;
const BEFORE = "#ff8a5c", AFTER = "#5cb8ff";

/** Shows the neighbours of a keyframe over it: the one before in orange, the one after in blue. */
export function paintSkin(canvas, before, after) {
  canvas.width = canvas.height = SKIN;  // clears it
  const context = canvas.getContext("2d");
  for (const [neighbour, colour] of [[before, BEFORE], [after, AFTER]]) {
    if (!neighbour) continue;
    const tinted = new OffscreenCanvas(SKIN, SKIN), ink = tinted.getContext("2d");
    ink.drawImage(neighbour, 0, 0, SKIN, SKIN);
    Object.assign(ink, { globalCompositeOperation: "multiply", fillStyle: colour });
    ink.fillRect(0, 0, SKIN, SKIN);
    context.globalCompositeOperation = "lighter";
    context.drawImage(tinted, 0, 0);
  }
}
