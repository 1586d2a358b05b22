// The demo's request: its keyframes, prompt and seed.
import { frames } from "./extensions.js";
import { fill } from "./form.js";

const KEYFRAMES = [["00", 0], ["08", 8], ["15", 15]];
const VALUES = {
  prompt: "a yellow star grows over a navy and teal ground", controlnet_type: "scribble", negative_prompt: "",
  num_inference_steps: "4", guidance_scale: "1", seed: "4", width: "", height: "", num_frames: "16",
};

/** Fills keyframes and form. What was drawn comes back with undo. */
export async function showExample(keyframes) {
  const { slots } = keyframes;
  fill(Object.entries(VALUES).map(([name, value]) => ({ name, value })));
  keyframes.resize(frames());
  await Promise.all(KEYFRAMES.map(async ([name, frame], slot) => {
    slots[slot].frame = frame;
    await slots[slot].load(await (await fetch(`/page/example-${name}.png`)).blob());
  }));
}
