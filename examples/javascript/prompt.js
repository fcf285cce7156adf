// Text to the inputs of the text encoder (docs/bundle.md#sampling, steps 1 to 3).

import { UserError } from "./bundle.js";
import { openTensor } from "./safetensors.js";

/** What Python's str.strip removes. JavaScript's trim has another list. */
const SPACES = "[\\t-\\r\\x1c- \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
const ENDS = new RegExp(`^${SPACES}|${SPACES}$`, "g");

/** A prompt as it is tokenized. */
export const normalized = (prompt) => prompt.toLowerCase().replace(ENDS, "");

/** The text files of a bundle. `Tokenizer` is that of @huggingface/tokenizers. */
export async function openText(bundle, Tokenizer) {
  const { instruction, max_sequence_length: maxRows } = bundle.manifest.model;
  const read = await bundle.open("tokenizer/tokenizer.json");
  const tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(await read(0, Infinity))), {});
  const stored = await bundle.open("instruction.safetensors");
  const [tokenIds, prefix, bosRow] = await Promise.all(["token_ids", "prefix", "bos_row"].map((name) => openTensor(stored, name)));
  const embeddings = await bundle.open("embeddings.safetensors");
  const table = await openTensor(embeddings, "embed_tokens.weight");
  const scales = table.dtype === "I8" ? await openTensor(embeddings, "embed_tokens.scale") : null;
  const ids = await tokenIds.values();
  if (String(tokenizer.encode(instruction).ids) !== String(ids)) {
    throw new UserError("The bundle's tokenizer does not belong to its instruction. Export the bundle again.");
  }
  const [prefixValues, bosValues] = [await prefix.values(), await bosRow.values()];
  return new Text({ maxRows, tokenizer, tokenIds: ids, table, scales, prefixShape: prefix.shape, prefixValues, bosRow: bosValues });
}

class Text {
  rows = new Map();

  constructor(parts) {
    Object.assign(this, parts);
  }

  /** `ids` of a prompt, the first one that is kept, how many lead that are the instruction's, and how many were cut at the end. */
  tokenize(prompt, instruction) {
    const all = this.tokenizer.encode(instruction + normalized(prompt)).ids;
    const firstKept = instruction ? this.tokenIds.length - 1 : 1;
    const ids = all.slice(0, firstKept + this.maxRows - 1);
    const differs = ids.findIndex((id, i) => id !== this.tokenIds[i]);
    const shared = Math.min(differs < 0 ? ids.length : differs, firstKept);
    return { ids, firstKept, shared, cut: all.length - ids.length };
  }

  /** The rows [ids, C] of the embedding table. Each is read once. */
  async embed(ids) {
    const channels = this.table.shape[1];
    for (const id of ids) if (!this.rows.has(id)) this.rows.set(id, this.row(id, channels));
    const values = new Float32Array(ids.length * channels);
    for (const [i, id] of ids.entries()) values.set(await this.rows.get(id), i * channels);
    return values;
  }

  /** One row. A quantized one is integers, and a number to multiply them with. */
  async row(id, channels) {
    const values = await this.table.values(id * channels, channels);
    const [scale] = this.scales ? await this.scales.values(id, 1) : [1];
    return values.map((value) => value * scale);
  }

  /** The instruction's keys and values for its first `shared` tokens, and their shape [layers, 2, heads, shared, dim]. */
  prefixOf(shared) {
    const [layers, two, heads, tokens, dim] = this.prefixShape;
    const values = new Float32Array(layers * two * heads * shared * dim);
    for (let i = 0; i < layers * two * heads; i++) {
      values.set(this.prefixValues.subarray(i * tokens * dim, (i * tokens + shared) * dim), i * shared * dim);
    }
    return [values, layers, two, heads, shared, dim];
  }
}
