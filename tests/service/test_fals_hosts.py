"""fal's clients without any change: the server on port 443, and fal's host names in a namespace's /etc/hosts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import APP, HERE
from .documented_programs import HOSTS

SCRIBBLE = HERE.parents[1] / "demo/scribbles/frame_00.png"
PYTHON = f"""
import json, fal_client
url = fal_client.upload_file({str(SCRIBBLE)!r})
few = {{"prompt": "a star", "num_inference_steps": 1, "keyframe_0_image_url": url}}
print(json.dumps([fal_client.run("{APP}", few | {{"seed": 3}})["seed"],
                  fal_client.subscribe("{APP}", few | {{"seed": 4}})["seed"]]))
"""
CODE = {
    "@fal-ai/client": 'import { fal } from "@fal-ai/client"; const of = answer => answer.data;',
    "@fal-ai/serverless-client": 'import * as fal from "@fal-ai/serverless-client"; const of = answer => answer;',
}
JAVASCRIPT = f"""
import {{ readFile }} from "node:fs/promises";
const url = await fal.storage.upload(new Blob([await readFile("{SCRIBBLE}")], {{ type: "image/png" }}));
const few = {{ prompt: "a star", num_inference_steps: 1, keyframe_0_image_url: url }};
const seeds = [];
for (const [call, seed] of [[fal.run, 3], [fal.subscribe, 4]])
  seeds.push(of(await call("{APP}", {{ input: {{ ...few, seed }} }})).seed);
console.log(JSON.stringify(seeds));
"""
SCRIPT = """
set -e
ip link set lo up
mount --bind hosts /etc/hosts
"$PYTHON" -m sparsectrl_lcm serve --data data --tls-port 443 --backend onnxruntime > told 2> log & server=$!
until [ -s data/first-key ]; do kill -0 $server; sleep 0.2; done
export FAL_KEY="$(cat data/first-key)" NODE_EXTRA_CA_CERTS="$PWD/data/tls/ca.pem" SSL_CERT_FILE="$PWD/data/tls/ca.pem"
$CLIENTS
kill $server
wait $server
"""


@pytest.fixture(scope="module")
def clients(modules: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The commands of the clients."""
    folder = tmp_path_factory.mktemp("clients")
    (folder / "client.py").write_text(PYTHON)
    commands = [f"{sys.executable} {folder / 'client.py'}"]
    for place, head in enumerate(CODE.values()):
        script = modules / f"unchanged{place}.mjs"  # beside the packages, where node looks for them
        script.write_text(head + JAVASCRIPT)
        commands.append(f"node {script}")
    return commands


@pytest.mark.slow
def test_clients_reach_the_server_under_fals_names(clients: list[str], tmp_path: Path) -> None:
    namespace = ["unshare", "--map-root-user", "--net", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system allows no namespaces")
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{HOSTS.replace('192.0.2.10', '127.0.0.1')}\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FAL_", "HTTP"))}
    environment["PYTHON"] = sys.executable
    script = SCRIPT.replace("$CLIENTS", "\n".join(clients))
    done = subprocess.run(
        [*namespace, "bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log").read_text()[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert answers == [[3, 4]] * len(clients)
