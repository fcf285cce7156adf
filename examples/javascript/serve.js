// A small static server for the page and one bundle: node serve.js BUNDLE [PORT]

import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { dirname, extname, join } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm" };
/** With the first two, pages may use threads. */
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp",
  "Accept-Ranges": "bytes", "Cache-Control": "no-cache",
};

const [bundle, port = "8000"] = process.argv.slice(2);
const fail = (message, code) => {
  console.error(message);
  process.exit(code);
};
if (!bundle) fail("usage: node serve.js BUNDLE [PORT]", 2);
if (!existsSync(join(bundle, "manifest.json"))) {
  fail(`${bundle} is not a bundle: it has no manifest.json. Make one: sana-export export tiny -o ${bundle}`, 2);
}
const page = dirname(fileURLToPath(import.meta.url));

/** The file of a request: bundle/... from the bundle, everything else from this folder. Null if there is none. */
function find(target) {
  let path;
  try {
    path = decodeURIComponent(new URL(target, "http://localhost").pathname);
  } catch {
    return null;
  }
  if (path.split(/[/\\]/).includes("..")) return null;
  const [folder, rest] = path.startsWith("/bundle/") ? [bundle, path.slice("/bundle/".length)] : [page, path];
  const file = join(folder, rest === "/" ? "index.html" : rest);
  return existsSync(file) && statSync(file).isFile() ? file : null;
}

const server = createServer((request, response) => {
  const file = find(request.url);
  if (!file) return response.writeHead(404, HEADERS).end("not found");
  const { size } = statSync(file);
  const [, first, last] = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? "") ?? [];
  const [start, end] = [Number(first ?? 0), Math.min(last ? Number(last) : Infinity, size - 1)];
  if (first !== undefined && start > end) return response.writeHead(416, { ...HEADERS, "Content-Range": `bytes */${size}` }).end();
  const range = first === undefined ? {} : { "Content-Range": `bytes ${start}-${end}/${size}` };
  const type = TYPES[extname(file)] ?? "application/octet-stream";
  const headers = { ...HEADERS, ...range, "Content-Type": type, "Content-Length": end - start + 1 };
  response.writeHead(first === undefined ? 200 : 206, headers);
  if (request.method === "HEAD" || !size) return response.end();
  createReadStream(file, { start, end }).on("error", () => response.destroy()).pipe(response);
});
server.on("error", (error) => {
  const taken = `port ${port} is taken. Take another one: node serve.js ${bundle} ${Number(port) + 1}`;
  fail(error.code === "EADDRINUSE" ? taken : error.message, 3);
});
server.listen(Number(port), "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}/`));
