'use strict';
// Draws formulas and colours code: fetched when a text first may have such, and itself fetches what does it.

const STYLE = new CSSStyleSheet();
STYLE.replaceSync(`
.tex.wide { display: block; overflow: auto hidden; text-align: center; padding: .3rem 0; }
math { font-size: 1.1em; }
.hljs-comment, .hljs-quote, .hljs-meta { color: var(--soft); }
.hljs-keyword, .hljs-selector-tag, .hljs-built_in, .hljs-type, .hljs-tag, .hljs-name { color: var(--link); }
.hljs-string, .hljs-regexp, .hljs-addition, .hljs-attr { color: var(--good); }
.hljs-number, .hljs-literal, .hljs-symbol, .hljs-deletion { color: var(--bad); }
.hljs-title, .hljs-section { font-weight: 600; }
`);
document.adoptedStyleSheets.push(STYLE);

// A formula is TeX between \( and \), \[ and \], two dollars, or one dollar where it can be no price.
const escapeHtml = (text) => text.replace(/[&<>"]/g, (letter) => `&#${letter.charCodeAt()};`);
const formula = (name, level, begin, rule) => ({
  name, level,
  start: (text) => text.match(begin)?.index,
  tokenizer(text) {
    const match = rule.exec(text);
    if (!match) return undefined;
    const tex = match.slice(1).find((part) => part !== undefined).trim();
    return {type: name, raw: match[0], tex, wide: level === 'block' || /^(?:\$\$|\\\[)/.test(match[0])};
  },
  renderer({tex, wide}) {
    const code = `<code class="tex${wide ? ' wide' : ''}">${escapeHtml(tex)}</code>`;
    return level === 'block' ? `<p>${code}</p>` : code;
  },
});
const BLOCK = /^(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])[ \t]*(?:\n|$)/;
const INLINE = /^(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\]|\\\(([^]+?)\\\)|\$(?=\S)([^$\n]*[\\^_{][^$\n]*)(?<=\S)\$(?!\d))/;
markdown.use({extensions: [
  formula('wideFormula', 'block', /(?<=\n)(?:\$\$|\\\[)/, BLOCK),  // elsewhere a paragraph goes on
  formula('formula', 'inline', /\$|\\[([]/, INLINE),
]});

// Draws each formula in place of its TeX; what is none stays as it was written.
async function drawFormulas(part) {
  for (const code of part.querySelectorAll('code.tex')) {
    const drawn = make('span', {className: code.className, title: code.textContent});
    try {
      await library('temml.min.js');
      temml.render(code.textContent, drawn, {displayMode: code.classList.contains('wide'), throwOnError: true});
      code.replaceWith(drawn);
    } catch {
      continue;
    }
  }
}

// Colours the code of an answer that has ended, where its language is known.
async function colour(turn) {
  for (const figure of turn.body.querySelectorAll('figure:not(.coloured)')) {
    const language = figure.firstChild.firstChild.textContent;
    const code = figure.querySelector('pre code');
    if (language === 'code') continue;
    try {
      await library('highlight.min.js');
    } catch {
      return;
    }
    if (!hljs.getLanguage(language)) continue;
    const {value} = hljs.highlight(code.textContent, {language, ignoreIllegals: true});
    code.replaceChildren(DOMPurify.sanitize(value, {ALLOWED_TAGS: ['span'], ALLOWED_ATTR: ['class'], RETURN_DOM_FRAGMENT: true}));
    figure.className = 'coloured';
  }
}

// Shows an answer once more that was drawn without all this. Nobody else's text is Markdown.
function drawAgain(turn) {
  if (turn.role !== 'assistant') return;
  turn.body.replaceChildren();
  turn.blocks = [];
  show(turn);
  if (turn.finish || turn.error) colour(turn);
}
