// The schedule of a checkpoint's scheduler as tables with one row for each step (docs/bundle.md#schedule).

import { UserError } from "./bundle.js";

const f32 = Math.fround;
const OFF = [false, null];

/** The schedulers that this page knows, and the values of their keys that it implements. */
const SOLVERS = {
  DPMSolverMultistepScheduler: {
    make: dpm,
    config: {
      algorithm_type: ["dpmsolver++"], solver_order: [1, 2], solver_type: ["midpoint", "heun"], final_sigmas_type: ["zero"],
      prediction_type: ["flow_prediction"], use_flow_sigmas: [true], thresholding: OFF, use_karras_sigmas: OFF,
      use_exponential_sigmas: OFF, use_beta_sigmas: OFF, use_lu_lambdas: OFF,
    },
  },
  FlowMatchEulerDiscreteScheduler: {
    make: euler,
    config: {
      stochastic_sampling: OFF, shift_terminal: [null, 0], invert_sigmas: OFF, use_dynamic_shifting: OFF, use_karras_sigmas: OFF,
      use_exponential_sigmas: OFF, use_beta_sigmas: OFF,
    },
  },
  SCMScheduler: { make: sprint, config: { prediction_type: ["trigflow"] } },
};

/**
 * The schedule of N steps: `timesteps` (N numbers), `rows` (N Float32Arrays, the sampler's 8 coefficients), `noiseScale` (the
 * factor on the first noise) and `noisy` (whether every step takes fresh noise).
 */
export function makeSchedule(config, steps) {
  const name = config._class_name;
  const solver = Object.hasOwn(SOLVERS, name) ? SOLVERS[name] : null;
  if (!solver) throw new UserError(`This page does not know the scheduler ${name}. It knows ${Object.keys(SOLVERS).join(", ")}.`);
  for (const [key, values] of Object.entries(solver.config)) {
    if (values.includes(config[key] ?? null)) continue;
    const known = values.map(String).join(" or ");
    throw new UserError(`This page does not know ${name} with ${key} = ${config[key]}. It knows ${known}.`);
  }
  return solver.make(config, steps);
}

/** As numpy.linspace: `count` values from `start` to `stop`. */
function linspace(start, stop, count) {
  const step = count > 1 ? (stop - start) / (count - 1) : 0;
  return Array.from({ length: count }, (_, i) => (i && i === count - 1 ? stop : i * step + start));
}

const shifted = (sigma, shift) => (shift * sigma) / (1 + (shift - 1) * sigma);

/** DPM-Solver++ of order 1 or 2. What diffusers computes in float32 is computed in float32, in the same order. */
function dpm(config, steps) {
  const train = config.num_train_timesteps;
  const exact = linspace(1, 1 / train, steps + 1).map((alpha) => shifted(1 - alpha, config.flow_shift)).reverse().slice(0, -1);
  const sigmas = [...exact.map(f32), 0];
  const logSnr = sigmas.map((sigma) => f32(f32(Math.log(f32(1 - sigma))) - f32(Math.log(sigma))));
  const h = exact.map((_, i) => f32(logSnr[i + 1] - logSnr[i]));
  const rows = exact.map((_, i) => {
    const alpha = f32(1 - sigmas[i + 1]);
    const gone = f32(f32(Math.exp(-h[i])) - 1);
    let [x0, previous] = [-f32(alpha * gone), 0];
    if (i > 0 && i < steps - 1 && config.solver_order === 2) {
      const slope = config.solver_type === "midpoint" ? -0.5 * f32(alpha * gone) : f32(alpha * f32(f32(gone / h[i]) + 1));
      previous = -slope * (1 / f32(h[i - 1] / h[i]));
      x0 -= previous;
    }
    return Float32Array.of(1, -sigmas[i], f32(sigmas[i + 1] / sigmas[i]), x0, previous, 0, 0, 0);
  });
  return { timesteps: exact.map((sigma) => Math.trunc(sigma * train)), rows, noiseScale: 1, noisy: false };
}

/** Euler steps. As in diffusers, the shift is applied twice to the smallest sigma. */
function euler(config, steps) {
  const { num_train_timesteps: train, shift } = config;
  const ends = [1, f32(1 / train)].map((end) => f32(f32(f32(shift) * end) / f32(1 + f32(f32(shift - 1) * end))));
  const even = linspace(ends[0] * train, ends[1] * train, steps).map((timestep) => timestep / train);
  const sigmas = [...even.map((sigma) => f32(shifted(sigma, shift))), 0];
  const rows = even.map((_, i) => {
    const ratio = sigmas[i + 1] / sigmas[i];
    return Float32Array.of(1, -sigmas[i], ratio, 1 - ratio, 0, 0, 0, 0);
  });
  return { timesteps: even.map((_, i) => f32(sigmas[i] * train)), rows, noiseScale: 1, noisy: false };
}

/** SANA-Sprint, in the variables of the denoiser. */
function sprint(config, steps) {
  const angles = steps === 2 ? [1.5708, 1.3, 0] : linspace(1.5708, 0, steps + 1);
  const points = angles.map(f32).map((angle) => {
    const [sin, cos] = [f32(Math.sin(angle)), f32(Math.cos(angle))];
    const s = f32(sin / f32(cos + sin));
    return { sin, cos, s, n: Math.sqrt(s * s + (1 - s) * (1 - s)) };
  });
  const rows = points.slice(0, -1).map(({ sin, cos, s, n }, i) => {
    const after = points[i + 1];
    const [x0Latents, x0NoisePred] = [(cos - sin * (1 - 2 * s)) / n, (-sin * (1 - 2 * s + 2 * s * s)) / n];
    return Float32Array.of(x0Latents, x0NoisePred, 0, after.n * after.cos, 0, 0, 0, after.n * after.sin);
  });
  return { timesteps: points.slice(0, -1).map(({ s }) => s), rows, noiseScale: points[0].n, noisy: steps > 1 };
}
