// A reader of safetensors files that reads only the bytes that are asked for.

import { UserError } from "./bundle.js";

/** Bytes to numbers, for each dtype of a bundle's text files. */
const DTYPES = {
  F32: [4, (bytes) => new Float32Array(bytes.buffer)],
  F16: [2, (bytes) => Float32Array.from(new Uint16Array(bytes.buffer), fromHalf)],
  BF16: [2, (bytes) => new Float32Array(Uint32Array.from(new Uint16Array(bytes.buffer), (bits) => bits << 16).buffer)],
  I8: [1, (bytes) => Float32Array.from(new Int8Array(bytes.buffer))],
  I64: [8, (bytes) => Array.from(new BigInt64Array(bytes.buffer), Number)],
};

/** The tensor `name` of a file that `read(start, stop)` gives bytes of: its `dtype`, its `shape`, and `values(first, count)` in flat order. */
export async function openTensor(read, name) {
  const length = Number(new DataView((await read(0, 8)).buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(await read(8, 8 + length)));
  const tensor = header[name];
  if (!DTYPES[tensor?.dtype]) throw new UserError(`The bundle's text files have no ${name} that this page can read.`);
  const [size, decode] = DTYPES[tensor.dtype];
  const start = 8 + length + tensor.data_offsets[0];
  const total = tensor.shape.reduce((product, side) => product * side, 1);
  const values = async (first = 0, count = total) => decode(await read(start + first * size, start + (first + count) * size));
  return { dtype: tensor.dtype, shape: tensor.shape, values };
}

function fromHalf(bits) {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}
