// A request as code for fal's Python and JavaScript clients.
/** fal's Python client only speaks https, so all URLs get the https port, also those of files. */
export function python(endpoint, input, origin, tlsPort) {
  const { protocol, hostname, host } = new URL(origin);
  const secure = protocol === "https:" ? host : `${hostname}:${tlsPort ?? "TLS_PORT"}`;
  const text = JSON.stringify(input, null, 4).replaceAll(`"${origin}/`, `"https://${secure}/`).replace(/\n/g, "\n    ");
  const note = protocol === "https:" || tlsPort ? "" : "# fal's Python client needs https: start the server with --tls-port TLS_PORT\n";
  return `${note}# export FAL_KEY=... FAL_RUN_HOST=${secure} FAL_QUEUE_RUN_HOST=${secure}/queue
# cat "$(python -m certifi)" DATA/tls/ca.pem > trusted.pem  # for the server's own certificate, in its data folder
# export SSL_CERT_FILE="$PWD/trusted.pem"
import fal_client

result = fal_client.subscribe(
    "${endpoint}",
    ${text.replace(/"seed": "(-?\d+)"/, '"seed": $1').replace(/: true(,?)$/gm, ": True$1")},
)
print(result["video"]["url"])
`;
}

/** Seeds that JavaScript numbers cannot hold stay text. */
export function javascript(endpoint, input, origin) {
  const text = JSON.stringify(input, null, 2).replace(/\n/g, "\n  ");
  return `// export FAL_KEY=...
import { createFalClient } from "@fal-ai/client";

const fal = createFalClient({
  credentials: process.env.FAL_KEY,
  proxyUrl: { url: "${origin}/api/fal/proxy", when: "always" },
});
const { data } = await fal.subscribe("${endpoint}", {
  input: ${text},
});
console.log(data.video.url);
`;
}
