// The demo's request: its keyframes, prompt and seed.
import { frames } from "./extensions.js";
import { fill } from "./form.js";

/** The pictures, and their places between the first frame and the last. */
const KEYFRAMES = [["00", 0], ["08", 8 / 15], ["15", 1]];
const VALUES = {
  prompt: "a yellow star grows over a navy and teal ground", controlnet_type: "scribble", negative_prompt: "",
  num_inference_steps: "4", guidance_scale: "1", seed: "4", width: "", height: "", num_frames: "",
};

/** Fills keyframes and form. What was drawn comes back with undo. */
export async function showExample(keyframes) {
  const { slots } = keyframes;
  fill(Object.entries(VALUES).map(([name, value]) => ({ name, value })));
  keyframes.resize(frames());
  const taken = new Set();  // a short clip has no frame for each
  await Promise.all(KEYFRAMES.map(async ([name, place], slot) => {
    const frame = slots[slot].frame = Math.round(place * (frames() - 1));
    if (taken.has(frame)) return slots[slot].drawing.clear();
    taken.add(frame);
    await slots[slot].load(await (await fetch(`/page/example-${name}.png`)).blob());
  }));
}
