'use strict';
// What a model says, as elements. Its text becomes text nodes and never HTML, and its links stay text.

const make = (tag, set, ...inside) => {
  const node = Object.assign(document.createElement(tag), set);
  node.append(...inside);
  return node;
};

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(/`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*/g)) {
    const tag = match[1] ? 'code' : match[2] ? 'strong' : 'em';
    nodes.push(text.slice(end, match.index), make(tag, {}, match[1] ?? match[2] ?? match[3]));
    end = match.index + match[0].length;
  }
  return [...nodes, text.slice(end)];
}

const MARKS = {ul: /^\s*[-*+]\s+(?=\S)/, ol: /^\s*\d{1,9}[.)]\s+(?=\S)/, blockquote: /^>\s?/, h3: /^#{1,6}\s+(?=\S)/};

// text -> [{tag, lines, ...}]. A fence that is not closed yet is a block of code already, as it is while it streams.
function blocks(text) {
  const result = [];
  let open = null;
  const push = (block) => result.push(open = block);
  for (const line of text.split('\n')) {
    const fence = /^\s*(`{3,}|~{3,})\s*([^\s`]*)/.exec(line);
    const tag = Object.keys(MARKS).find((tag) => MARKS[tag].test(line));
    const rest = tag ? line.replace(MARKS[tag], '') : line;
    if (open?.tag === 'pre' && fence?.[1].startsWith(open.fence) && !fence[2]) open = null;
    else if (open?.tag === 'pre') open.lines.push(line);
    else if (fence) push({tag: 'pre', fence: fence[1], name: fence[2], lines: []});
    else if (!line.trim()) open = null;
    else if (tag && tag === open?.tag && tag !== 'h3') open.lines.push(rest);
    else if (tag) push({tag, lines: [rest], from: parseInt(line, 10)});
    else if (open && open.tag !== 'h3') open.lines.push(`${open.lines.pop()}\n${line}`);
    else push({tag: 'p', lines: [line]});
  }
  return result;
}

function render({tag, name, lines, from}) {
  const text = lines.join('\n');
  if (tag === 'pre') {
    const head = make('figcaption', {}, name || 'code', copier(() => text));
    return make('figure', {}, head, make('pre', {tabIndex: 0}, make('code', {}, text)));
  }
  if (tag !== 'ul' && tag !== 'ol') return make(tag, {}, ...inline(text));
  return make(tag, tag === 'ol' ? {start: from} : {}, ...lines.map((line) => make('li', {}, ...inline(line))));
}

// Renders only from the first block that has changed, while an answer streams the last one.
function show(turn) {
  const fresh = blocks(turn.text);
  const texts = fresh.map((block) => JSON.stringify(block));
  const changed = texts.findIndex((text, place) => text !== turn.blocks[place]);
  const from = changed < 0 ? texts.length : changed;
  while (turn.body.children.length > from) turn.body.lastChild.remove();
  turn.body.append(...fresh.slice(from).map(render));
  turn.blocks = texts;
}

function copier(text) {
  const button = make('button', {type: 'button', className: 'copy', textContent: 'Copy'});
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {  // there is no such clipboard over plain http from another machine
      const area = make('textarea', {value: text(), className: 'unseen'});
      document.body.append(area);
      area.select();
      document.execCommand('copy');
      area.remove();
    }
    button.textContent = 'Copied';
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  };
  return button;
}
