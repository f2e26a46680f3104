"""Writes `sentencepiece.txt` beside it: a small vocabulary trained by sentencepiece, and how it cuts some texts.

    peers/bin/pip install sentencepiece
    peers/bin/python tests/storage/golden/ask_sentencepiece.py

The settings are those of Llama 2 and TinyLlama: BPE, bytes for what is unknown, digits one by one,
a space before the first word. First line: tokens, scores and kinds, as a GGUF file lists them; then
a line a text, with its tokens.
"""

import io
import json
from pathlib import Path

import sentencepiece

WORDS = (
    "the",
    "king",
    "and",
    "queen",
    "of",
    "a",
    "far",
    "land",
    "went",
    "down",
    "to",
    "sea",
    "where",
    "ships",
    "with",
    "red",
    "sails",
    "lay",
    "at",
    "anchor",
    "all",
    "day",
)
TEXTS = [
    "the king went down to sea",
    "",
    " ",
    "  two  spaces",
    "Ships, anchored; 1234 sails.",
    "naïve café — 日本語 🙂",
    "line one\nline two\n\n\tand a tab ",
    "seaseasea kingqueen",
    "a",
    "▁the sea",
    "the " * 40,
    "the king1 2sea",
]


def main() -> None:
    lines = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(9)) for i in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    every = range(processor.get_piece_size())
    kind = lambda i: (
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
    )
    vocabulary = {
        "tokens": [processor.id_to_piece(i) for i in every],
        "scores": [processor.get_score(i) for i in every],
        "kinds": [kind(i) for i in every],
    }
    texts = [{"text": text, "ids": processor.encode(text)} for text in TEXTS]
    lines = [json.dumps(line, ensure_ascii=False) for line in [vocabulary, *texts]]
    Path(__file__).with_name("sentencepiece.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
