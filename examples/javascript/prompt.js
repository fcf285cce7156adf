// Text to the text encoder's inputs (docs/bundle.md#sampling, steps 1 to 3).

import { BundleError } from "./bundle.js";
import { openTensor } from "./safetensors.js";

/** What Python's str.strip removes. JavaScript's trim has another list. */
const SPACES = "[\\t-\\r\\x1c- \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
const ENDS = new RegExp(`^${SPACES}|${SPACES}$`, "g");

/** The text files of a bundle. `Tokenizer` is that of @huggingface/tokenizers. */
export async function openText(bundle, Tokenizer) {
  const tokenizerFile = await bundle.open("tokenizer/tokenizer.json");
  const tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(await tokenizerFile(0, Infinity))), {});
  const instruction = await bundle.open("instruction.safetensors");
  const [tokenIds, prefix, bosRow] = await Promise.all(
    ["token_ids", "prefix", "bos_row"].map((name) => openTensor(instruction, name)),
  );
  const table = await openTensor(await bundle.open("embeddings.safetensors"), "embed_tokens.weight");
  const text = new Text(bundle.manifest.model, tokenizer, table);
  text.tokenIds = await tokenIds.values();
  text.prefixShape = prefix.shape;
  text.prefix = await prefix.values();
  text.bosRow = await bosRow.values();
  if (String(tokenizer.encode(text.instruction).ids) !== String(text.tokenIds)) {
    throw new BundleError("The bundle's tokenizer does not belong to its instruction. Export the bundle again.");
  }
  return text;
}

class Text {
  constructor({ instruction, max_sequence_length }, tokenizer, table) {
    Object.assign(this, { instruction, maxRows: max_sequence_length, tokenizer, table });
    this.rows = new Map();
  }

  /** A prompt as the text encoder reads it: `ids`, the first kept row, how many ids are the instruction's, and how many were cut. */
  tokenize(prompt, instruction) {
    const all = this.tokenizer.encode(instruction + prompt.toLowerCase().replace(ENDS, "")).ids;
    const firstKept = instruction ? this.tokenIds.length - 1 : 1;
    const ids = all.slice(0, firstKept + this.maxRows - 1);
    const differs = ids.findIndex((id, i) => id !== this.tokenIds[i]);
    const shared = Math.min(differs < 0 ? ids.length : differs, firstKept);
    return { ids, firstKept, shared, cut: all.length - ids.length };
  }

  /** The embedding rows [ids, C] of tokens, each read once. */
  async embed(ids) {
    const channels = this.table.shape[1];
    for (const id of ids) if (!this.rows.has(id)) this.rows.set(id, this.table.values(id * channels, channels));
    const rows = await Promise.all(ids.map((id) => this.rows.get(id)));
    const values = new Float32Array(ids.length * channels);
    rows.forEach((row, i) => values.set(row, i * channels));
    return { values, shape: [1, ids.length, channels] };
  }

  /** The instruction's keys and values [layers, 2, heads, shared, dim] of its first tokens. */
  prefixOf(shared) {
    const [layers, two, heads, tokens, dim] = this.prefixShape;
    const count = layers * two * heads;
    const values = new Float32Array(count * shared * dim);
    for (let i = 0; i < count; i++) {
      values.set(this.prefix.subarray(i * tokens * dim, (i * tokens + shared) * dim), i * shared * dim);
    }
    return { values, shape: [layers, two, heads, shared, dim] };
  }
}
