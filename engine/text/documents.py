"""Answers from documents: passages of texts, found by SQLite's full-text search, are put into the prompt."""

import dataclasses
import hashlib
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.errors import UserError
from engine.text.corpus import find_text_files, read_documents
from engine.text.template import Message
from engine.text.tokenizer import Tokenizer

# of all files: a question is looked up in less than a second, in about twice their memory
MAX_BYTES = 20_000_000
PASSAGE_CHARACTERS = 600  # about 150 tokens
BUDGET = 512  # tokens of passages in a prompt, and at most a quarter of the context
MAX_WORDS = 32  # of a question, half from its beginning and half from its end
# A passage goes up to the end of its paragraph, else of a sentence, else of a word, that is within
# its characters.
REST = f".{{0,{PASSAGE_CHARACTERS - 1}}}"
PASSAGE = re.compile(rf"\S(?s:{REST}\Z|{REST}(?<=[.!?])(?=\s)|{REST}(?=\s)|{REST})")
# English words that questions are made of, whatever they are about.
QUESTION_WORDS = """
a about an and any are as at be been but by can could did do does for from had has have he her his how i if in into is it its me
my no not of on or our please she should so tell than that the their them then there these they this those to us was we were
what when where which who whom whose why will with would you your
"""
COMMON = frozenset(re.findall(r"\w+", QUESTION_WORDS))


@dataclasses.dataclass(frozen=True)
class Passage:
    file: str
    number: int
    tokens: int
    text: str


class Documents:
    """The passages of the text files below a folder, or of one file, in an index in memory that
    threads may share.

    No link is followed out of the folder; `note` names those, and what else was left out. Raises
    UserError as `read_corpus`, and for files of more than MAX_BYTES, of which no more is read.
    """

    def __init__(self, path: Path) -> None:
        files, self.note = find_text_files(path, MAX_BYTES)
        self._index = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._index.execute(
                "CREATE VIRTUAL TABLE passages USING fts5(file, number UNINDEXED, text, tokenize='porter')"
            )
        except sqlite3.OperationalError as error:
            raise UserError(f"The SQLite of this Python has no full-text search (FTS5): {error}.") from None
        self.files = len(files)
        self.passages = 0
        hashed = hashlib.sha256()
        last = None
        number = 0
        characters = 0
        for file, document in read_documents(path, files):
            number = number * (file == last)
            last = file
            name = (
                str(file.relative_to(path) if file != path else file.name).encode(errors="replace").decode()
            )
            text = "".join(document())
            characters += len(text)
            if characters > MAX_BYTES:  # of a parquet file, which is compressed
                raise UserError(
                    f"The texts at {path} have more than {MAX_BYTES:,} characters, "
                    f"up to {file}: take texts out."
                )
            for passage in cut(text):
                number += 1
                self.passages += 1
                hashed.update(f"{name}\0{passage}\0".encode())
                self._index.execute("INSERT INTO passages VALUES (?, ?, ?)", (name, number, passage))
        if not self.passages:
            raise UserError(f"{path} is empty: it holds no text.")
        self._index.commit()
        self.digest = hashed.hexdigest()

    @property
    def summary(self) -> str:
        return f"{self.passages:,} passages of {self.files:,} files, the best of which a question brings into its prompt"

    def find(self, question: str, tokenizer: Tokenizer, budget: int) -> list[Passage]:
        """Returns the passages that share words with a question, best first by BM25 (Robertson et
        al. 1994).

        They have at most `budget` tokens, to which the best is cut, and none scores less than half
        of the best.
        """
        words = [
            word[:100]
            for word in dict.fromkeys(re.findall(r"[^\W_]+", question.lower()))
            if word not in COMMON
        ]
        words = [*words[: MAX_WORDS // 2], *words[MAX_WORDS // 2 :][-MAX_WORDS // 2 :]]
        if not words:
            return []
        query = " OR ".join(f'"{word}"' for word in words)  # in quotes, no word is an operator
        select = "SELECT file, number, text, rank FROM passages WHERE passages MATCH ? ORDER BY rank, rowid LIMIT 20"
        rows = self._index.execute(select, [query]).fetchall()
        found: list[Passage] = []
        for file, number, text, rank in rows:
            ids = tokenizer.encode(f"{text}\n\n")
            if not found and len(ids) > budget:  # in a short context
                ids = ids[:budget]
                text = tokenizer.decode(ids.tolist()).rstrip("\ufffd")
            if rank <= rows[0][-1] / 2 and len(ids) <= budget:
                budget -= len(ids)
                found.append(Passage(file, number, len(ids), text))
        return found


def prompt_with[T: Sequence[int]](
    documents: Documents | None,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    context: int,
    tokenize: Callable[[Sequence[Message]], T],
) -> tuple[T, list[Passage]]:
    """Returns the tokens of a conversation, with passages for the user's last message before it,
    and these passages.

    They leave a quarter of the context free. Earlier messages stand without theirs, so that what
    precedes the last one is a prefix of the next prompt too, which the prefix cache holds.
    """
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if documents and last >= 0:
        found = documents.find(messages[last]["content"], tokenizer, min(BUDGET, context // 4))
    else:
        found = []
    while True:
        extended = [*messages]
        if found:
            texts = "".join(f"{passage.text}\n\n" for passage in found)
            extended[last] = {
                **extended[last],
                "content": f"Answer by these passages:\n\n{texts}{extended[last]['content']}",
            }
        tokens = tokenize(extended)
        if not found or len(tokens) <= context * 3 // 4:
            return tokens, found
        found.pop()


def cut(text: str) -> Iterator[str]:
    """Yields the passages of a text: its paragraphs, headings (#) with the next one, longer ones in
    parts.

    Paragraphs are not joined: SmolLM2-135M answered 5 of 16 questions from passages of several, and
    16 from single ones.
    """
    headings = re.compile(r"^(#.*)\n\s*\n", re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", headings.sub(r"\1\n", re.sub(r"[^\S\n]+", " ", text))):
        yield from (match[0].strip() for match in PASSAGE.finditer(paragraph.strip()))
