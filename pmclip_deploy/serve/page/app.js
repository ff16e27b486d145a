// The page: pictures on the left, questions and answers on the right.

import * as api from "/page/api.js";
import { card, matches } from "/page/answers.js";
import { View } from "/page/view.js";

const at = (id) => document.getElementById(id);
export const pictures = []; // {about, asked: [question], document}
let current = null, frame = 0, loading = 0, maps = [];
export const view = new View(at("view"), status);

const say = (text) => { at("message").textContent = text; };
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const ofFile = (text) => text.replace(/^the upload: is /, "this file is ").replace(/^the upload: /, "this file: ");

async function attempt(work) {
  say("");
  try { return await work(); }
  catch (error) {
    if (error.status === 401) askForToken();
    else say(sentence(error instanceof api.Problem ? ofFile(error.message) : `The page failed: ${error.message}`));
    return undefined;
  }
}

function askForToken() {
  say("This page needs the token that the service printed when it started. Open the printed address, or paste the token here: ");
  const box = document.createElement("input");
  box.type = "password";
  box.setAttribute("aria-label", "Token");
  box.addEventListener("change", () => { api.setToken(box.value); start(); });
  at("message").append(box);
}

async function start() {
  const model = await attempt(api.model);
  if (!model) return;
  at("model").textContent = `${model.bundle} ${model.version}, ${model.precision}`;
  maps = model.maps;
  at("docs").href = api.docsAddress();
  at("similar").hidden = !model.similar;
  at("suggestions").replaceChildren(...[...new Set(model.questions.map((row) => row.question))].map((question) => {
    const option = document.createElement("option");
    option.value = question;
    return option;
  }));
  at("examples").replaceChildren(...model.questions.map((row) => {
    const item = document.createElement("li"), button = document.createElement("button"), worth = document.createElement("div");
    button.textContent = row.question;
    button.type = "button";
    button.addEventListener("click", () => { at("question").value = row.question; at("question").focus(); });
    worth.textContent = row.worth;
    worth.className = "soft";
    item.append(button, worth);
    return item;
  }));
}

// Files become pictures one after another, in anatomical order within a series.
async function take(files) {
  const before = new Set(pictures);
  let failed = 0, reason = "";
  for (const file of files) {
    at("status").textContent = `Reading ${pictures.length + failed + 1 - before.size} of ${files.length}`;
    try { pictures.push({ about: await api.send(file), answers: [], asked: [] }); }
    catch (error) {
      failed += 1;
      reason = error.message;
      if (error.status === 401) { askForToken(); return; }
    }
  }
  pictures.sort((a, b) => a.about.series - b.about.series || a.about.order - b.about.order);
  list();
  const first = pictures.find((picture) => !before.has(picture));
  if (first) await select(first);
  else status();
  if (failed) say(files.length === 1 ? sentence(ofFile(reason)) : `${failed} of ${files.length} files could not be read. The last one: ${ofFile(reason)}`);
}

function list() {
  at("list").hidden = pictures.length < 2;
  at("list").replaceChildren(...pictures.map((picture, index) => {
    const item = document.createElement("li"), button = document.createElement("button");
    picture.button = button;
    picture.thumbnail ??= document.createElement("canvas");
    button.append(picture.thumbnail);
    button.setAttribute("aria-label", `Picture ${index + 1} of ${pictures.length}`);
    button.setAttribute("aria-current", picture === current);
    button.addEventListener("click", () => select(picture));
    item.append(button);
    if (!picture.hasThumbnail) {
      picture.hasThumbnail = true;
      api.thumbnail(picture.about.id).then((bitmap) => {
        [picture.thumbnail.width, picture.thumbnail.height] = [bitmap.width, bitmap.height];
        picture.thumbnail.getContext("2d").drawImage(bitmap, 0, 0);
      }, () => { picture.hasThumbnail = false; });
    }
    return item;
  }));
}

async function select(picture) {
  const { about } = picture;
  if (!about.series || about.series !== current?.about.series) view.fresh(); // else the window and the zoom stay
  current = picture;
  for (const id of ["report", "similar", "forget"]) at(id).disabled = false;
  at("view").hidden = at("tools").hidden = false;
  at("drop").classList.add("small");
  at("framebox").hidden = about.frames < 2;
  at("frame").max = about.frames - 1;
  at("presets").replaceChildren(...about.windows.slice(0, 5).map((preset, index) => {
    const button = document.createElement("button");
    button.textContent = preset.name.replace(/^file/, "file window");
    button.title = String(index + 1);
    button.addEventListener("click", () => view.setWindow(preset.center, preset.width));
    return button;
  }));
  for (const each of pictures) each.button?.setAttribute("aria-current", each === picture);
  picture.button?.scrollIntoView({ block: "nearest", inline: "nearest" });
  at("answers").replaceChildren(...picture.answers);
  await show(about.frame);
  await name();
}

// Through the frames of a file, or the files of a series.
function step(to) {
  if (current.about.frames > 1) { show(to(frame)); return; }
  const index = Math.min(Math.max(to(pictures.indexOf(current)), 0), pictures.length - 1);
  if (pictures[index] !== current) select(pictures[index]);
}

async function show(index) {
  const picture = current, number = ++loading;
  frame = Math.min(Math.max(index, 0), picture.about.frames - 1);
  at("frame").value = frame;
  const read = await attempt(() => api.frame(picture.about.id, frame));
  if (!read || number !== loading) return; // a later one is on its way
  view.show(read, picture.about.spacing);
  at("view").setAttribute("aria-label", `${picture.about.modality ?? picture.about.format} picture, frame ${frame + 1} of ${picture.about.frames}`);
  status();
}

function status() {
  at("invert").setAttribute("aria-pressed", Boolean(view.inverted));
  at("measure").setAttribute("aria-pressed", view.measuring);
  if (!current) { at("status").textContent = ""; return; }
  const { about } = current, window = view.takesWindow ? view.shownWindow : null;
  const number = (value) => Number(value.toPrecision(6)).toString();
  at("status").textContent = [window && `C ${number(window[0])} W ${number(window[1])}`, `frame ${frame + 1}/${about.frames}`,
    `${about.columns} x ${about.rows}`, about.modality ?? about.format, view.length, ...about.warnings].filter(Boolean).join(" · ");
}

async function name() {
  const wanted = at("name-switch").checked && current;
  const shown = wanted ? await attempt(() => api.patient(current.about.id)) : null;
  at("name").textContent = shown ? [shown.name, shown.id, shown.study_date].filter(Boolean).join("  ") || "The file names nobody." : "";
}

const asking = (questions) => ({ questions, frame, window: view.window });

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = at("question").value.trim(), picture = current;
  if (!picture) say("Choose a picture first.");
  if (!question || !picture) return;
  at("send").disabled = true;
  const reply = await attempt(() => api.ask(picture.about.id, asking([question])));
  at("send").disabled = false;
  if (!reply) return;
  const [answer] = reply.answers, seen = answer.image.window, chosen = view.window;
  picture.asked.push(question);
  const about = [`frame ${answer.image.frame + 1}`, seen && `window C ${+seen[0].toPrecision(6)} W ${+seen[1].toPrecision(6)}`].filter(Boolean).join(", ");
  const hasMap = maps.includes(answer.worth?.finding);
  const made = card(answer, about, hasMap && ((finding) => look(picture, finding, answer.image.frame, chosen)));
  picture.answers.unshift(made);
  if (picture === current) at("answers").prepend(made);
  at("question").select();
});

async function look(picture, finding, index, window) {
  const bitmap = await attempt(() => api.map(picture.about.id, finding, picture.about.frames > 1 ? index : null, window));
  if (!bitmap) return;
  [at("map-view").width, at("map-view").height] = [bitmap.width, bitmap.height];
  at("map-view").getContext("2d").drawImage(bitmap, 0, 0);
  at("map").showModal();
}

at("report").addEventListener("click", async () => {
  const questions = [...new Set(current.asked)];
  if (!questions.length) { say("Ask something first. The report holds what was asked."); return; }
  const blob = await attempt(() => api.report(current.about.id, asking(questions)));
  if (!blob) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "report.dcm";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

at("similar").addEventListener("click", async () => {
  const picture = current, found = await attempt(() => api.similar(picture.about.id, { k: 8, frame, window: view.window }));
  if (!found) return;
  const made = matches(found.matches);
  picture.answers.unshift(made);
  if (picture === current) at("answers").prepend(made);
});

at("forget").addEventListener("click", async () => {
  await attempt(api.forget);
  pictures.length = 0;
  current = null;
  view.clear();
  for (const id of ["report", "similar", "forget"]) at(id).disabled = true;
  at("view").hidden = at("tools").hidden = at("list").hidden = true;
  at("drop").classList.remove("small");
  at("answers").replaceChildren();
  at("name").textContent = at("question").value = "";
  status();
});

for (const id of ["files", "folder"]) at(id).addEventListener("change", ({ target }) => {
  const chosen = [...target.files];
  target.value = ""; // so that the same file can be chosen again
  take(chosen);
});
at("reset").addEventListener("click", () => view.reset());
at("invert").addEventListener("click", () => view.invert());
at("measure").addEventListener("click", measure);
at("frame").addEventListener("input", (event) => show(Number(event.target.value)));
at("name-switch").addEventListener("change", name);

function measure() { view.measuring = !view.measuring; status(); }

const stage = at("stage");
stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.classList.add("over"); });
stage.addEventListener("dragleave", () => stage.classList.remove("over"));
stage.addEventListener("drop", async (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  take(entries.length ? (await Promise.all(entries.map(below))).flat() : [...event.dataTransfer.files]);
});
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());

// All files of a dropped file or folder.
async function below(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const reader = entry.createReader(), found = [];
  for (;;) {
    const batch = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!batch.length) return (await Promise.all(found.map(below))).flat();
    found.push(...batch);
  }
}

at("view").addEventListener("wheel", (event) => {
  event.preventDefault();
  if (event.ctrlKey || (current.about.frames < 2 && pictures.length < 2)) view.zoomBy(event.deltaY < 0 ? 1.15 : 1 / 1.15);
  else step((index) => index + Math.sign(event.deltaY));
}, { passive: false });

const keys = {
  ArrowUp: () => view.nudge(-1, 0), ArrowDown: () => view.nudge(1, 0), ArrowLeft: () => view.nudge(0, -1), ArrowRight: () => view.nudge(0, 1),
  PageUp: () => step((index) => index - 1), PageDown: () => step((index) => index + 1), Home: () => step(() => 0), End: () => step(() => Infinity),
  "+": () => view.zoomBy(1.25), "=": () => view.zoomBy(1.25), "-": () => view.zoomBy(0.8),
  r: () => view.reset(), i: () => view.invert(), m: measure,
};

at("view").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !current) return;
  const act = keys[event.key] ?? keys[event.key.toLowerCase()], preset = at("presets").children[Number(event.key) - 1];
  if (!act && !preset) return;
  event.preventDefault();
  if (act) act();
  else preset.click();
});

start();
