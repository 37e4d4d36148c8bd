// Uses the report page as a reader would, and tells the page around it what it saw. Inserted by test_report.py.
const $$ = selector => [...document.querySelectorAll(selector)];
const set = (id, value, what = "change") => {
  const node = document.getElementById(id);
  node.value = value;
  node.dispatchEvent(new Event(what, { bubbles: true }));
};
const text = id => document.getElementById(id).textContent;
const click = id => document.getElementById(id).click();
const marks = () => $$("#frontier .mark").map(mark => [mark.dataset.kind, mark.dataset.attacker]);
const captions = () => $$("#gallery .loot tr:first-child td").map(cell => cell.textContent);
const size = () => [document.documentElement.scrollWidth, innerWidth];

function drive(said) {
  said.size = size();
  said.headings = $$("h2").map(node => node.textContent);
  said.all = marks();
  said.leaks = $$("#leak .mark").length;
  said.captions = captions();
  said.knobs = $$("#knobs .mark").length;
  said.levels = $$("#knobs line title").map(node => node.textContent);

  set("attacker", "naive");
  said.naive = marks();
  said.naiveKnobs = $$("#knobs .mark").length;
  set("attacker", "stronger");
  said.stronger = marks();
  set("attacker", "both");
  set("stage", "2");
  said.second = captions();
  set("stage", "");
  set("defense", "none", "input");
  said.none = marks();
  said.noKnobs = $$("#knobs .mark").length;
  said.ranked = $$("#ranking tbody tr").length;
  set("defense", "no such", "input");
  said.nobody = [marks(), text("gallery"), size()];
  set("defense", "", "input");
  document.getElementById("leak-axis").focus();
  set("leak-axis", "median");
  said.focus = document.activeElement.id;
  set("cost-axis", "dense");
  const best = () => $$("#frontier polyline[data-best]").map(line => line.dataset.best.split("; "));
  const sent = D.points.map(p => p.dense);
  for (const p of D.points) p.dense = p.attacker === "naive" ? 1.5 - p.median / 100 : 0.5 + p.median / 100; // costs more the less leaks
  said.points = D.points.map(({ kind, attacker, stage, stronger, median, dense }) => ({ kind, attacker, stage, stronger, median, dense }));
  said.best = ["both", "naive", "adaptive"].map(who => (set("attacker", who), [who, best()]));
  D.points.forEach((p, i) => p.dense = sent[i]);
  set("attacker", "both");
  said.axes = $$("#frontier svg text").map(node => node.textContent);

  set("slider", "1", "input");
  said.film = text("film-now");
  said.strip = $$("#film image").length;

  const back = () => getComputedStyle(document.body).backgroundColor;
  said.themes = [back()];
  click("theme");
  said.themes.push(back());
  const truth = document.querySelector("#gallery img.truth");
  said.sharp = getComputedStyle(truth).filter;
  click("blur");
  said.blurred = getComputedStyle(truth).filter;
  const stolen = () => $$("#gallery img.px:not(.truth)").map(image => image.src);
  const still = stolen();
  click("play");
  said.moving = stolen().filter((source, i) => source !== still[i]).length;

  const point = node => node.dispatchEvent(new PointerEvent("pointermove", { pointerType: "mouse", clientX: 50, clientY: 50 }));
  said.tips = ["#accuracy .mark", "#leak .mark", "#knobs .mark", "#film .mark", "#heat td button"].map(found => {
    point(document.querySelector(found));
    return [text("tip"), $$("#tip img").length];
  });
  const run = { own: ["dlg"], path: "runs/a", later: { gan: "fedsim attack runs/a attack=gan attack.steps=5" } };
  said.later = ["dlg", "gan", "idlg"].map(made => [later(run, made), noted(run, made)]);
  const mark = document.querySelector('#frontier .mark[data-kind="none"]');
  point(mark);
  said.tip = text("tip");
  said.tipPictures = $$("#tip img").length;
  mark.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
  said.open = document.getElementById("more").open;
  said.more = text("more");

  said.after = size();
  said.pictures = document.images.length;
  said.alts = $$("img").filter(image => !image.alt).length;
  said.broken = $$("img").filter(image => image.complete && !image.naturalWidth).length;
  const written = node => [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
  const shown = $$("body *").filter(node => written(node) && !["SCRIPT", "NOSCRIPT"].includes(node.tagName));
  said.small = shown.filter(node => parseFloat(getComputedStyle(node).fontSize) < 12).length;
  said.strange = $$("b, img[src=x]").length;
  said.objects = document.body.innerText.includes("[object");
}

addEventListener("load", () => setTimeout(() => {
  const said = {};
  try {
    drive(said);
  } catch (error) {
    wrong.push(String(error.stack));
  }
  parent.postMessage(JSON.stringify({ ...said, wrong }), "*");
}, 100));
