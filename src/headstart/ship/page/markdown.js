// A model card's Markdown as elements: headings, paragraphs, lists, tables, code. No HTML is ever parsed.

const make = (tag, text) => { const made = document.createElement(tag); inline(made, text ?? ""); return made; };

/** Text with `code` and **strong** in it. */
function inline(parent, text) {
  for (const piece of text.split(/(`[^`]+`|\*\*[^*]+\*\*)/)) {
    if (!piece) continue;
    const mark = piece.startsWith("`") ? "code" : piece.startsWith("**") ? "strong" : null;
    if (mark === null) { parent.append(piece); continue; }
    const made = document.createElement(mark);
    made.textContent = mark === "code" ? piece.slice(1, -1) : piece.slice(2, -2);
    parent.append(made);
  }
}

const cells = (line) => line.replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const scroll = document.createElement("div");
  scroll.className = "scroll";
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "group");
  scroll.setAttribute("aria-label", "Table");
  const made = document.createElement("table");
  const head = made.createTHead().insertRow();
  for (const cell of cells(lines[0])) { const th = make("th", cell); th.scope = "col"; head.append(th); }
  const body = made.createTBody();
  for (const line of lines.slice(2)) {
    const row = body.insertRow();
    for (const cell of cells(line)) row.append(make("td", cell));
  }
  scroll.append(made);
  return scroll;
}

/** Elements for a card, without its YAML header and its title. */
export function render(source) {
  const lines = source.replace(/\r/g, "").replace(/^---\n[\s\S]*?\n---\n/, "").split("\n");
  const found = document.createDocumentFragment();
  const run = (start, belongs) => { let end = start; while (end < lines.length && belongs(lines[end])) end += 1; return end; };
  for (let at = 0; at < lines.length;) {
    const line = lines[at];
    if (!line.trim() || /^# /.test(line)) { at += 1; continue; }
    const heading = /^#{2,6} (.*)/.exec(line);
    if (heading) { found.append(make("h3", heading[1])); at += 1; continue; }
    if (line.startsWith("```")) {
      const end = run(at + 1, (each) => !each.startsWith("```"));
      const pre = document.createElement("pre");
      pre.tabIndex = 0;
      pre.append(make("code"));
      pre.firstChild.textContent = lines.slice(at + 1, end).join("\n");
      found.append(pre);
      at = end + 1;
      continue;
    }
    if (line.startsWith("|")) {
      const end = run(at, (each) => each.startsWith("|"));
      found.append(table(lines.slice(at, end)));
      at = end;
      continue;
    }
    if (/^[-*] /.test(line)) {
      const end = run(at, (each) => /^([-*] |  )/.test(each));
      const list = document.createElement("ul");
      for (const each of lines.slice(at, end)) {
        if (/^[-*] /.test(each)) list.append(make("li", each.slice(2)));
        else inline(list.lastChild, ` ${each.trim()}`);
      }
      found.append(list);
      at = end;
      continue;
    }
    const end = run(at, (each) => each.trim() && !/^([-*] |#|\||```)/.test(each));
    found.append(make("p", lines.slice(at, Math.max(end, at + 1)).join(" ")));
    at = Math.max(end, at + 1);
  }
  return found;
}
