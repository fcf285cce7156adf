// A small static server for the page and one bundle: node serve.js BUNDLE [PORT]

import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { dirname, extname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".json": "application/json", ".wasm": "application/wasm" };
/** With the first two, pages may use threads. */
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp",
  "Accept-Ranges": "bytes", "Cache-Control": "no-cache",
};

const [bundle, port = "8000"] = process.argv.slice(2);
if (!bundle || !existsSync(join(bundle, "manifest.json"))) {
  console.error(bundle ? `${bundle} is not a bundle: it has no manifest.json. Make one: sana-export export tiny -o ${bundle}` : "usage: node serve.js BUNDLE [PORT]");
  process.exit(2);
}
const page = dirname(fileURLToPath(import.meta.url));

/** The file of a request's path: bundle/... from the bundle, everything else from this folder. Null if there is none. */
function find(encoded) {
  let path;
  try {
    path = decodeURIComponent(encoded);
  } catch {
    return null;
  }
  const [folder, rest] = path.startsWith("/bundle/") ? [bundle, path.slice("/bundle/".length)] : [page, path.slice(1) || "index.html"];
  if (rest.split(/[/\\]/).includes("..")) return null;
  const file = resolve(folder, rest);
  return existsSync(file) && statSync(file).isFile() ? file : null;
}

const server = createServer((request, response) => {
  const file = find(new URL(request.url, "http://localhost").pathname);
  if (!file) return response.writeHead(404, HEADERS).end("not found");
  const { size } = statSync(file);
  const [, first, last] = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? "") ?? [];
  const [start, end] = [Number(first ?? 0), Math.min(last ? Number(last) : Infinity, size - 1)];
  if (first !== undefined && start > end) return response.writeHead(416, { ...HEADERS, "Content-Range": `bytes */${size}` }).end();
  const range = first === undefined ? {} : { "Content-Range": `bytes ${start}-${end}/${size}` };
  const type = TYPES[extname(file)] ?? "application/octet-stream";
  response.writeHead(first === undefined ? 200 : 206, { ...HEADERS, ...range, "Content-Type": type, "Content-Length": end - start + 1 });
  if (request.method === "HEAD" || !size) return response.end();
  createReadStream(file, { start, end }).pipe(response);
});
server.on("error", (error) => {
  console.error(error.code === "EADDRINUSE" ? `port ${port} is taken; another one: node serve.js ${bundle} ${Number(port) + 1}` : error.message);
  process.exit(1);
});
server.listen(Number(port), "127.0.0.1", () => console.log(`http://localhost:${server.address().port}/`));
