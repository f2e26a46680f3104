'use strict';
// Renders a model's text: Markdown by marked, and of the HTML it makes only what DOMPurify lets through.

const make = (tag, set, ...inside) => {
  const node = Object.assign(document.createElement(tag), set);
  node.append(...inside);
  return node;
};

const ALLOWED = {
  ALLOWED_TAGS: 'p h3 h4 h5 h6 ul ol li blockquote pre code strong em del a br hr table thead tbody tr th td'.split(' '),
  ALLOWED_ATTR: ['href', 'title', 'start', 'align', 'class'], ADD_URI_SAFE_ATTR: ['start', 'align'],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i, ALLOW_ARIA_ATTR: false, ALLOW_DATA_ATTR: false, RETURN_DOM_FRAGMENT: true,
};
// What draws formulas and colours code is fetched when a text first may have such, and by its digest.
const fetched = {};
const addresses = (window.trustedTypes ?? {createPolicy: (_, own) => own}).createPolicy('libraries', {
  createScriptURL: (name) => `${root}/page/${name}`,
});
const library = (name) => fetched[name] ??= new Promise((onload, onerror) => {
  const script = make('script', {integrity: JSON.parse($('libraries').textContent)[name], onload, onerror});
  script.src = addresses.createScriptURL(name);
  document.head.append(script);
});

const markdown = new marked.Marked({
  breaks: true,
  tokenizer: {  // HTML that a model writes is text like any other, so that none of it is lost; a line break is a line break
    html: () => undefined,
    tag(text) {
      const raw = /^<br *\/?>/i.exec(text)?.[0];
      return raw && {type: 'br', raw};
    },
  },
  renderer: {
    heading({tokens, depth}) {
      const tag = `h${Math.min(depth + 2, 6)}`;
      return `<${tag}>${this.parser.parseInline(tokens)}</${tag}>`;
    },
    image({href, title, text}) {  // is a link: nothing is fetched
      return this.link({href, title, tokens: [{type: 'text', raw: text, text}]});
    },
    checkbox: ({checked}) => checked ? '☑ ' : '☐ ',
  },
});

function render(token) {
  const part = DOMPurify.sanitize(markdown.parser([token]), ALLOWED);
  for (const link of part.querySelectorAll('a')) Object.assign(link, {target: '_blank', rel: 'noopener noreferrer'});
  for (const table of part.querySelectorAll('table')) {
    const frame = make('div', {className: 'wide', tabIndex: 0});
    table.replaceWith(frame);
    frame.append(table);
  }
  window.drawFormulas?.(part);
  for (const pre of part.querySelectorAll('pre')) {
    const code = make('code', {}, pre.textContent.replace(/\n$/, ''));
    const name = pre.firstChild.className?.replace('language-', '') || 'code';
    const head = make('figcaption', {}, name, copier(() => code.textContent));
    pre.replaceWith(make('figure', {dir: 'ltr'}, head, make('pre', {tabIndex: 0}, code)));
  }
  const block = part.firstElementChild ?? make('p', {}, token.raw);
  block.dir ||= 'auto';  // of each block alone: a conversation may be in several scripts
  return block;
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return '';  // it is not whole
  }
}

// Returns a turn's text as Markdown: a JSON answer and the arguments of calls are code.
function asMarkdown({text, json, calls = []}) {
  const code = (part) => `~~~~ JSON\n${pretty(part) || part}\n~~~~`;
  return [json && text ? code(text) : text, ...calls.flatMap((call) => [`Calls \`${call.name}\`:`, code(call.arguments)])]
    .filter(Boolean).join('\n\n');
}

// Draws a turn's text; as it is, where a library gives up, as it does at thousands of nested quotations.
function show(turn) {
  if (!fetched['drawing.js'] && /\\[([]|\$|```|~~~/.test(turn.text)) {
    library('drawing.js').then(() => [turn, ...turns].forEach(drawAgain), () => {});
  }
  try {
    showBlocks(turn);
  } catch {
    turn.body.replaceChildren(make('p', {dir: 'auto'}, turn.text));
    turn.blocks = [];
  }
}

// Renders only from the first block that has changed, while an answer streams the last one.
function showBlocks(turn) {
  const fresh = markdown.lexer(asMarkdown(turn)).filter(({type}) => type !== 'space' && type !== 'def');
  const texts = fresh.map((token) => JSON.stringify(token));
  const {body} = turn;
  const changed = texts.findIndex((text, place) => text !== turn.blocks[place]);
  let from = changed < 0 ? texts.length : changed;
  const growing = body.children[from];
  if (fresh[from]?.type === 'code' && growing?.tagName === 'FIGURE') {  // keeps its place, and the focus on its button
    growing.firstChild.firstChild.textContent = fresh[from].lang?.match(/^\S*/)[0] || 'code';
    growing.querySelector('code').textContent = fresh[from].text;
    from += 1;
  }
  keepFocus(() => {
    while (body.children.length > from) body.lastChild.remove();
    body.append(...fresh.slice(from).map(render));
  });
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
      button.focus();
    }
    $('status').textContent = button.textContent = 'Copied';
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  };
  return button;
}
