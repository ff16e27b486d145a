// The service's calls. The token comes in the address's fragment, which a browser sends to nobody, and stays in this variable.

const fragment = new URLSearchParams(location.hash.slice(1));
let token = fragment.get("token") || "";
if (token) history.replaceState(null, "", location.pathname);

export function setToken(text) { token = text.trim(); }
export const docsAddress = () => `/docs#token=${encodeURIComponent(token)}`;

export class Problem extends Error {
  constructor(status, detail) { super(detail); this.status = status; }
}

async function call(method, path, body) {
  const headers = { Authorization: `Bearer ${token}` };
  if (body && !(body instanceof FormData)) { headers["Content-Type"] = "application/json"; body = JSON.stringify(body); }
  let reply;
  try { reply = await fetch(path, { method, headers, body }); }
  catch { throw new Problem(0, "The service cannot be reached. Is it still running?"); }
  if (reply.ok) return reply;
  let detail = reply.statusText;
  try { detail = (await reply.json()).detail || detail; } catch { /* no document */ }
  throw new Problem(reply.status, detail);
}

const json = async (...given) => (await call(...given)).json();
const bitmap = async (path) => createImageBitmap(await (await call("GET", path)).blob());
const query = (pairs) => new URLSearchParams(Object.entries(pairs).filter(([, value]) => value !== null && value !== undefined)).toString();

export const model = () => json("GET", "/v1/model");
export const ask = (id, asked) => json("POST", `/v1/images/${id}/answers`, asked);
export const report = async (id, asked) => (await call("POST", `/v1/images/${id}/report`, asked)).blob();
export const similar = (id, wanted) => json("POST", `/v1/images/${id}/similar`, wanted);
export const patient = (id) => json("GET", `/v1/images/${id}/patient`);
export const thumbnail = (id) => bitmap(`/v1/images/${id}/thumbnail`);
export const map = (id, finding, frame, window) =>
  bitmap(`/v1/images/${id}/view?${query({ finding, frame, center: window?.[0], width: window?.[1] })}`);
export const forget = () => call("DELETE", "/v1/images");

export async function send(file) {
  const form = new FormData();
  form.append("image", file, "image"); // a file's name may name a patient
  return json("POST", "/v1/images", form);
}

// Samples of a grayscale frame with the table that shows them, or the bitmap of a colour picture.
export async function frame(id, index) {
  const reply = await call("GET", `/v1/images/${id}/frames/${index}`);
  if (reply.headers.get("Content-Type").startsWith("image/")) return { bitmap: await createImageBitmap(await reply.blob()) };
  const number = (name) => Number(reply.headers.get(name));
  const samples = new Uint16Array(await reply.arrayBuffer());
  const table = new Uint8Array(await (await call("GET", `/v1/images/${id}/frames/${index}/table`)).arrayBuffer());
  return {
    samples, table, rows: number("X-Rows"), columns: number("X-Columns"), slope: number("X-Slope"), intercept: number("X-Intercept"),
    inverse: reply.headers.get("X-Polarity") === "INVERSE", voi: reply.headers.get("X-Function"),
    window: reply.headers.get("X-Window").split(" ").map(Number),
  };
}
