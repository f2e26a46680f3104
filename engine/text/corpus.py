"""Reads documents of text files, JSON and parquet; holds some out; encodes a text once, into the cache."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from engine.errors import UserError
from engine.files import cache_folder, decode_utf8
from engine.manifest import build_once, write_manifest
from engine.text import OnProgress
from engine.text.rows import read_jsonl_texts, read_parquet_texts
from engine.text.tokenizer import Tokenizer

FORMATS = (
    "a text file, a folder of text files, .jsonl or .parquet with a `text` column, or a .bin of token ids"
)
Document = Callable[[], Iterator[str]]  # yields a text in parts, from its beginning at each call
PART = 2**20  # characters of a text file that are in memory at a time
TOKEN_BLOCK = 2**20  # token ids of a .bin that are checked at a time
MARKS = ".,;:!?…\"'“”‘’«»¿¡。，！？、"  # which `normalize` takes off words
READERS = {".jsonl": read_jsonl_texts, ".parquet": read_parquet_texts}  # of files with a document in each row
TEXT_ENDINGS = {".txt", ".md", *READERS}
MAX_NAMED = 5  # skipped files, or links, that a note names


@dataclasses.dataclass(frozen=True)
class Corpus[T]:
    """An iterable of documents (or conversations), read anew each time, a part of a file in memory
    at a time.

    Raises UserError, with file and line or position, at what cannot be read, and when there was
    nothing at all.
    """

    name: str
    read: Callable[[], Iterator[T]]
    kind: str = "text"
    note: str = ""  # which files of a folder were skipped

    def __iter__(self) -> Iterator[T]:
        return self.read()


def read_corpus(path: Path) -> Corpus[Document]:
    """Opens the documents at `path`: a text file (one document), .jsonl or .parquet (one a row), or
    a folder.

    A folder is read recursively in sorted order, without hidden files; `note` says which files were
    skipped: those that are not text, and those to which a link leads out of the folder. Text is
    kept as it is, line ends too; empty documents are left out. Raises UserError for a missing or
    empty path, for a file that is not text, and for a folder that holds none.
    """
    files, note = find_text_files(path)

    def read() -> Iterator[Document]:
        for _, document in read_documents(path, files):
            yield document

    return Corpus(str(path), read, note=note)


def find_text_files(path: Path, max_bytes: int | None = None) -> tuple[list[Path], str]:
    """Returns the text files at a path, and a note that says which files of a folder were left out.

    A link that leads out of the folder is not followed: whoever fills a folder may not be allowed
    to read what it leads to. Raises UserError as `read_corpus` does; and for texts of more than
    `max_bytes` together, of which it reads no more.
    """
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"There is no text at {path}; wanted {FORMATS}.")
    candidates = [path]
    links: set[Path] = set()
    if path.is_dir():
        entries = [entry for entry in sorted(path.rglob("*")) if not _is_hidden(entry.relative_to(path))]
        links = _links_out_of(path, entries)
        candidates = [entry for entry in entries if entry.is_file() and entry not in links]
    files, total = _choose_text_files(path, candidates, max_bytes)
    chosen = set(files)
    skipped = [file for file in candidates if file not in chosen]
    advice = _advise_converting(path, skipped)
    links_note = _note_on_links(path, sorted(links))
    if not files and path.is_dir():
        message = f"The folder {path} holds no text files"
        if skipped:
            message += f", only others: {_count_endings(skipped)}"
        raise UserError(f"{message}{advice}. {links_note}".rstrip())
    if not files:
        raise UserError(f"{path} is not UTF-8 text; wanted {FORMATS}.")
    if not total:
        raise UserError(f"{path} is empty: it holds no text.")
    if not skipped:
        return files, links_note
    note = f"Skipped {len(skipped)} of {len(candidates)} files in {path}"
    note += f": not UTF-8 text ({_count_endings(skipped)}){advice}."
    return files, f"{note} {links_note}".rstrip()


def _choose_text_files(
    path: Path, candidates: Iterable[Path], max_bytes: int | None
) -> tuple[list[Path], int]:
    """Returns those of the files at a path that are text, and their bytes together.

    Raises UserError at the first text with which they have more than `max_bytes`.
    """
    # In a folder, files with these endings are read without a look at their bytes. A single file is
    # read by its ending too: where it is not text, the error of reading it says at which byte.
    read_by_ending = {".parquet"}
    if not path.is_dir():
        read_by_ending = TEXT_ENDINGS
    files: list[Path] = []
    total = 0
    for file in candidates:
        size = file.stat().st_size
        is_too_much = max_bytes is not None and total + size > max_bytes
        parts = None
        if is_too_much:
            parts = 1  # enough to tell whether to refuse a text or to skip the file
        if file.suffix.lower() not in read_by_ending and not is_text(file, parts):
            continue
        if is_too_much:
            raise UserError(
                f"{file} has {size:,} bytes, and the texts at {path} more than {max_bytes:,} with it: "
                "that is the most that is searched. Take texts out."
            )
        total += size
        files.append(file)
    return files, total


def _count_endings(files: Iterable[Path]) -> str:
    """Returns how many files have each ending, the most frequent first: `3 .png, 1 .pdf`."""
    endings = collections.Counter(file.suffix or "without an ending" for file in files)
    return ", ".join(f"{count} {ending}" for ending, count in endings.most_common())


def _advise_converting(folder: Path, skipped: Iterable[Path]) -> str:
    """Returns the end of a sentence that names files with the ending of a text; empty if there are none."""
    files = [file for file in skipped if file.suffix.lower() in TEXT_ENDINGS]
    if not files:
        return ""
    names = ", ".join(str(file.relative_to(folder)) for file in files[:MAX_NAMED])
    return f"; {names} should be UTF-8: convert with iconv, for example"


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _links_out_of(folder: Path, entries: Iterable[Path]) -> set[Path]:
    """Returns the links among the entries of a folder that lead out of it."""
    roots = [folder.resolve()]
    # the hub's cache has the files of datasets--ORG--NAME/snapshots/REVISION beside it
    for parent in roots[0].parents:
        if parent.name == "snapshots" and "--" in parent.parent.name:
            roots.append(parent.parent / "blobs")
    links = [entry for entry in entries if entry.is_symlink()]
    return {link for link in links if not any(link.resolve().is_relative_to(root) for root in roots)}


def _note_on_links(folder: Path, links: Sequence[Path]) -> str:
    if not links:
        return ""
    names = [str(link.relative_to(folder)) for link in links[:MAX_NAMED]]
    if len(links) > MAX_NAMED:
        names.append(f"and {len(links) - MAX_NAMED} more")
    outside = f"Skipped what lies outside of {folder}, to which links lead: {', '.join(names)}."
    return f"{outside} Copy it in to have it read."


def is_text(file: Path, parts: int | None = None) -> bool:
    """Returns whether a file is UTF-8, and has no zero byte unless its ending is in TEXT_ENDINGS.

    Checks the first `parts` of PART characters, or all. True for a file that cannot be opened:
    the error of reading it says why.
    """
    may_have_zeros = file.suffix.lower() in TEXT_ENDINGS
    try:
        with file.open(encoding="utf-8") as opened:
            for part in itertools.islice(_parts(opened), parts):
                if "\0" in part and not may_have_zeros:
                    return False
    except UnicodeDecodeError:
        return False
    except OSError:
        return True
    return True


def normalize(text: str) -> str:
    """Returns a text's words without case and the marks of sentences around them: copies of a text
    have the same.

    All else stays: 1 - 23 is not 12 - 3, and 1.5 not 15.
    """
    words = []
    for word in text.casefold().split():
        bare = word.strip(MARKS)
        words.append(bare if bare[-1:].isalpha() else word)
    return " ".join(words) or text


def without_copies(held_out: Corpus[Document], train: Corpus[Document]) -> Corpus[Document]:
    """Leaves out the held-out documents that `normalize` finds in the training text too; the name
    says how many.

    Raises UserError when nothing is left.
    """
    digests = [_digest_words(document) for document in held_out]
    starts = {_start(document) for document in held_out}
    distinct = {*digests}
    copies = set()
    for document in train:
        if _start(document) in starts:
            digest = _digest_words(document)
            if digest in distinct:
                copies.add(digest)
    if not copies:
        return held_out
    count = f"{sum(digest in copies for digest in digests):,} of {len(digests):,} documents"
    if copies == distinct:
        raise UserError(
            f"{count} of {held_out.name} are in {train.name} too: nothing is held out. Give another text."
        )
    name = f"{held_out.name}, without {count} that are in the training text too"

    def read() -> Iterator[Document]:
        for document in held_out:
            if _digest_words(document) not in copies:
                yield document

    return Corpus(name, read)


def _start(document: Document) -> str:
    """Returns the first words. All of a long training text is compared only where these are equal."""
    return normalize("".join(characters(document, 0, 4000)))[:200]


def _digest_words(document: Document) -> bytes:
    """Returns the SHA-256 of what `normalize` makes of a document."""
    digest = hashlib.sha256()
    unfinished = ""  # a word at the end of a part, which may go on in the next part
    for part in itertools.chain(document(), [" "]):  # the space ends the last word
        text = unfinished + part
        words = text.split()
        unfinished = ""
        if words and not text[-1].isspace():
            unfinished = words.pop()
        if words:
            digest.update(f"{normalize(' '.join(words))} ".encode("utf-8", "surrogatepass"))
    return digest.digest()


def hold_out(corpus: Corpus[Document], fraction: float = 0.05) -> tuple[Corpus[Document], Corpus[Document]]:
    """Splits into (training, validation): the last `fraction` of the documents, or of the text when
    there are too few.

    A text is cut at the start of a line where one is near. Raises UserError when there is too
    little to cut in two.
    """
    enough = math.ceil(1 / fraction)  # documents, of which at least one is held out
    documents = iter(corpus)
    first = [*itertools.islice(documents, enough)]
    count = len(first) + sum(1 for _ in documents)

    def part(name: str, read: Callable[[], Iterator[Document]]) -> Corpus[Document]:
        return Corpus(f"{corpus.name}, {name}", read)

    if count >= enough:
        cut = max(1, count - round(count * fraction))
        train = part(f"the first {cut} documents", lambda: itertools.islice(corpus, cut))
        validation = part(f"the last {count - cut} documents", lambda: itertools.islice(corpus, cut, None))
        return train, validation
    before, after = _cut_text(first, fraction, corpus.name)
    percent = f"the last {100 * fraction:g}%"
    train = part(f"all but {percent}", functools.partial(iter, before))
    validation = part(percent, functools.partial(iter, after))
    return train, validation


def characters(document: Document, start: int, stop: int = sys.maxsize) -> Iterator[str]:
    """Yields the characters from `start` to `stop` of a document."""
    for part in document():
        piece = part[max(start, 0) : max(stop, 0)]
        if piece:
            yield piece
        start = start - len(part)
        stop = stop - len(part)
        if stop <= 0:
            return


def _cut_text(documents: list[Document], fraction: float, name: str) -> tuple[list[Document], list[Document]]:
    """Cuts documents in two, so that about `fraction` of their characters are in the second part.

    Cuts at the start of a line where one is near, and leaves out documents without text.
    """
    lengths = [sum(map(len, document())) for document in documents]
    total = sum(lengths)
    if total < 2:
        raise UserError(f"{name} has {total} character: too short to hold a part out.")
    # `cut`, `near` and `begin` count characters of all documents together.
    cut = min(max(1, int(total * (1 - fraction))), total - 1)
    near = min(cut, total - cut) // 2  # so neither part can become empty
    begin = 0  # of documents[index], in which the cut lies
    index = 0
    while cut >= begin + lengths[index]:
        begin += lengths[index]
        index += 1
    document = documents[index]
    at = _nearest_line_start(document, cut - begin, near)
    before = functools.partial(characters, document, 0, at)
    after = functools.partial(characters, document, at)
    first_part: list[Document] = [*documents[:index], before]
    last_part: list[Document] = [after, *documents[index + 1 :]]
    return _with_text(first_part), _with_text(last_part)


def _nearest_line_start(document: Document, at: int, near: int) -> int:
    """Returns the character of a document, at most `near` characters from `at`, at which the nearest
    line starts; `at` if none does.
    """
    first = max(0, at - near - 1)
    around = "".join(characters(document, first, at + near))
    # Where no line ends, `find` returns -1, and the start is `first`: 0, or farther than `near`.
    start_before = first + around.rfind("\n", 0, at - first) + 1
    start_after = first + around.find("\n", at - first) + 1
    nearest = min(start_before, start_after, key=lambda start: abs(start - at))
    if abs(nearest - at) > near:
        return at
    return nearest


def _with_text(documents: Iterable[Document]) -> list[Document]:
    return [document for document in documents if any(document())]


def read_documents(path: Path, files: Iterable[Path]) -> Iterator[tuple[Path, Document]]:
    """Yields each document of the files, which lie at `path`, with its file. Raises UserError as a
    Corpus does.
    """
    any_text = False
    for file in files:
        try:
            reader = READERS.get(file.suffix.lower())
            documents: Iterable[Document]
            if reader:
                documents = (functools.partial(iter, (text,)) for text in reader(file) if text)
            else:
                documents = [functools.partial(_read_text, file)]
            for document in documents:
                if any(document()):
                    any_text = True
                    yield file, document
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    if not any_text:
        raise UserError(f"{path} is empty: it holds no text.")


def _parts(opened: TextIO) -> Iterator[str]:
    """Yields a file's text, PART characters at a time."""
    part = opened.read(PART)
    while part:
        yield part
        part = opened.read(PART)


def _read_text(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            yield from _parts(opened)
    except UnicodeDecodeError:
        decode_utf8(file.read_bytes(), file)  # says where
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """The tokens of a text, memory-mapped from a file."""

    tokens: np.ndarray  # (tokens,) uint16 or uint32, read-only
    bytes: int  # of the text in UTF-8, without the ends of documents: what bits per byte divides by
    path: Path


def open_token_file(
    documents: Iterable[Document], tokenizer: Tokenizer, report: OnProgress = None
) -> TokenFile:
    """Encodes documents, an EOS between each two; or opens them from the cache when text and
    tokenizer are unchanged.

    `documents` is read twice and each document three times. `report`: bytes of UTF-8 done and in
    all. Raises UserError for a text that UTF-8 cannot carry, and for one that is changed while it
    is read.
    """
    digest, text_digest = _digest_documents(documents)
    size = text_digest.size
    key = hashlib.sha256(f"{digest} {tokenizer.digest}".encode()).hexdigest()[:32]
    folder = cache_folder("tokens", room=2 * size + 2**20) / key
    dtype = np.dtype("<u2" if tokenizer.vocab <= 1 << 16 else "<u4")

    def build(building: Path) -> None:
        digest_of_tokens = _write_tokens(building, documents, tokenizer, dtype, size, report)
        if digest_of_tokens != text_digest.hexdigest():
            raise UserError(
                "The text was changed while it was read, so its tokens were not kept. Run the command again."
            )

    build_once(folder, build)
    return TokenFile(np.memmap(folder / "tokens.bin", dtype, "r"), size, folder / "tokens.bin")


def open_bin(path: Path, tokenizer: Tokenizer) -> TokenFile:
    """Opens a file of little-endian uint16 token ids, as nanoGPT's data scripts write, made with
    `tokenizer`.

    Raises UserError when it is missing, empty, of an odd length, or holds an id the tokenizer does
    not have.
    """
    if not path.is_file():
        raise UserError(f"There is no token file at {path}.")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(
            f"{path} has {size} bytes; a file of uint16 token ids has an even number, and more than none."
        )
    tokens = np.memmap(path, "<u2", "r")
    count = 0
    for start in range(0, len(tokens), TOKEN_BLOCK):
        block = tokens[start : start + TOKEN_BLOCK]
        wrong = np.flatnonzero(block >= tokenizer.vocab)
        if len(wrong):
            raise UserError(
                f"{path} holds the id {block[wrong[0]]} at token {start + wrong[0]}, "
                f"and the tokenizer has {tokenizer.vocab} ids: "
                "give the tokenizer that the file was made with."
            )
        count += tokenizer.count_bytes(block)
    return TokenFile(tokens, count, path)


def _digest_documents(documents: Iterable[Document]) -> tuple[str, "_TextDigest"]:
    """Returns two digests of a text: the SHA-256 by which the cache and runs name it, and its
    _TextDigest.

    The SHA-256 is over each document's length and then its text, so each document is read twice.
    The _TextDigest needs one reading: `_write_tokens` makes it again while it encodes, which shows
    whether the text was changed.
    """
    digest = hashlib.sha256()
    text = _TextDigest()
    for document in documents:
        length = sum(len(part.encode("utf-8", "surrogatepass")) for part in document())
        digest.update(length.to_bytes(8, "little"))
        for part in text.read(document):
            digest.update(part.encode("utf-8", "surrogatepass"))
    return digest.hexdigest(), text


class _TextDigest:
    """The SHA-256 of a text and of where its documents end, and its size in bytes of UTF-8. It
    reads each document once.
    """

    def __init__(self) -> None:
        self.size = 0
        self._documents = hashlib.sha256()

    def read(self, document: Document) -> Iterator[str]:
        """Yields the parts of the next document."""
        hashed = hashlib.sha256()
        for part in document():
            # the tokenizer's error says where half a character is
            data = part.encode("utf-8", "surrogatepass")
            hashed.update(data)
            self.size += len(data)
            yield part
        self._documents.update(hashed.digest())

    def hexdigest(self) -> str:
        return self._documents.hexdigest()


def _write_tokens(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    size: int,
    report: OnProgress,
) -> str:
    """Writes `tokens.bin` and its manifest, and returns the digest of the text that was encoded."""
    text = _TextDigest()
    done = 0
    with (folder / "tokens.bin").open("wb") as file:
        for index, document in enumerate(documents):
            parts = tokenizer.encode_parts(text.read(document))
            if index > 0:
                parts = itertools.chain([np.array([tokenizer.eos_id])], parts)
            for part in parts:
                file.write(part.astype(dtype).tobytes())
                done += tokenizer.count_bytes(part)
                if report:
                    report(min(done, size), size)
    write_manifest(folder)
    return text.hexdigest()
