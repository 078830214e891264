// A table of clinical values dropped together with images: it is read here, and each image is sent with its own row. Names of files, and
// columns that the model does not take, stay on this page.

const FILE_COLUMNS = ["file", "path", "image", "filename"];

/** Whether a file is such a table, by its name. */
export const isTable = (file) => /\.(csv|tsv)$/i.test(file.name);

/** Values by name of file, for the columns that the model takes. {rows, columns, problem}: a word where the table cannot be used. */
export function readTable(text, clinical) {
  const [head, ...lines] = cellsOf(text.replace(/^\ufeff/, ""));
  const names = (head ?? []).map((cell) => cell.normalize("NFKC").trim().toLowerCase());
  const key = FILE_COLUMNS.map((name) => names.indexOf(name)).find((place) => place >= 0) ?? -1;
  const taken = names.map((name, place) => [name, place]).filter(([name, place]) => place !== key && clinical.includes(name.split(/\s*[[(]/)[0]));
  const rows = new Map();
  if (key < 0) return { rows, columns: [], problem: "table_file" };
  if (!taken.length) return { rows, columns: [], problem: "table_columns" };
  for (const cells of lines) {
    const file = baseName(cells[key] ?? "");
    if (!file) continue;
    if (rows.has(file)) return { rows: new Map(), columns: [], problem: "table_twice" };
    rows.set(file, Object.fromEntries(taken.map(([name, place]) => [name, (cells[place] ?? "").trim()])));
  }
  return { rows, columns: taken.map(([name]) => name), problem: "" };
}

/** The last part of a path, as a table or a file names it. */
const baseName = (path) => path.trim().replaceAll("\\", "/").split("/").at(-1);

/** The cells of CSV (RFC 4180), with the separator that its first line has most of. */
function cellsOf(text) {
  const first = text.split(/\r?\n/, 1)[0];
  const separator = [",", ";", "\t"].reduce((best, one) => (first.split(one).length > first.split(best).length ? one : best));
  const rows = [[""]];
  let quoted = false;
  for (let i = 0; i < text.length; i++) {
    const [sign, row] = [text[i], rows.at(-1)];
    if (quoted && sign === '"' && text[i + 1] === '"') row[row.length - 1] += text[++i];
    else if (sign === '"' && (quoted || row.at(-1) === "")) quoted = !quoted;
    else if (!quoted && sign === separator) row.push("");
    else if (!quoted && sign === "\n") rows.push([""]);
    else if (quoted || sign !== "\r") row[row.length - 1] += sign;
  }
  return rows.filter((row) => row.some((cell) => cell.trim()));
}
