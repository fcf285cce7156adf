// Standard normal noise as torch.randn draws it with a CPU generator (docs/bundle.md#noise): the same seed gives the same image.

import { UserError } from "./bundle.js";

const f32 = Math.fround;
/** torch draws fewer values than this one at a time. */
const BLOCK = 16;

/** The random stream of `torch.Generator("cpu").manual_seed(seed)`; `seed` is a BigInt from -2**63 to 2**64 - 1. */
export class TorchGenerator {
  #state = new Uint32Array(624);
  #at = 624;
  #kept = null;

  constructor(seed) {
    if (seed < -(2n ** 63n) || seed >= 2n ** 64n) throw new UserError("The seed must be from -2**63 to 2**64 - 1.");
    const state = this.#state;
    state[0] = Number(BigInt.asUintN(32, seed));
    for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  }

  /** `size` values as a Float32Array, within 1e-6 of torch's. Successive calls continue the stream. */
  randn(size) {
    if (size < BLOCK) return Float32Array.from({ length: size }, () => this.#one());
    const values = Float32Array.from({ length: size }, () => this.#uniform());
    for (let start = 0; start + BLOCK <= size; start += BLOCK) boxMuller(values.subarray(start, start + BLOCK));
    if (size % BLOCK) {
      const last = values.subarray(size - BLOCK); // drawn again, the finished ones too
      last.forEach((_, i) => (last[i] = this.#uniform()));
      boxMuller(last);
    }
    return values;
  }

  /** The next 32 bits of the Mersenne Twister mt19937. */
  #word() {
    const state = this.#state;
    if (this.#at === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.#at = 0;
    }
    let word = state[this.#at++];
    word ^= word >>> 11;
    word ^= (word << 7) & 0x9d2c5680;
    word ^= (word << 15) & 0xefc60000;
    return (word ^ (word >>> 18)) >>> 0;
  }

  /** A uniform in [0, 1) from 24 bits. */
  #uniform() {
    return (this.#word() & 0xffffff) * 2 ** -24;
  }

  /** A uniform in [0, 1) from 53 bits. */
  #uniform53() {
    const high = this.#word() & 0x1fffff;
    return (high * 2 ** 32 + this.#word()) * 2 ** -53;
  }

  /** One value by Box-Muller in float64. Every second value is the one kept from the call before. */
  #one() {
    const kept = this.#kept;
    this.#kept = null;
    if (kept !== null) return kept;
    const angle = 2 * Math.PI * this.#uniform53();
    const radius = Math.sqrt(-2 * Math.log1p(-this.#uniform53()));
    this.#kept = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }
}

/** Box-Muller in place: 8 uniforms for radii and 8 for angles become 8 cosines and 8 sines. */
function boxMuller(block) {
  for (let i = 0; i < BLOCK / 2; i++) {
    const radius = Math.sqrt(-2 * Math.log(f32(1 - block[i])));
    const angle = f32(f32(2 * Math.PI) * block[i + 8]);
    block[i] = radius * Math.cos(angle);
    block[i + 8] = radius * Math.sin(angle);
  }
}
