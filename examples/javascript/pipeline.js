// Prompt to pixels with the graphs of a bundle (docs/bundle.md#sampling).

import { BundleError } from "./bundle.js";
import { TorchGenerator } from "./noise.js";
import { openText } from "./prompt.js";
import { makeSchedule } from "./schedule.js";

const GRAPHS = ["text_encoder", "context", "denoiser", "sampler", "vae_decoder", "postprocess"];

/** Loads what sampling needs. `ort` is onnxruntime-web, `provider` its execution provider. */
export async function openPipeline(bundle, ort, Tokenizer, provider = "wasm") {
  makeSchedule(bundle.manifest.model.scheduler, bundle.manifest.model.default_steps); // refuses a scheduler before anything is loaded
  const text = await openText(bundle, Tokenizer);
  const sessions = {};
  for (const name of GRAPHS) sessions[name] = await openSession(bundle, name, ort, provider);
  return new Pipeline(bundle.manifest.model, text, sessions, ort);
}

async function openSession(bundle, name, ort, provider) {
  const { spec, onnx, data } = bundle.graph(name);
  const model = await bundle.read(onnx);
  const externalData = [];
  for (const entry of data) externalData.push({ path: entry.path.split("/").pop(), data: await bundle.read(entry) });
  const session = await ort.InferenceSession.create(model, { executionProviders: [provider], externalData });
  return { session, spec };
}

class Pipeline {
  constructor(model, text, sessions, ort) {
    Object.assign(this, { model, text, sessions, ort });
  }

  /**
   * Draws one image of the native size. `onStage(name)` is called before each stage, and may return a promise.
   * Returns `pixels` (RGB bytes), `side`, `cut` (tokens that the prompts were too long by) and `times` (milliseconds by stage).
   */
  async draw({ prompt, negativePrompt = "", steps, guidance, seed }, onStage = () => {}) {
    const { model } = this;
    const schedule = makeSchedule(model.scheduler, steps);
    const times = {};
    const stage = async (name, work) => {
      await onStage(name);
      const start = performance.now();
      const result = await work();
      times[name] = (times[name] ?? 0) + performance.now() - start;
      return result;
    };
    const conditional = this.text.tokenize(prompt, model.instruction);
    const guided = !model.guidance_embeds && guidance > 1;
    const prompts = guided ? [this.text.tokenize(negativePrompt, ""), conditional] : [conditional];
    const weights = guided ? [1 - guidance, guidance] : [1];
    const fixed = await stage("text encoder", () => this.encode(prompts));
    Object.assign(fixed, this.float("perturbed", weights.map(() => 0), [weights.length]), this.float("guidance", [guidance], [1]));
    fixed.source = new this.ort.Tensor("int64", BigInt64Array.from(weights, (_, i) => BigInt(i)), [weights.length]);

    const shape = [1, model.latent_channels, model.sample_size, model.sample_size];
    const size = shape.reduce((product, side) => product * side, 1);
    const generator = new TorchGenerator(seed);
    const zeros = new this.ort.Tensor("float32", new Float32Array(size), shape);
    let { latents } = this.float("latents", generator.randn(size).map((value) => value * schedule.noiseScale), shape);
    let history = [zeros, zeros, zeros];
    for (const [i, row] of schedule.rows.entries()) {
      const [next, x0] = await stage(`denoiser, ${steps} step${steps > 1 ? "s" : ""}`, async () => {
        const timestep = this.float("timestep", [schedule.timesteps[i] * model.timestep_scale], [1]);
        const { noise_pred } = await this.run("denoiser", { latents, ...timestep, ...fixed });
        const sampled = await this.run("sampler", {
          noise_pred, latents, previous_x0: history[0], previous_x0_2: history[1], previous_x0_3: history[2],
          noise: schedule.noisy ? this.float("noise", generator.randn(size), shape).noise : zeros,
          ...this.float("coefficients", row, [8]), ...this.float("weights", weights, [weights.length]),
        });
        return [sampled.next_latents, sampled.x0];
      });
      [latents, history] = [next, [x0, history[0], history[1]]];
    }

    const pixels = await stage("decoder", async () => {
      const { image } = await this.run("vae_decoder", { latents });
      if (!image.data.every(Number.isFinite)) throw new BundleError("Drawing gave values that are not finite.");
      return (await this.run("postprocess", { image, ...this.unresized(image.dims) })).pixels;
    });
    return { pixels: pixels.data, side: pixels.dims[1], cut: Math.max(...prompts.map(({ cut }) => cut)), times };
  }

  /** The denoiser's `context` and `context_mask` for one prompt in each branch. */
  async encode(prompts) {
    const channels = this.model.text_channels;
    const kept = prompts.map(({ ids, firstKept }) => 1 + Math.max(ids.length - firstKept, 0));
    const longest = Math.max(...kept);
    const [embeds, mask] = [new Float32Array(prompts.length * longest * channels), new Float32Array(prompts.length * longest)];
    for (const [branch, { ids, firstKept, shared }] of prompts.entries()) {
      const first = branch * longest;
      mask.fill(1, first, first + kept[branch]);
      embeds.set(this.text.bosRow, first * channels);
      if (kept[branch] === 1) continue; // BOS alone
      const [rows, prefix] = [await this.text.embed(ids.slice(shared)), this.text.prefixOf(shared)];
      const { prompt_embeds } = await this.run("text_encoder", {
        ...this.float("inputs_embeds", rows.values, rows.shape), ...this.float("prefix", prefix.values, prefix.shape),
      });
      embeds.set(prompt_embeds.data.subarray((firstKept - shared) * channels), (first + 1) * channels);
    }
    const { context } = await this.run("context", this.float("prompt_embeds", embeds, [prompts.length, 1, longest, channels]));
    return { context, ...this.float("context_mask", mask, [prompts.length, 1, longest]) };
  }

  /** The inputs of `postprocess` that keep an image [1, 3, H, W] as large as it is. */
  unresized([, , height, width]) {
    const axis = (name, side) => {
      const index = BigInt64Array.from({ length: 2 * side }, (_, i) => BigInt(i % side));
      const weight = Float32Array.from({ length: 2 * side }, (_, i) => (i < side ? 1 : 0));
      const { Tensor } = this.ort;
      return { [`${name}_index`]: new Tensor("int64", index, [2, side]), [`${name}_weight`]: new Tensor("float32", weight, [2, side]) };
    };
    return { ...axis("row", height), ...axis("column", width) };
  }

  float(name, values, shape) {
    return { [name]: new this.ort.Tensor("float32", Float32Array.from(values), shape) };
  }

  /** Runs a graph with those of `feeds` that it has as inputs. */
  async run(name, feeds) {
    const { session, spec } = this.sessions[name];
    const inputs = {};
    for (const input of spec.inputs) {
      if (!feeds[input.name]) throw new BundleError(`This page has no input ${input.name} for the graph ${name} (for a ControlNet?).`);
      inputs[input.name] = feeds[input.name];
    }
    return session.run(inputs);
  }
}
