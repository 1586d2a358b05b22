// The last clips of this key, from the server, with what this browser knows of them: their inputs.
import { clips } from "./api.js";
import { isPicture } from "./player.js";
import { load, owner, save } from "./saved.js";

const REMEMBERED = 24;

/** Remembers the input of a request of a key; later its seed and its clip. The newest come first. */
export async function remember(key, id, news) {
  const known = await remembered();
  const before = known.find(one => one.id === id) ?? { id, owner: owner(key), at: Date.now() / 1000 };
  await save("requests", [{ ...before, ...news }, ...known.filter(one => one.id !== id)].slice(0, REMEMBERED));
}

const remembered = async () => (await load("requests")) ?? [];

/** What this browser knows of a request. */
export const known = async id => (await remembered()).find(one => one.id === id) ?? { id };

export class Clips {
  /** `choose` is called with a clip that the user has clicked. */
  constructor(section, choose) {
    Object.assign(this, { section, choose, list: section.querySelector("ul") });
  }

  /** Shows the clips of a key; without one, those that this browser has made without one. Returns all of them. */
  async show(key) {
    const mine = (await remembered()).filter(one => one.owner === owner(key));
    const made = key ? await clips(key).catch(() => []) : mine.filter(one => one.url);
    const all = made.map(clip => ({ ...mine.find(({ id }) => id === clip.id), ...clip }));
    const shown = new Map([...this.list.children].map(item => [item.dataset.id, item]));
    this.list.replaceChildren(...all.map(clip => shown.get(clip.id) ?? this.item(clip)));
    this.section.hidden = !all.length;
    return all;
  }

  item(clip) {
    const item = document.createElement("li"), button = document.createElement("button");
    const moving = document.createElement(isPicture(clip.url) ? "img" : "video");
    const made = new Date(clip.at * 1000).toLocaleString();
    const name = `${clip.input?.prompt ?? "Clip"}, seed ${clip.seed}, ${clip.endpoint}, ${made}`;
    Object.assign(button, { type: "button", title: name });
    button.setAttribute("aria-label", name);
    item.dataset.id = clip.id;
    moving.addEventListener("error", () => item.remove());  // the clip has expired
    if (moving.matches("img")) {
      Object.assign(moving, { src: clip.url, alt: "" });
    } else {
      Object.assign(moving, { src: clip.url, muted: true, playsInline: true, loop: true, preload: "metadata", tabIndex: -1 });
      button.addEventListener("pointerenter", () => moving.play().catch(() => {}));
      button.addEventListener("pointerleave", () => moving.pause());
    }
    button.addEventListener("click", () => this.choose(clip));
    button.append(moving);
    item.append(button);
    return item;
  }

  /** Marks the clip that is shown. */
  mark(id) {
    for (const item of this.list.children) item.firstChild.setAttribute("aria-pressed", item.dataset.id === id);
  }
}
