// Calls the page's functions for the tests: a line of JSON in, a line of JSON out. Arrays travel as base 64 of float32.

import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const folder = pathToFileURL(`${process.argv[2]}/`);
const load = (name) => import(new URL(`${name}.js`, folder));
const [pixels, raster, dicom, views, suitability, judging] = await Promise.all(
  ["pixels", "raster", "dicom_grey", "views", "suitability", "judge"].map(load));

const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
const floats = (text) => new Float32Array(bytes(text).buffer);
const packed = (array) => Buffer.from(Float32Array.from(array).buffer).toString("base64");
const image = ({ height, width, data }) => ({ height, width, pixels: floats(data) });
const sent = ({ height, width, pixels: values }) => ({ height, width, data: packed(values) });

const calls = {
  modelInput: ({ picture, size_px, fit }) => sent(pixels.modelInput(image(picture), { size_px, fit })),
  async decode({ file, window, codes }) {
    const data = bytes(file);
    const format = raster.findFormat(data);
    const found = format === "dicom" ? await dicom.decodeDicom(data, { window, codes }) : await raster.decodeRaster(data, format);
    return { ...sent(found), info: found.info };
  },
  orient: ({ picture, orientation }) => sent(pixels.orient(image(picture), orientation)),
  colour({ height, width, rgb }) {
    const colours = bytes(rgb);
    return raster.measureColour(height, width, (i) => colours.subarray(3 * i, 3 * i + 3));
  },
  views: ({ words }) => words.map((word) => [views.classifyView(word), views.viewGroupOf(word)]),
  parts: ({ words, parts }) => words.map((word) => views.isOtherPart(word, parts)),
  ages: ({ strings }) => strings.map(views.ageGroupOfString),
  agesBetween: ({ days }) => days.map(([birth, study]) => views.ageGroupBetween(views.dateOf(birth), views.dateOf(study))),
  statistics({ square }) {
    const grey = suitability.thumbnail(image(square));
    return { grey: packed(grey), statistics: packed(suitability.statisticsOf(grey)), cells: packed(suitability.cellsOf(grey)) };
  },
  scores({ facts, square, features }) {
    return suitability.scoresOf(judging.openFacts(facts).suitability, image(square), floats(features));
  },
  judge({ facts, info, square, logits, features }) {
    return judging.judge(judging.openFacts(facts), info, image(square), { logits: floats(logits), features: floats(features) });
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { call, ...values } = JSON.parse(line);
  let answer;
  try {
    answer = { value: await calls[call](values) };
  } catch (problem) {
    answer = problem.reason ? { problem: problem.reason } : { crash: String(problem.stack) };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
