"""fal's own JavaScript client from npm, against a running server."""

import base64
import io
import json
import os
import subprocess
from pathlib import Path

import av
import httpx
import pytest

from .conftest import APP, Server
from .documented_programs import example
from .holds import Hold
from .test_webhooks import Receiver, delivered, verify

HEAD = f"""
import {{ createFalClient, ApiError, ValidationError }} from "@fal-ai/client";
import assert from "node:assert";
const APP = "{APP}", base = process.env.SERVER;
const rewrite = url => url.replace("https://queue.fal.run", base + "/queue")
  .replace("https://fal.run", base).replace("https://rest.fal.ai", base);
const options = {{ credentials: process.env.FAL_KEY, suppressLocalCredentialsWarning: true }};
const fal = createFalClient({{ ...options, requestMiddleware: async r => ({{ ...r, url: rewrite(r.url) }}) }});
const proxied = createFalClient({{ ...options, proxyUrl: {{ url: base + "/api/fal/proxy", when: "always" }} }});
const [png, ...others] = JSON.parse(process.env.PICTURES).map(text => Buffer.from(text, "base64"));
"""
SCRIBBLES = [Path(__file__).parents[2] / f"demo/scribbles/frame_{index:02}.png" for index in (0, 8, 15)]
PICTURES = [base64.b64encode(path.read_bytes()).decode() for path in SCRIBBLES]


def javascript(modules: Path, server: Server, folder: Path, code: str, head: str = HEAD) -> str:
    script = modules / f"{folder.name}.mjs"
    script.write_text(head + code)
    environment = os.environ | {"FAL_KEY": server.key, "SERVER": server.url, "PICTURES": json.dumps(PICTURES)}
    done = subprocess.run(
        ["node", str(script)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + server.log[-3000:]
    return done.stdout.strip()


def frames_at(url: str) -> int:
    with av.open(io.BytesIO(httpx.get(url).raise_for_status().content)) as video:
        return sum(1 for _ in video.decode(video=0))


@pytest.mark.parametrize("client", ["fal", "proxied"])
def test_the_hosted_pages_example(modules: Path, demo: Server, tmp_path: Path, client: str) -> None:
    code = f"""
const client = {client};
const lines = [], blob = bytes => new Blob([bytes], {{ type: "image/png" }});
const result = await client.subscribe(APP, {{
  input: {{ prompt: "a panda", seed: 42, keyframe_0_image_url: blob(png), keyframe_0_index: 0,
    keyframe_1_image_url: "data:image/png;base64," + others[0].toString("base64"), keyframe_1_index: 8,
    keyframe_2_image_url: blob(others[1]), keyframe_2_index: 15 }},
  logs: true, onQueueUpdate: u => {{ if (u.status === "IN_PROGRESS") lines.push(...u.logs.map(l => l.message)); }},
}});
assert.equal(result.data.seed, 42);
assert.equal(result.data.video.content_type, "video/mp4");
assert.ok(result.requestId);
const clip = await fetch(result.data.video.url);
assert.equal((await clip.arrayBuffer()).byteLength, result.data.video.file_size);
console.log(result.data.video.url);
"""
    assert frames_at(javascript(modules, demo, tmp_path, code)) == 16


def test_queue_runs_streams_and_errors(modules: Path, demo: Server, tmp_path: Path, hook: Receiver) -> None:
    code = """
const few = { num_inference_steps: 2 };
const webhookUrl = "HOOK";
const { request_id } = await fal.queue.submit(APP, { input: { prompt: "a", seed: 3 }, webhookUrl });
const stream = await fal.queue.streamStatus(APP, { requestId: request_id, logs: true });
const states = [], messages = [];
for await (const state of stream) {
  states.push(state.status);
  assert.ok(!("preview" in state));
  messages.push(...(state.logs ?? []).map(line => line.message));
}
const last = await stream.done();
assert.equal(last.status, "COMPLETED");
assert.equal(messages.length, new Set(messages).size);
assert.ok(messages.includes("denoise 4/4"), messages.join());
const result = await fal.queue.result(APP, { requestId: request_id });
assert.equal(result.data.seed, 3);
assert.equal(result.requestId, request_id);

const streamed = await fal.subscribe(APP, { input: { ...few, prompt: "b", seed: 4 }, mode: "streaming", logs: true });
assert.equal(streamed.data.seed, 4);
assert.equal((await fal.run(APP, { input: { ...few, prompt: "c", seed: 5 } })).data.seed, 5);
assert.equal((await fal.run(APP, { input: { ...few, prompt: "c", seed: 6 }, method: "get" })).data.seed, 6);

const elsewhere = createFalClient({ ...options, fetch: (url, init) => fetch(rewrite(String(url)), init) });
for (const [client, connectionMode] of [[fal, "server"], [elsewhere, "client"]]) {
  const events = await client.stream(APP, { input: { ...few, prompt: "d", seed: 7 }, connectionMode });
  let fractions = 0;
  for await (const event of events) fractions += "fraction" in event;
  assert.ok(fractions > 1);
  assert.equal((await events.done()).seed, 7);
}

await assert.rejects(fal.subscribe(APP, { input: { prompt: "e", controlnet_type: "canny" } }),
  e => e instanceof ValidationError && e.getFieldErrors("controlnet_type")[0].type === "one_of");
const requestMiddleware = async r => ({ ...r, url: rewrite(r.url) });
const stranger = createFalClient({ ...options, credentials: "a:b", requestMiddleware });
await assert.rejects(stranger.queue.result(APP, { requestId: request_id }), e => e.status === 401);
console.log(request_id);
"""
    request_id = javascript(modules, demo, tmp_path, code.replace("HOOK", hook.url))
    ((headers, body),) = delivered(hook, 1)
    verify(headers, body, httpx.get(demo.url + "/.well-known/jwks.json").json())
    assert json.loads(body)["request_id"] == request_id
    assert frames_at(json.loads(body)["payload"]["video"]["url"]) == 16


def test_the_deprecated_client(modules: Path, demo: Server, tmp_path: Path) -> None:
    head = HEAD.split("const options", maxsplit=1)[0].replace(
        'import { createFalClient, ApiError, ValidationError } from "@fal-ai/client"',
        'import * as fal from "@fal-ai/serverless-client"',
    )
    code = """
const png = Buffer.from(JSON.parse(process.env.PICTURES)[0], "base64");
fal.config({ credentials: process.env.FAL_KEY, requestMiddleware: async request => ({
  ...request, url: rewrite(request.url.replace("https://rest.alpha.fal.ai", base)) }) });
const lines = [], scribble = new Blob([png], { type: "image/png" });
const result = await fal.subscribe(APP, {
  input: { prompt: "a", seed: 42, num_inference_steps: 2, keyframe_0_image_url: scribble },
  logs: true, onQueueUpdate: u => { if (u.status === "IN_PROGRESS") lines.push(...u.logs.map(l => l.message)); },
});
assert.equal(result.seed, 42);
assert.equal((await fal.run(APP, { input: { prompt: "b", seed: 5, num_inference_steps: 1 } })).seed, 5);
await assert.rejects(fal.run(APP, { input: { prompt: "b", guidance_scale: 9 } }), e => e.status === 422);
console.log(result.video.url);
"""
    assert frames_at(javascript(modules, demo, tmp_path, code, head=head)) == 16


def test_states_a_start_timeout_and_cancellation(modules: Path, stub: Server, tmp_path: Path, hold: Hold) -> None:
    code = """
const { request_id: requestId } = await fal.queue.submit(APP, { input: { prompt: "HELD" } });
const status = async id => (await fal.queue.status(APP, { requestId: id })).status;
while (await status(requestId) === "IN_QUEUE");
assert.equal(await status(requestId), "IN_PROGRESS");
const waiting = await fal.queue.submit(APP, { input: { prompt: "a" } });
assert.equal(await status(waiting.request_id), "IN_QUEUE");
await assert.rejects(fal.run(APP, { input: { prompt: "a" }, startTimeout: 1.2 }),
  e => e instanceof ApiError && e.status === 504 && e.isUserTimeout);
await fal.queue.cancel(APP, { requestId });
await fal.queue.subscribeToStatus(APP, { requestId });
await assert.rejects(fal.queue.result(APP, { requestId }), e => e instanceof ApiError && e.status === 499);
"""
    javascript(modules, stub, tmp_path, code.replace("HELD", hold.prompt))


def test_the_example_of_the_docs(modules: Path, demo: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert frames_at(javascript(modules, demo, tmp_path, example("js", demo), head="")) == 16


def test_uploads_small_and_over_90_megabytes(modules: Path, demo: Server, tmp_path: Path) -> None:
    code = """
const small = await fal.storage.upload(new File([png], "../../ä/b.png", { type: "image/png" }));
assert.deepEqual(Buffer.from(await (await fetch(small)).arrayBuffer()), png);
const bytes = Buffer.alloc(91 * 2 ** 20);
for (let i = 0; i < bytes.length; i += 4096) bytes.writeUInt32LE(i, i);
const large = await fal.storage.upload(new Blob([bytes], { type: "application/octet-stream" }));
assert.ok(Buffer.from(await (await fetch(large)).arrayBuffer()).equals(bytes));
"""
    javascript(modules, demo, tmp_path, code)
