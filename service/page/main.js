import { about, cancel, result, submit, upload, watch } from "./api.js";
import { Keyframes } from "./keyframes.js";
import { javascript, python } from "./snippets.js";

const $ = id => document.getElementById(id);
const keyframes = new Keyframes($("keyframes"), $("timeline"));
let running = null;
/** Aborts the uploads and the submission, before there is a request to cancel. */
let beginning = null;

const RUNNERS_SECONDS = 5;

/** Labels of the input's fields on the page. */
const LABELS = {
  prompt: "Prompt", negative_prompt: "Negative prompt", controlnet_type: "Keyframes",
  num_inference_steps: "Steps", guidance_scale: "Guidance", seed: "Seed", conditioning_scale: "Strength of keyframes",
  control_guidance_start: "Control starts at", control_guidance_end: "Control ends at",
  clip_skip: "CLIP skip", normalize_scribbles: "Pale scribbles", prompt_weights: "Weights in prompts", long_prompts: "Long prompts",
};
for (const slot of [0, 1, 2]) {
  LABELS[`keyframe_${slot}_index`] = `Frame of keyframe ${slot + 1}`;
  LABELS[`keyframe_${slot}_image_url`] = `Picture of keyframe ${slot + 1}`;
}

/** Moves the key from the address into this tab's storage. */
function takeKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    sessionStorage.setItem("key", given);
    history.replaceState(null, "", location.pathname);
  }
  $("key").value = sessionStorage.getItem("key") ?? "";
  $("key").addEventListener("input", () => sessionStorage.setItem("key", $("key").value.trim()));
}

const key = () => $("key").value.trim();

function given() {
  const input = {
    prompt: $("prompt").value,
    controlnet_type: document.querySelector("[name=controlnet_type]:checked").value,
    num_inference_steps: Number($("num_inference_steps").value),
    guidance_scale: Number($("guidance_scale").value),
  };
  if ($("negative_prompt").value) input.negative_prompt = $("negative_prompt").value;
  if ($("seed").value.trim()) input.seed = seed($("seed").value.trim());
  const options = advanced();
  if (Object.keys(options).length) input.sparsectrl_lcm = options;
  return input;
}

/** Returns the advanced options that differ from their defaults. fal has none of them, so they have a key of their own. */
function advanced() {
  const changed = [...$("advanced").querySelectorAll("input")].filter(field =>
    field.type === "checkbox" ? field.checked : field.value !== field.defaultValue);
  return Object.fromEntries(changed.map(field => [field.name, field.type === "checkbox" || number(field)]));
}

function number(field) {
  if (!field.value) throw wrong(`${LABELS[field.name]}: give a number`, field.name);
  return Number(field.value);
}

/** Returns a number if JavaScript can hold it exactly, otherwise its digits, which the server accepts too. */
function seed(text) {
  if (!/^-?\d+$/.test(text)) throw wrong("Seed: give a whole number, or nothing for a random one", "seed");
  return Number.isSafeInteger(Number(text)) ? Number(text) : text;
}

const wrong = (message, ...fields) => Object.assign(new Error(message), { fields });

function fail(error) {
  const lines = error.details?.map(({ field, message }) =>
    field === "body" ? message : `${LABELS[field] ?? field}: ${message.replace(/^(sparsectrl_lcm\.)?\w+: /, "")}`);
  $("error").textContent = lines?.length ? lines.join("\n") : error.message;
  $("error").hidden = false;
  const names = error.status === 401 ? ["key"] : error.fields ?? [];
  for (const name of names) $(name)?.setAttribute("aria-invalid", "true");
  if (names.some(name => $("advanced").contains($(name)))) $("advanced").open = true;
  $(names[0])?.focus();
}

function settle() {
  $("error").hidden = true;
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

function busy(on) {
  $("submit").disabled = on;
  $("cancel").hidden = $("progress").hidden = !on;
  if (!on) $("preview").hidden = true;
  $("empty").hidden = !$("preview").hidden || !$("video").hidden;
}

function show(state) {
  if (state.status === "IN_QUEUE") $("state").textContent = `waiting, ${state.queue_position} ahead`;
  const line = state.logs?.at(-1);
  if (line) $("state").textContent = line.message;
  if (line?.labels?.fraction) $("progress").value = Number(line.labels.fraction);
  if (state.preview) {
    $("preview").src = state.preview;
    $("preview").hidden = false;
    $("empty").hidden = true;
  }
}

/** Shows each runner of the server, now and every few seconds while the page is looked at. */
async function showRunners() {
  if (!document.hidden) {
    const { runners } = await about().catch(() => ({ runners: [] }));
    $("runners").textContent = runners.map(({ name, state }) => `${name}: ${state}`).join(", ");
  }
  setTimeout(showRunners, RUNNERS_SECONDS * 1000);
}

async function showCode(input) {
  const { tls_port } = await about();
  $("python").textContent = python(input, location.origin, tls_port);
  $("javascript").textContent = javascript(input, location.origin);
}

async function follow(id) {
  running = id;
  sessionStorage.setItem("request", id);
  $("video").hidden = $("links").hidden = true;
  $("progress").value = 0;
  busy(true);
  try {
    await watch(key(), id, show);
    const { video, seed } = await result(key(), id);
    $("video").src = $("download").href = video.url;
    $("download").download = video.file_name;
    $("used-seed").value = seed;
    $("video").hidden = $("links").hidden = false;
    $("video").play().catch(() => {});
  } catch (error) {
    $("state").textContent = "";
    fail(error);
  } finally {
    sessionStorage.removeItem("request");
    running = null;
    busy(false);
  }
}

async function make() {
  if (running || beginning) return;
  settle();
  if (!$("prompt").value.trim()) return fail(wrong("Prompt: describe the clip.", "prompt"));
  const clash = keyframes.clash();
  if (clash !== undefined) return fail(wrong(`Two keyframes are on frame ${clash}.`));
  beginning = new AbortController();
  const { signal } = beginning;
  busy(true);
  try {
    const input = given();
    for (const slot of keyframes.given()) {
      $("state").textContent = `uploading keyframe ${slot.slot + 1}`;
      input[`keyframe_${slot.slot}_image_url`] = await upload(key(), await slot.blob(), signal);
      input[`keyframe_${slot.slot}_index`] = slot.frame;
    }
    await showCode(input);
    signal.throwIfAborted();
    const { request_id } = await submit(key(), input);  // not aborted: an accepted request would run unseen
    if (signal.aborted) await cancel(key(), request_id).catch(() => {});
    beginning = null;
    await follow(request_id);
  } catch (error) {
    $("state").textContent = "";
    busy(false);
    fail(signal.aborted ? new Error("Request was cancelled") : error);
  } finally {
    beginning = null;
  }
}

function stop() {
  if (running) cancel(key(), running).catch(() => {});
  beginning?.abort();
}

takeKey();
showRunners();
$("key-form").addEventListener("submit", event => event.preventDefault());
$("form").addEventListener("submit", event => {
  event.preventDefault();
  make();
});
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) make();
});
$("cancel").addEventListener("click", stop);
$("reuse").addEventListener("click", () => { $("seed").value = $("used-seed").value; });
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", () => navigator.clipboard.writeText($(button.dataset.of).textContent));
}
const left = sessionStorage.getItem("request");
if (left) follow(left);
