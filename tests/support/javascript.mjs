// Runs functions of examples/javascript in node, without npm packages: a task as JSON on stdin, its result as JSON on stdout.

import { webcrypto } from "node:crypto";

globalThis.crypto ??= webcrypto; // node 18
const task = JSON.parse(await new Response(process.stdin).text());
const load = (name) => import(`${task.example}/${name}.js`);

/** The result of `work`, or the message of its error if it is one for a user. */
async function orRefusal(work) {
  const { UserError } = await load("bundle");
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    return { refused: error.message };
  }
}

const TASKS = {
  async noise({ seeds, sizes }) {
    const { TorchGenerator } = await load("noise");
    const draw = (generator) => sizes.map((size) => [...generator.randn(size)]);
    return Promise.all(seeds.map((seed) => orRefusal(() => draw(new TorchGenerator(BigInt(seed))))));
  },
  async schedules({ requests }) {
    const { makeSchedule } = await load("schedule");
    const list = (made) => (made.refused ? made : { ...made, rows: made.rows.map((row) => [...row]) });
    return Promise.all(requests.map(async ([config, steps]) => list(await orRefusal(() => makeSchedule(config, steps)))));
  },
  async manifests({ texts }) {
    const { parseManifest } = await load("bundle");
    // JSON has no Infinity
    const finite = (_, value) => (typeof value === "number" && !Number.isFinite(value) ? String(value) : value);
    const read = async (text) => JSON.parse(JSON.stringify(await orRefusal(() => parseManifest(text)), finite));
    return Promise.all(texts.map(read));
  },
  async normalized({ texts }) {
    const { normalized } = await load("prompt");
    return texts.map(normalized);
  },
  async tensors({ url, path, names, parts, mostHashed }) {
    const [{ openBundle }, { openTensor }] = [await load("bundle"), await load("safetensors")];
    const read = async (name) => {
      const bundle = await openBundle(url, { mostHashed });
      const tensor = await openTensor(await bundle.open(path), name);
      const values = await Promise.all(parts.map(async (part) => [...(await tensor.values(...part))]));
      return { shape: tensor.shape, values };
    };
    return Promise.all(names.map((name) => orRefusal(() => read(name))));
  },
  async tokens({ file, texts }) {
    const { createRequire } = await import("node:module");
    const { readFileSync } = await import("node:fs");
    const { Tokenizer } = createRequire(`${task.example}/package.json`)("@huggingface/tokenizers");
    const tokenizer = new Tokenizer(JSON.parse(readFileSync(file, "utf8")), {});
    return texts.map((text) => tokenizer.encode(text).ids);
  },
};

console.log(JSON.stringify(await TASKS[task.name](task)));
