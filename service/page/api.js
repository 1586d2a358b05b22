// The part of fal's protocol that the page needs.
/** An error response: a message, and the wrong fields of the input. */
export class ApiError extends Error {
  constructor(status, body) {
    const detail = body?.detail;
    const details = (Array.isArray(detail) ? detail : []).map(one => ({ field: one.loc.at(-1), message: one.msg }));
    super(details.length ? details.map(one => `${one.field}: ${one.message}`).join("\n") : detail ?? `HTTP ${status}`);
    this.status = status;
    this.details = details;
    this.fields = details.map(one => one.field);
  }
}

async function call(key, path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Key ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) throw new ApiError(answer.status, await answer.json().catch(() => null));
  return answer;
}

/** Uploads a picture, unless the signal aborts it, and returns its URL. */
export async function upload(key, blob, signal) {
  const body = JSON.stringify({ content_type: blob.type, file_name: "keyframe.png" });
  const headers = { "Content-Type": "application/json" };
  const path = "/storage/upload/initiate?storage_type=fal-cdn-v3";
  const { upload_url, file_url } = await (await call(key, path, { method: "POST", headers, body, signal })).json();
  await call("", upload_url, { method: "PUT", signal, headers: { "Content-Type": blob.type }, body: blob });
  return file_url;
}

export async function submit(key, endpoint, input) {
  const headers = { "Content-Type": "application/json" };
  return (await call(key, `/queue/${endpoint}`, { method: "POST", headers, body: JSON.stringify(input) })).json();
}

const urlOf = ({ endpoint, id }) => `/queue/${endpoint}/requests/${id}`;

export const cancel = (key, request) => call(key, `${urlOf(request)}/cancel`, { method: "PUT" });

/** Returns the result. The seed stays text, since JavaScript numbers cannot hold all its digits. */
export async function result(key, request) {
  const text = await (await call(key, urlOf(request))).text();
  return { ...JSON.parse(text), seed: /"seed":(-?\d+)/.exec(text)[1] };
}

/**
 * Returns the last clips of a key, newest first: id, endpoint, url, seed, number of frames (null if it was not recorded),
 * and when each was made, in seconds since 1970.
 */
export const clips = async key => (await (await call(key, "/page/clips.json")).json()).clips;

/**
 * Returns the server's description of itself: its https port, its endpoints with their runners, the states of these, the
 * frames of clips, the keyframes that they need and the names of weights, and with `--extensions` how many pixels a clip
 * may have in all its frames.
 */
export const about = async () => (await call("", "/page/about.json")).json();

const server = await about();
/**
 * The endpoints: the name of each, the frames of its clips, how many keyframes its model was trained with (null if clips
 * need none), and the names of weights that its requests may give.
 */
export const ENDPOINTS = server.endpoints;
/** The endpoint of a name; undefined if the server no longer has it. */
export const endpointOf = name => ENDPOINTS.find(one => one.name === name);
/** The pixels that a clip may have in all its frames; null if the server has no extensions. */
export const CLIP_PIXELS = server.clip_pixels;

/** Returns the schema of each field of the input. */
export async function schema() {
  const document = await (await call("", "/openapi.json")).json();
  return document.components.schemas.AnimatediffSparsectrlLcmInput.properties;
}

/** Calls `onState` with every state of a request until it has ended. Reconnects if the stream breaks. */
export async function watch(key, request, onState) {
  for (;;) {
    try {
      const answer = await call(key, `${urlOf(request)}/status/stream?logs=1`);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const events = (text + value).split("\n\n");
        text = events.pop();
        for (const event of events.filter(one => one.startsWith("data: "))) {
          const state = JSON.parse(event.slice(6));
          onState(state);
          if (state.status === "COMPLETED") return;
        }
      }
    } catch (error) {
      if (error instanceof ApiError) throw error;
    }
    await new Promise(resolve => setTimeout(resolve, 1000));
  }
}
