'use strict';
// Exports the conversations that are listed: fetched when that is asked for.

// What of a conversation `stages.finetune --data` reads: answered questions, up to a call.
function asRow(some) {
  const call = some.findIndex((turn) => turn.calls);
  return asMessages(some.slice(0, call < 0 ? 1 / 0 : call)).filter(({role}, n, all) => role !== 'user' || all[n + 1]?.role === 'assistant');
}

function exportList() {
  const rows = found().map(({turns}) => asRow(turns)).filter((row) => row[0]).map((messages) => `${JSON.stringify({messages})}\n`);
  const href = URL.createObjectURL(new Blob(rows, {type: 'application/jsonl'}));
  make('a', {href, download: 'conversations.jsonl'}).click();
  setTimeout(() => URL.revokeObjectURL(href), 60000);
}
