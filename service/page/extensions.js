// The fields of `serve --extensions`: size, length and format of the clip, with the limits of the server.
import { CLIP_PIXELS, endpointOf, schema } from "./api.js";

const $ = id => document.getElementById(id);

/** Shows the fields, if the server has them. */
export async function showExtensions() {
  if (CLIP_PIXELS === null) return;
  const known = await schema();
  for (const name of ["width", "height", "num_frames", "fps"]) limit($(name), known[name]);
  $("output_format").append(...known.output_format.enum.map(format => new Option(format)));
  const { width: { minimum, maximum, multipleOf }, num_frames, fps } = known;
  $("limits").textContent = `Sides from ${minimum} to ${maximum}, in multiples of ${multipleOf}. Frames up to `
    + `${num_frames.maximum}, up to ${fps.maximum} per second. Not more than ${CLIP_PIXELS.toLocaleString()} pixels in all frames.`;
  $("extensions").hidden = false;
}

function limit(field, { minimum, maximum, multipleOf, default: value }) {
  Object.assign(field, { min: minimum, max: maximum });
  if (multipleOf) field.step = multipleOf;
  if (value !== undefined) field.defaultValue = value;
}

/** The number of frames that is asked for; the endpoint's own while the field has none. */
export function frames() {
  const field = $("num_frames");
  const asked = !$("extensions").hidden && field.value && field.checkValidity();
  return asked ? Number(field.value) : endpointOf($("endpoint").value).frames;
}
