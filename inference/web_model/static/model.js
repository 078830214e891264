// The model that lies in the page: its parts are blocks of base 64 of gzip, so that the page needs no request, neither from a folder
// (where a browser forbids them) nor from a server. ONNX Runtime Web runs the graph in WebAssembly, in one thread.

import { decodeDicom } from "./dicom_grey.js";
import { judge, openFacts } from "./judge.js";
import { ImageProblem, MAX_FILE_BYTES, modelInput } from "./pixels.js";
import { decodeRaster, findFormat } from "./raster.js";

let opening = null;

/** The bundle's facts, the graph as a session, and how long it took to open them; opened once. */
export function openModel() {
  opening ??= begin();
  return opening;
}

/** Reads the radiograph in `file` and brings it to the network's input. */
export async function prepare(file, facts) {
  if (file.size > MAX_FILE_BYTES) throw new ImageProblem("too_large");
  const bytes = new Uint8Array(await file.arrayBuffer().catch(() => {
    throw new ImageProblem("unreadable");
  }));
  const image = await decode(bytes, facts);
  return { info: image.info, square: modelInput(image, facts.preprocessing) };
}

/** Judges the radiograph in `file`: what `judge` gives, the network's input, and milliseconds by step. */
export async function judgeFile(file) {
  const { facts, session, ort } = await openModel();
  const times = [performance.now()];
  const { info, square } = await prepare(file, facts);
  times.push(performance.now());
  const input = new ort.Tensor("float32", square.pixels, [1, 1, square.height, square.width]);
  const outputs = await session.run({ image: input }, ["logits", "features"]);
  times.push(performance.now());
  const [logits, features] = [outputs.logits.data, outputs.features.data];
  const judgement = judge(facts, info, square, { logits, features });
  times.push(performance.now());
  const [read, network, judged] = times.slice(1).map((time, i) => time - times[i]);
  return { ...judgement, info, square, logits, features, milliseconds: { read, network, judged } };
}

async function decode(bytes, facts) {
  const format = findFormat(bytes);
  try {
    if (format === "dicom") return await decodeDicom(bytes, { window: facts.preprocessing.window, codes: facts.codes });
    return await decodeRaster(bytes, format);
  } catch (problem) {
    if (problem instanceof ImageProblem) throw problem;
    // damaged bytes lead anywhere; too little memory shows as a RangeError of an allocation
    throw new ImageProblem(problem instanceof RangeError && /alloc|length/i.test(problem.message) ? "too_large" : "corrupt");
  }
}

async function begin() {
  const started = performance.now();
  const facts = openFacts(JSON.parse(document.getElementById("facts").textContent));
  const { ort } = globalThis;
  Object.assign(ort.env.wasm, { numThreads: 1, proxy: false, wasmBinary: await unpackBlock("runtime") });
  const options = { executionProviders: ["wasm"], graphOptimizationLevel: "all", logSeverityLevel: 3 };
  const session = await ort.InferenceSession.create(await unpackBlock("graph"), options);
  return { facts, session, ort, milliseconds: performance.now() - started };
}

/** The bytes of a block of the page, which is taken out of it: its text is some ten million letters. */
async function unpackBlock(id) {
  const element = document.getElementById(id);
  const letters = atob(element.textContent.trim());
  element.remove();
  const packed = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) packed[i] = letters.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
