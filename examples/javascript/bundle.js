// A bundle's manifest and files, checked before they are used (docs/bundle.md).

/** The manifests that this page reads. */
const FORMAT = 3;
const SERIES = "0.1";
/** Larger files are read in parts, whose hash cannot be checked. */
const MOST_HASHED = 64 << 20;

/** An error whose message is for the person at the page. */
export class UserError extends Error {}

/** The bundle at `url`. Throws UserError for what is missing, damaged or of another version. */
export async function openBundle(url, options = {}) {
  const bundle = new Bundle(url, options);
  const text = new TextDecoder().decode(await bundle.fetch("manifest.json"));
  bundle.manifest = await parseManifest(text);
  return bundle;
}

class Bundle {
  constructor(url, { mostHashed = MOST_HASHED, onFile = () => {} }) {
    this.url = new URL(url.endsWith("/") ? url : `${url}/`, globalThis.document?.baseURI);
    this.mostHashed = mostHashed;
    this.onFile = onFile;
  }

  /** The entry of a graph. */
  graph(name) {
    const entry = this.manifest.graphs[name];
    if (!entry) throw new UserError(`The bundle has no graph ${name}. Export it again with its default graphs.`);
    return entry;
  }

  /** The whole file of a file entry, checked. */
  async read(entry) {
    await this.onFile(entry);
    const bytes = await this.fetch(entry.path);
    if (bytes.length !== entry.bytes) throw damaged(entry, `it has ${bytes.length} bytes instead of ${entry.bytes}`);
    if ((await sha256(bytes)) !== entry.sha256) throw damaged(entry, "its SHA-256 is not the one in the manifest");
    return bytes;
  }

  /** A function that reads the bytes from `start` up to `stop` of `files` with this path. */
  async open(path) {
    const entry = this.manifest.files.find((file) => file.path === path);
    if (!entry) throw new UserError(`The manifest has no ${path}. Export the bundle again.`);
    if (entry.bytes <= this.mostHashed) {
      const whole = await this.read(entry);
      return async (start, stop) => whole.slice(start, stop);
    }
    return async (start, stop) => {
      const bytes = await this.fetch(path, { start, stop, total: entry.bytes });
      if (bytes.length !== stop - start) throw damaged(entry, `it has no bytes ${start} to ${stop}`);
      return bytes;
    };
  }

  async fetch(path, range) {
    const url = new URL(path.split("/").map(encodeURIComponent).join("/"), this.url);
    const headers = range ? { Range: `bytes=${range.start}-${range.stop - 1}` } : {};
    const unreachable = (error) => {
      throw new UserError(`${url} cannot be reached (${error.message}). Is the server running?`);
    };
    const response = await fetch(url, { headers }).catch(unreachable);
    if (!response.ok) throw new UserError(`The bundle has no ${path}: ${url} answers ${response.status} ${response.statusText}.`);
    if (range && response.headers.get("Content-Range")?.split("/")[1] !== String(range.total)) {
      throw new UserError(`${url} has another size than in the manifest, or its server knows no Range.`);
    }
    return new Uint8Array(await response.arrayBuffer().catch(unreachable));
  }
}

const damaged = (entry, why) => new UserError(`${entry.path} is damaged: ${why}. Copy or export the bundle again.`);

async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) throw new UserError("Browsers check hashes only on https and on localhost. Open the page there.");
  const digest = await crypto.subtle.digest("SHA-256", bytes);
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The manifest in `text`. Throws UserError if it is damaged, of another version, or names files outside the bundle. */
export async function parseManifest(text) {
  let marked;
  try {
    marked = JSON.parse(withMarkedNumbers(text));
  } catch (error) {
    throw new UserError(`manifest.json is damaged: ${error.message}. Is this the folder of a bundle?`);
  }
  const { sha256: seal, ...sealed } = marked ?? {};
  const manifest = unmarked(sealed);
  const again = `Export it again: sana-export export ${manifest.checkpoint?.source ?? "tiny"}`;
  if (manifest.format !== FORMAT || !String(manifest.tool_version).startsWith(`${SERIES}.`)) {
    const found = `format ${manifest.format} of sana-export ${manifest.tool_version}`;
    throw new UserError(`The bundle has ${found}; this page reads format ${FORMAT} of sana-export ${SERIES}. ${again}`);
  }
  if ((await sha256(new TextEncoder().encode(canonical(sealed)))) !== seal) {
    throw new UserError(`manifest.json was changed after it was written: its seal is wrong. ${again}`);
  }
  const graphs = Object.values(manifest.graphs);
  for (const { path } of [...manifest.files, ...graphs.flatMap(({ onnx, data }) => [onnx, ...data])]) {
    if (/[\\:]/.test(path) || path.split("/").some((part) => ["", ".", ".."].includes(part))) {
      throw new UserError(`manifest.json names a file outside the bundle: ${path}`);
    }
  }
  if (manifest.options.precision === "bf16") {
    throw new UserError("ONNX Runtime has no bfloat16 in the browser. Export the bundle with --dtype fp16 or fp32.");
  }
  return manifest;
}

/** In place of every number its text, marked: the seal keeps it as it is, and JavaScript's JSON knows no Infinity. */
const MARK = "\u0000";
const withMarkedNumbers = (text) =>
  text.replace(/("(?:[^"\\]|\\.)*")|(-?Infinity|NaN|-?\d[\d.eE+-]*)/g, (_, string, number) => string ?? `"\\u0000${number}"`);

function unmarked(value) {
  if (typeof value === "string") return value[0] === MARK ? Number(value.slice(1)) : value;
  if (Array.isArray(value)) return value.map(unmarked);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, unmarked(item)]));
}

/** The text that is hashed for the seal. */
function canonical(value) {
  if (typeof value === "string" && value[0] === MARK) return value.slice(1);
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const keys = Object.keys(value).sort();
  return `{${keys.map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`).join(",")}}`;
}
