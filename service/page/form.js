// The form's fields: the input that they give, and errors that stand at them.
const $ = id => document.getElementById(id);

const KEY_HINT = ": enter the key that serve printed or wrote to first-key in its data folder, or one from sparsectrl-lcm keys create";

/** Labels of the input's fields on the page. */
const LABELS = {
  prompt: "Prompt", negative_prompt: "Negative prompt", controlnet_type: "Keyframes",
  num_inference_steps: "Steps", guidance_scale: "Guidance", seed: "Seed", conditioning_scale: "Strength of keyframes",
  control_guidance_start: "Control starts at", control_guidance_end: "Control ends at",
  width: "Width", height: "Height", num_frames: "Frames", fps: "Frame rate", output_format: "Format",
  clip_skip: "CLIP skip", normalize_scribbles: "Pale scribbles", prompt_weights: "Weights in prompts", long_prompts: "Long prompts",
  weights: "Weights of the model",
};
for (const slot of [0, 1, 2]) {
  LABELS[`keyframe_${slot}_index`] = `Frame of keyframe ${slot + 1}`;
  LABELS[`keyframe_${slot}_image_url`] = `Picture of keyframe ${slot + 1}`;
}

/** The fields with a name, except those of the drawing tools. */
const fields = () => [...$("form").elements].filter(field => field.name && field.name !== "tool");

/** Returns the input without its keyframes. Throws what `wrong` returns. */
export function given() {
  if (!$("prompt").value.trim()) throw wrong("Prompt: describe the clip.", "prompt");
  const input = {
    prompt: $("prompt").value,
    controlnet_type: document.querySelector("[name=controlnet_type]:checked").value,
    num_inference_steps: Number($("num_inference_steps").value),
    guidance_scale: Number($("guidance_scale").value),
  };
  if ($("negative_prompt").value) input.negative_prompt = $("negative_prompt").value;
  if ($("seed").value.trim()) input.seed = seed($("seed").value.trim());
  if (!$("extensions").hidden) Object.assign(input, changed("#extensions"));
  const options = changed(".options");  // fal has none of them, so they have a key of their own
  if (Object.keys(options).length) input.sparsectrl_lcm = options;
  return input;
}

/** Returns the values of the fields in some parts of the form that differ from their defaults. */
function changed(parts) {
  const found = [...document.querySelectorAll(`:is(${parts}) :is(input, select)`)].filter(field => {
    if (field.type === "checkbox") return field.checked;
    return field.matches("select") ? field.selectedIndex > 0 : field.value !== field.defaultValue;
  });
  return Object.fromEntries(found.map(field => [field.name, value(field)]));
}

function value(field) {
  if (field.type === "checkbox") return true;
  if (field.matches("select")) return field.value;
  if (!field.value) throw wrong(`${LABELS[field.name]}: give a number`, field.name);
  return Number(field.value);
}

/** Returns a number if JavaScript can hold it exactly, otherwise its digits, which the server accepts too. */
export function seed(text) {
  if (!/^-?\d+$/.test(text)) throw wrong("Seed: give a whole number, or nothing for a random one", "seed");
  return Number.isSafeInteger(Number(text)) ? Number(text) : text;
}

/** Offers the weights that requests may name, if there are any, instead of those of another endpoint. */
export function offerWeights(names) {
  $("weights").replaceChildren($("weights").options[0], ...names.map(name => new Option(name, name)));
  $("weights-choice").hidden = !names.length;
}

/** The values of all fields as they are, to be filled in again. */
export const values = () => fields().filter(field => field.type !== "radio" || field.checked)
  .map(({ name, type, value, checked }) => ({ name, value: type === "checkbox" ? checked : value }));

export function fill(saved) {
  for (const { name, value } of saved) {
    for (const field of fields().filter(one => one.name === name)) {
      if (field.type === "radio") field.checked = field.value === value;
      else if (field.type === "checkbox") field.checked = value;
      else if (field.matches("select")) choose(field, value);
      else field.value = value;
    }
  }
}

/** Chooses a value, unless it is no longer offered. What depends on it follows. */
function choose(field, value) {
  if (![...field.options].some(one => one.value === value)) return;
  field.value = value;
  field.dispatchEvent(new Event("change"));
}

export const wrong = (message, ...names) => Object.assign(new Error(message), { fields: names });

/** Shows an error, marks its fields and moves to the first of them. */
export function fail(error) {
  const lines = error.details?.map(({ field, message }) =>
    field === "body" ? message : `${LABELS[field] ?? field}: ${message.replace(/^(sparsectrl_lcm\.)?\w+: /, "")}`);
  const refused = error.status === 401, shown = $(refused ? "key-error" : "error");
  shown.textContent = lines?.length ? lines.join("\n") : error.message + (refused ? KEY_HINT : "");
  shown.hidden = false;
  const names = refused ? ["key"] : error.fields ?? [];
  for (const name of names) $(name)?.setAttribute("aria-invalid", "true");
  if (names.some(name => $("advanced").contains($(name)))) $("advanced").open = true;
  $(names[0])?.focus({ preventScroll: true });
  for (const part of refused ? [$("key-form")] : [shown, $(names[0])]) part?.scrollIntoView({ block: "nearest" });
}

export function settle() {
  $("error").hidden = $("key-error").hidden = true;
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}
