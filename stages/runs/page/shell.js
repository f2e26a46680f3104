'use strict';
// What every page of the site has: its document, its title, and a sentence where something is wrong.

const $ = (id) => document.getElementById(id);

function refuse(sentence) {
  $('alert').textContent = sentence;
  $('alert').hidden = false;
}

// Returns the document of this page, or null where there is none that can be read.
function readDocument() {
  try {
    return JSON.parse($('recording').textContent);
  } catch {
    return null;
  }
}

document.title = document.querySelector('h1').textContent;
addEventListener('error', ({message}) => refuse(`Something went wrong, and this page may be incomplete: ${message}`));
