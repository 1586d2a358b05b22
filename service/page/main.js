// The page: from the form to a request, its progress, its clip, and back after a reload.
import { about, cancel, endpointOf, ENDPOINTS, result, submit, upload, watch } from "./api.js";
import { Clips, known, remember } from "./clips.js";
import { showExample } from "./example.js";
import { frames, showExtensions } from "./extensions.js";
import { fail, fill, given, offerWeights, seed, settle, values, wrong } from "./form.js";
import { Keyframes, need } from "./keyframes.js";
import { Player } from "./player.js";
import { loadOf, saveOf } from "./saved.js";
import { javascript, python } from "./snippets.js";

const $ = id => document.getElementById(id);
const RUNNERS_SECONDS = 5;
const SAVE_SECONDS = 0.3;

const keyframes = new Keyframes($("keyframes"), $("timeline"), $("tools"), saveSoon);
const player = new Player($("screen"), $("player"));
const clips = new Clips($("clips"), showClip);
/** The request that runs: its endpoint and id. */
let running = null;
/** Aborts the uploads and the submission, before there is a request to cancel. */
let beginning = null;
let saving = null;
/** Whether form or drawings were changed since the page was opened. */
let edited = false;
/** The clip that is shown, or was before the request that runs. */
let shown = null;

const key = () => $("key").value.trim();
const endpoint = () => $("endpoint").value;

/** Moves the key from the address into this tab's storage. */
function takeKey() {
  const inAddress = new URLSearchParams(location.hash.slice(1)).get("key");
  if (inAddress) {
    sessionStorage.setItem("key", inAddress);
    history.replaceState(null, "", location.pathname);
  }
  $("key").value = sessionStorage.getItem("key") ?? "";
  $("key").addEventListener("input", () => sessionStorage.setItem("key", key()));
  $("key").addEventListener("change", changeKey);
}

/** Shows what belongs to the key. Form and drawings that were begun without it become its own. */
async function changeKey() {
  if (edited) saveNow();
  else await restoreForm();
  await clips.show(key());
}

/** Saves form and drawings, once no further change has come for a moment. */
function saveSoon() {
  edited = true;
  clearTimeout(saving);
  saving = setTimeout(saveNow, SAVE_SECONDS * 1000);
}

function saveNow() {
  clearTimeout(saving);
  saving = null;
  saveOf(key(), "form", values());
  saveOf(key(), "keyframes", keyframes.saved());
}

function busy(on) {
  $("submit").disabled = on;
  $("progress-row").hidden = !on;
  if (on) {
    $("progress").value = 0;
    $("links").hidden = true;
    player.clear();
  }
}

/** Shows the clip from before again, after a request that made none. */
function back() {
  $("state").textContent = "";
  busy(false);
  if (shown) showClip(shown);
  else player.clear();
}

function show(state) {
  const ahead = state.queue_position;
  if (state.status === "IN_QUEUE") $("state").textContent = ahead ? `waiting, ${ahead} ahead` : "waiting";
  const line = state.logs?.at(-1);
  if (line) $("state").textContent = line.message;
  if (line?.labels?.fraction) $("progress").value = Number(line.labels.fraction);
  if (state.preview) player.showPreview(state.preview);
}

/** Shows each runner of the endpoint. */
async function showRunners() {
  const { endpoints } = await about().catch(() => ({ endpoints: [] }));
  const { runners } = endpoints.find(({ name }) => name === endpoint()) ?? { runners: [] };
  $("runners").textContent = runners.map(({ name, state }) => `${name}: ${state}`).join(", ");
}

/** Shows what the chosen endpoint has. */
function showEndpoint() {
  const chosen = endpointOf(endpoint());
  offerWeights(chosen.weights);
  $("num_frames").placeholder = chosen.frames;
  $("needed-keyframes").textContent = need(chosen.needed_keyframes);
  keyframes.resize(frames());
  showRunners();
}

async function showCode(endpoint, input) {
  const { tls_port } = await about();
  $("python").textContent = python(endpoint, input, location.origin, tls_port);
  $("javascript").textContent = javascript(endpoint, input, location.origin);
  $("code").hidden = false;
}

/** Shows a clip, and the code that makes it again if this browser knows its input. */
async function showClip(clip) {
  if (running || beginning) return;
  shown = clip;
  $("download").href = clip.url;
  $("download").download = clip.url.split("/").at(-1);
  $("used-seed").value = clip.seed;
  $("links").hidden = false;
  $("code").hidden = !clip.input;
  player.show(clip.url, clip.frames ?? clip.input?.num_frames ?? endpointOf(clip.endpoint)?.frames ?? ENDPOINTS[0].frames);
  clips.mark(clip.id);
  if (clip.input) await showCode(clip.endpoint, { ...clip.input, seed: seed(clip.seed) });
}

async function follow(request) {
  const { id } = running = request;
  sessionStorage.setItem("running", JSON.stringify(request));
  busy(true);
  let failure = null;
  try {
    await watch(key(), request, show);
    const made = await result(key(), request);
    await remember(key(), id, { url: made.video.url, seed: made.seed });
    const listed = (await clips.show(key())).find(one => one.id === id) ?? await known(id);  // a browser may keep nothing
    shown = { ...request, ...listed, url: made.video.url, seed: made.seed };
  } catch (error) {
    failure = error;
  }
  sessionStorage.removeItem("running");
  running = null;
  if (failure) {
    back();
    fail(failure);
  } else {
    busy(false);
    await showClip(shown);
  }
}

/** Moves a narrow screen, where the clip is below the form, to progress and clip. */
function look() {
  if (!matchMedia("(min-width: 62rem)").matches) $("result").scrollIntoView();
}

/** Returns the input without its keyframes, or nothing after it has shown what is wrong. */
function checked() {
  try {
    const clash = keyframes.clash();
    if (clash !== undefined) throw wrong(`Two keyframes are on frame ${clash}.`);
    return given();
  } catch (error) {
    fail(error);
  }
}

async function make() {
  if (running || beginning) return;
  settle();
  const input = checked();
  if (!input) return;
  beginning = new AbortController();
  const { signal } = beginning, to = endpoint();
  saveNow();
  busy(true);
  look();
  try {
    for (const slot of keyframes.given()) {
      $("state").textContent = `uploading keyframe ${slot.slot + 1}`;
      input[`keyframe_${slot.slot}_image_url`] = await upload(key(), await slot.drawing.blob(), signal);
      input[`keyframe_${slot.slot}_index`] = slot.frame;
    }
    await showCode(to, input);
    signal.throwIfAborted();
    const asked = { ...input, sparsectrl_lcm: { ...input.sparsectrl_lcm, previews: true } };
    const { request_id: id } = await submit(key(), to, asked);  // not aborted: an accepted request would run unseen
    await remember(key(), id, { endpoint: to, input });
    if (signal.aborted) await cancel(key(), { endpoint: to, id }).catch(() => {});
    beginning = null;
    await follow({ endpoint: to, id });
  } catch (error) {
    beginning = null;
    back();
    fail(signal.aborted ? new Error("Request was cancelled") : error);
  }
}

function stop() {
  if (running) cancel(key(), running).catch(() => {});
  beginning?.abort();
}

/** Shows the form and the drawings that were saved for the key. */
async function restoreForm() {
  const [form, drawings] = await Promise.all([loadOf(key(), "form"), loadOf(key(), "keyframes")]);
  if (form) {
    fill(form);
    keyframes.resize(frames());
  }
  if (drawings) await keyframes.restore(drawings);
}

/** Shows what was there before a reload: form, drawings, the request that runs, or the last clip. */
async function restore() {
  await restoreForm();
  const left = JSON.parse(sessionStorage.getItem("running"));
  [shown = null] = await clips.show(key());
  if (left) await follow(left);
  else if (shown) await showClip(shown);
}

takeKey();
$("endpoint").append(...ENDPOINTS.map(({ name }) => new Option(name, name)));
$("endpoint").addEventListener("change", showEndpoint);
$("endpoint").addEventListener("input", saveSoon);
showEndpoint();
setInterval(() => document.hidden || showRunners(), RUNNERS_SECONDS * 1000);
$("key-form").addEventListener("submit", event => event.preventDefault());
$("form").addEventListener("submit", event => {
  event.preventDefault();
  make();
});
$("form").addEventListener("input", saveSoon);
$("num_frames").addEventListener("change", () => {
  keyframes.resize(frames());
  saveSoon();
});
document.addEventListener("visibilitychange", () => saving && saveNow());
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) make();
});
$("example").addEventListener("click", () => showExample(keyframes));
$("cancel").addEventListener("click", stop);
$("reuse").addEventListener("click", () => {
  $("seed").value = $("used-seed").value;
  saveSoon();
});
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = $(button.dataset.of);
    getSelection().selectAllChildren(code);
    if (navigator.clipboard) await navigator.clipboard.writeText(code.textContent);
    else document.execCommand("copy");  // a page over http on another machine has no clipboard
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
await showExtensions();
restore();
