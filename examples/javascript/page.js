// The page: loads a bundle once, then draws whenever the button is pressed. `?bundle=URL` names another bundle than bundle/,
// `?provider=webgpu` runs the graphs on the GPU.

import { UserError, openBundle } from "./bundle.js";
import { openPipeline } from "./pipeline.js";

const query = new URLSearchParams(location.search);
const provider = query.get("provider") === "webgpu" ? "webgpu" : "wasm";
const [form, button, canvas, table] = ["form", "button", "canvas", "table"].map((name) => document.querySelector(name));
const [status, error] = ["status", "error"].map((id) => document.getElementById(id));

/** Shows what is being done, and lets the browser paint it. */
async function show(text) {
  status.textContent = text;
  await new Promise((done) => setTimeout(done));
}

/** Runs `work` with the button off, and shows its error. */
async function guarded(work) {
  button.disabled = true;
  error.hidden = true;
  try {
    await work();
  } catch (reason) {
    error.textContent = reason instanceof UserError ? reason.message : `Something unexpected failed: ${reason.message ?? reason}`;
    error.hidden = false;
    status.textContent = "";
    console.error(reason);
  }
  button.disabled = !pipeline;
}

async function packages() {
  try {
    return [await import(`onnxruntime-web/${provider}`), await import("@huggingface/tokenizers")];
  } catch (reason) {
    throw new UserError(`The npm packages are missing (${reason.message}). In examples/javascript: npm install`);
  }
}

let pipeline;
guarded(async () => {
  const start = performance.now();
  const [ort, { Tokenizer }] = await packages();
  const onFile = ({ path, bytes }) => show(`Loading ${path} (${(bytes / 1e6).toFixed(1)} MB)`);
  const bundle = await openBundle(query.get("bundle") ?? "bundle/", { onFile });
  pipeline = await openPipeline(bundle, ort, Tokenizer, provider);
  const { model, checkpoint, options } = bundle.manifest;
  form.steps.value = model.default_steps;
  form.guidance.value = model.default_guidance_scale;
  form.negativePrompt.disabled = model.guidance_embeds ?? false;
  await show(`${checkpoint.source}, ${options.precision}, loaded in ${((performance.now() - start) / 1000).toFixed(1)} s.`);
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(async () => {
    const { prompt, negativePrompt, steps, guidance, seed } = Object.fromEntries(new FormData(form));
    const request = { prompt, negativePrompt, steps: Number(steps), guidance: Number(guidance), seed: BigInt(seed) };
    const { pixels, side, cut, times } = await pipeline.draw(request, show);
    canvas.width = canvas.height = side;
    const image = new ImageData(side, side);
    for (let i = 0; i < side * side; i++) image.data.set([...pixels.subarray(3 * i, 3 * i + 3), 255], 4 * i);
    canvas.getContext("2d").putImageData(image, 0, 0);
    table.replaceChildren();
    for (const [stage, ms] of Object.entries({ ...times, total: Object.values(times).reduce((sum, ms) => sum + ms) })) {
      const row = table.insertRow();
      for (const cell of [stage, `${ms.toFixed(0)} ms`]) row.insertCell().textContent = cell;
    }
    await show(cut ? `Done. The prompt is too long by ${cut} tokens: its end was left out.` : "Done.");
  });
});
