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
MAX_WORD_CHARACTERS = 100  # of a word of a question
MAX_WORDS = 32  # of a question, half from its beginning and half from its end
# The rest of a passage after its first character: as long as what follows it in the pattern allows.
REST = f".{{0,{PASSAGE_CHARACTERS - 1}}}"
# A passage of a paragraph ends at the first of these places that is within PASSAGE_CHARACTERS.
PASSAGE = re.compile(
    r"\S(?s:"
    rf"{REST}\Z"  # the end of the paragraph
    rf"|{REST}(?<=[.!?])(?=\s)"  # else the end of a sentence
    rf"|{REST}(?=\s)"  # else the end of a word
    rf"|{REST}"  # else, in a word that is longer, its last character
    r")"
)
# English words that questions are made of, whatever they are about.
QUESTION_WORDS = """
a about an and any are as at be been but by can could did do does for from had has have he her his how i if in into is it its me
my no not of on or our please she should so tell than that the their them then there these they this those to us was we were
what when where which who whom whose why will with would you your
"""
COMMON = frozenset(re.findall(r"\w+", QUESTION_WORDS))


SELECT = """
SELECT file, number, text, rank FROM passages WHERE passages MATCH ? ORDER BY rank, rowid LIMIT 20
"""


@dataclasses.dataclass(frozen=True)
class Passage:
    file: str  # its name
    number: int  # of the passage in its file, from 1 on
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
        self._hashed = hashlib.sha256()
        previous_file = None
        number = 0
        characters = 0
        for file, document in read_documents(path, files):
            if file != previous_file:
                number = 0
                previous_file = file
            text = "".join(document())
            characters += len(text)
            if characters > MAX_BYTES:  # of a parquet file, which is compressed
                raise UserError(
                    f"The texts at {path} have more than {MAX_BYTES:,} characters, "
                    f"up to {file}: take texts out."
                )
            number = self._add(_file_name(file, path), text, number)
        if not self.passages:
            raise UserError(f"{path} is empty: it holds no text.")
        self._index.commit()
        self.digest = self._hashed.hexdigest()

    def _add(self, name: str, text: str, number: int) -> int:
        """Adds the passages of a document to the index, numbered from `number` + 1 in their file.
        Returns the last one's number.
        """
        for passage in cut(text):
            number += 1
            self.passages += 1
            self._hashed.update(f"{name}\0{passage}\0".encode())
            self._index.execute("INSERT INTO passages VALUES (?, ?, ?)", (name, number, passage))
        return number

    @property
    def summary(self) -> str:
        return (
            f"{self.passages:,} passages of {self.files:,} files; "
            "the best for a question are put into its prompt"
        )

    def find(self, question: str, tokenizer: Tokenizer, budget: int) -> list[Passage]:
        """Returns the passages that share words with a question, best first by BM25 (Robertson et
        al. 1994).

        Together they have at most `budget` tokens. The best passage is cut to `budget` if it has
        more. A passage that scores less than half of the best is left out.
        """
        words = _words_of(question)
        if not words:
            return []
        query = " OR ".join(f'"{word}"' for word in words)  # in quotes, no word is an operator
        rows = self._index.execute(SELECT, [query]).fetchall()
        if not rows:
            return []
        # FTS5's rank is BM25 times -1: the best passage has the lowest one, and half the score of
        # the best is half its rank.
        worst_rank = rows[0][-1] / 2
        passages: list[Passage] = []
        for file, number, text, rank in rows:
            ids = tokenizer.encode(f"{text}\n\n")
            if not passages and len(ids) > budget:  # in a short context
                ids = ids[:budget]
                text = tokenizer.decode(ids.tolist()).rstrip("\ufffd")
            if rank <= worst_rank and len(ids) <= budget:
                budget -= len(ids)
                passages.append(Passage(file, number, len(ids), text))
        return passages


def _words_of(question: str) -> list[str]:
    """Returns the words of a question by which passages are searched, each once, without the COMMON
    ones: of more than MAX_WORDS the first and the last.
    """
    words = []
    for word in dict.fromkeys(re.findall(r"[^\W_]+", question.lower())):
        if word not in COMMON:
            words.append(word[:MAX_WORD_CHARACTERS])
    if len(words) > MAX_WORDS:
        half = MAX_WORDS // 2
        words = [*words[:half], *words[-half:]]
    return words


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
    last_by_user = -1
    for index, message in enumerate(messages):
        if message["role"] == "user":
            last_by_user = index
    passages: list[Passage] = []
    if documents and last_by_user >= 0:
        question = messages[last_by_user]["content"]
        passages = documents.find(question, tokenizer, min(BUDGET, context // 4))
    while True:
        extended = [*messages]
        if passages:
            extended[last_by_user] = _with_passages(messages[last_by_user], passages)
        tokens = tokenize(extended)
        if not passages or len(tokens) <= context * 3 // 4:
            return tokens, passages
        passages.pop()  # the one that fits the question least


def _with_passages(message: Message, passages: Sequence[Passage]) -> Message:
    """Returns the user's message with passages before it."""
    texts = "".join(f"{passage.text}\n\n" for passage in passages)
    return {**message, "content": f"Answer by these passages:\n\n{texts}{message['content']}"}


def cut(text: str) -> Iterator[str]:
    """Yields the passages of a text: its paragraphs. A heading (#) is joined to the paragraph below
    it, and a long paragraph is cut.

    Paragraphs are not joined: SmolLM2-135M answered 5 of 16 questions from passages of several, and
    16 from single ones.
    """
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r"^(#.*)\n\s*\n", r"\1\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        for match in PASSAGE.finditer(paragraph.strip()):
            yield match[0].strip()


def _file_name(file: Path, path: Path) -> str:
    """Returns a file's path below `path`, or its name if it is `path`. What is not UTF-8 becomes `?`."""
    name = file.name
    if file != path:
        name = str(file.relative_to(path))
    return name.encode(errors="replace").decode()
