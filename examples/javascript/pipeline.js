// Prompt to pixels with the graphs of a bundle (docs/bundle.md#sampling).

import { UserError } from "./bundle.js";
import { TorchGenerator } from "./noise.js";
import { openText } from "./prompt.js";
import { makeSchedule } from "./schedule.js";

const GRAPHS = ["text_encoder", "context", "denoiser", "sampler", "vae_decoder", "postprocess"];

/** Loads what sampling needs. `ort` is onnxruntime-web, `provider` the name of its execution provider. */
export async function openPipeline(bundle, ort, Tokenizer, provider) {
  const { model } = bundle.manifest;
  makeSchedule(model.scheduler, model.default_steps); // refuses a scheduler before anything is loaded
  if (bundle.graph("denoiser").spec.inputs.some(({ name }) => name === "residuals")) {
    throw new UserError("This page cannot draw with a bundle that has a ControlNet. Export the bundle without --controlnet.");
  }
  const text = await openText(bundle, Tokenizer);
  const graphs = {};
  // ONNX Runtime rounds the activations before 4-bit weights to 8 bits otherwise.
  const extra = { session: { qdq_matmulnbits_accuracy_level: "1" } };
  for (const name of GRAPHS) {
    const { spec, onnx, data } = bundle.graph(name);
    const file = await bundle.read(onnx);
    const externalData = [];
    for (const entry of data) externalData.push({ path: entry.path.split("/").pop(), data: await bundle.read(entry) });
    graphs[name] = { spec, session: await ort.InferenceSession.create(file, { executionProviders: [provider], externalData, extra }) };
  }
  return new Pipeline(model, text, graphs, ort);
}

class Pipeline {
  constructor(model, text, graphs, ort) {
    Object.assign(this, { model, text, graphs });
    this.float = (values, ...shape) => new ort.Tensor("float32", Float32Array.from(values), shape);
    this.integer = (values, ...shape) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  }

  /**
   * Draws one image of the native size. `onStage(text)` is called before each stage and each step, and may return a promise.
   * Returns `pixels` (RGB bytes), `side`, `cut` (how many tokens of a prompt were left out) and `times` (milliseconds by stage).
   */
  async draw({ prompt, negativePrompt = "", steps, guidance, seed }, onStage) {
    const { model, float } = this;
    const schedule = makeSchedule(model.scheduler, steps);
    const generator = new TorchGenerator(seed);
    const times = {};
    const timed = async (stage, work, text = stage) => {
      await onStage(text);
      const start = performance.now();
      const result = await work();
      times[stage] = (times[stage] ?? 0) + performance.now() - start;
      return result;
    };
    // With guidance the denoiser runs two branches; a checkpoint with embedded guidance (SANA-Sprint) has one.
    const guided = !model.guidance_embeds && guidance > 1;
    const conditional = this.text.tokenize(prompt, model.instruction);
    const prompts = guided ? [this.text.tokenize(negativePrompt, ""), conditional] : [conditional];
    const weights = float(guided ? [1 - guidance, guidance] : [1], prompts.length);
    const fixed = {
      ...(await timed("text encoder", () => this.encode(prompts))),
      perturbed: float(prompts.map(() => 0), prompts.length),
      source: this.integer(prompts.keys(), prompts.length),
      guidance: float([guidance], 1),
    };
    const shape = [1, model.latent_channels, model.sample_size, model.sample_size];
    const size = model.latent_channels * model.sample_size ** 2;
    let latents = float(generator.randn(size).map((value) => value * schedule.noiseScale), ...shape);
    let noise = float(new Float32Array(size), ...shape);
    let history = [noise, noise, noise];
    const step = async (i) => {
      const timestep = float([schedule.timesteps[i] * model.timestep_scale], 1);
      const { noise_pred } = await this.run("denoiser", { latents, timestep, ...fixed });
      if (schedule.noisy) noise = float(generator.randn(size), ...shape);
      const [previous_x0, previous_x0_2, previous_x0_3] = history;
      const coefficients = float(schedule.rows[i], 8);
      const feeds = { noise_pred, latents, previous_x0, previous_x0_2, previous_x0_3, noise, coefficients, weights };
      const { next_latents, x0 } = await this.run("sampler", feeds);
      [latents, history] = [next_latents, [x0, previous_x0, previous_x0_2]];
    };
    for (let i = 0; i < schedule.rows.length; i++) await timed("denoiser", () => step(i), `step ${i + 1} of ${steps}`);
    const pixels = await timed("decoder", async () => {
      const { image } = await this.run("vae_decoder", { latents });
      if (!image.data.every(Number.isFinite)) throw new UserError("The image has values that are not finite. Try an fp32 bundle.");
      return (await this.run("postprocess", { image, ...this.unresized(image.dims) })).pixels;
    });
    return { pixels: pixels.data, side: pixels.dims[1], cut: Math.max(...prompts.map(({ cut }) => cut)), times };
  }

  /** The denoiser's `context` and `context_mask` for one prompt in each branch. */
  async encode(prompts) {
    const channels = this.model.text_channels;
    const kept = prompts.map(({ ids, firstKept }) => 1 + Math.max(ids.length - firstKept, 0));
    const longest = Math.max(...kept);
    const embeds = new Float32Array(prompts.length * longest * channels);
    const mask = new Float32Array(prompts.length * longest);
    for (const [branch, { ids, firstKept, shared }] of prompts.entries()) {
      const first = branch * longest;
      mask.fill(1, first, first + kept[branch]);
      embeds.set(this.text.bosRow, first * channels);
      if (kept[branch] === 1) continue; // BOS alone
      const inputs_embeds = this.float(await this.text.embed(ids.slice(shared)), 1, ids.length - shared, channels);
      const prefix = this.float(...this.text.prefixOf(shared));
      const { prompt_embeds } = await this.run("text_encoder", { inputs_embeds, prefix });
      embeds.set(prompt_embeds.data.subarray((firstKept - shared) * channels), (first + 1) * channels);
    }
    const { context } = await this.run("context", { prompt_embeds: this.float(embeds, prompts.length, 1, longest, channels) });
    return { context, context_mask: this.float(mask, prompts.length, 1, longest) };
  }

  /** The inputs of `postprocess` that keep an image [1, 3, H, W] as large as it is. */
  unresized([, , height, width]) {
    const index = (side) => this.integer(Array.from({ length: 2 * side }, (_, i) => i % side), 2, side);
    const weight = (side) => this.float(Array.from({ length: 2 * side }, (_, i) => Number(i < side)), 2, side);
    return { row_index: index(height), row_weight: weight(height), column_index: index(width), column_weight: weight(width) };
  }

  /** Runs a graph with those of `feeds` that are its inputs. */
  async run(name, feeds) {
    const { session, spec } = this.graphs[name];
    return session.run(Object.fromEntries(spec.inputs.map((input) => [input.name, feeds[input.name]])));
  }
}
