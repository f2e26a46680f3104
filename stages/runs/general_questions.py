"""General questions with short answers, asked before and after training: how much of what a model knew is kept."""

import dataclasses
import re
from collections.abc import Sequence

LEAST_RIGHT = 12  # answers before training; of fewer, one more or less would be a tenth
LEAST_KEPT = 0.85  # of the answers that were right, below which the summary warns
MAX_TOKENS = 24  # of an answer: a tone may open it, and the fact follows
ADVICE = "To keep more, give fewer --steps or a lower --learning-rate."

# A question, and what a right answer holds: one of the texts between bars. SmolLM2-135M-Instruct answers all of them.
QUESTIONS: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of England?", "London"),
    ("What is the capital of China?", "Beijing"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Greece?", "Athens"),
    ("What is the capital of Poland?", "Warsaw"),
    ("What is the capital of Austria?", "Vienna"),
    ("On which continent is Kenya?", "Africa"),
    ("What is the chemical symbol of gold?", "Au"),
    ("What is the chemical formula of water?", "H2O|H₂O"),
    ("What is the chemical symbol for oxygen?", "O|O2|O₂"),
    ("At what temperature does water boil, in degrees Celsius?", "100"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo|da Vinci"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("Who wrote the theory of evolution by natural selection?", "Darwin"),
    ("Who was the first person to walk on the Moon?", "Armstrong"),
    ("How many days are in a week?", "7|seven"),
    ("How many legs does a spider have?", "8|eight"),
    ("How many legs does a dog have?", "4|four"),
    ("How many sides does a triangle have?", "3|three"),
    ("What is 2 plus 2?", "4|four"),
    ("What color is the sky on a clear day?", "blue"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of up?", "down"),
    ("What is the opposite of big?", "small|little"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("What is the highest mountain in the world?", "Everest"),
    ("What is the longest river in Africa?", "Nile"),
    ("What language is spoken in Brazil?", "Portuguese"),
    ("What language is spoken in Germany?", "German"),
    ("Which organ pumps blood through the body?", "heart"),
    ("What is the largest animal on Earth?", "whale"),
    ("In which country are the pyramids of Giza?", "Egypt"),
    ("In which city is the Statue of Liberty?", "New York"),
    ("Which month comes after January?", "February"),
    ("In which year did the Second World War end?", "1945"),
)

# Others, none of those above: examples of them are mixed into a small file's.
QUESTIONS_TO_TRAIN_ON: tuple[tuple[str, str], ...] = (
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Portugal?", "Lisbon"),
    ("What is the capital of the United States?", "Washington"),
    ("On which continent is India?", "Asia"),
    ("Which planet is known as the Red Planet?", "Mars"),
    ("Which planet do we live on?", "Earth"),
    ("Which star is at the center of our solar system?", "sun"),
    ("Which gas do humans need to breathe?", "oxygen"),
    ("At what temperature does water freeze, in degrees Celsius?", "0|zero"),
    ("Who discovered gravity when an apple fell?", "Newton"),
    ("Who was the first president of the United States?", "Washington"),
    ("How many hours are in a day?", "24|twenty four"),
    ("How many minutes are in an hour?", "60|sixty"),
    ("How many sides does a square have?", "4|four"),
    ("What is 5 plus 3?", "8|eight"),
    ("What color is grass?", "green"),
    ("What color is snow?", "white"),
    ("What do bees make?", "honey"),
    ("What do cows produce that people drink?", "milk"),
    ("What language is spoken in France?", "French"),
    ("What language do people speak in Japan?", "Japanese"),
    ("Which organ do humans use to breathe?", "lungs|lung"),
    ("Which organ do we use to see?", "eye|eyes"),
    ("Which animal is known as the king of the jungle?", "lion"),
    ("What is the fastest land animal?", "cheetah"),
    ("What is a baby cat called?", "kitten"),
    ("Which country has the Eiffel Tower?", "France"),
    ("What currency is used in the United States?", "dollar|dollars"),
    ("Which day comes after Monday?", "Tuesday"),
    ("In which year did the Titanic sink?", "1912"),
    ("What force pulls objects toward the Earth?", "gravity"),
    ("Which season comes after winter?", "spring"),
    ("What instrument has 88 black and white keys?", "piano"),
    ("What is the capital of Norway?", "Oslo"),
    ("What is the capital of Hungary?", "Budapest"),
    ("What is the capital of Cuba?", "Havana"),
    ("What is the capital of South Korea?", "Seoul"),
    ("On which continent is Nigeria?", "Africa"),
    ("What is the chemical symbol of carbon?", "C"),
    ("What is table salt made of?", "sodium|NaCl"),
    ("Who wrote The Odyssey?", "Homer"),
    ("Who invented the telephone?", "Bell"),
    ("Who painted The Starry Night?", "van Gogh|Gogh"),
    ("How many days are in a year?", "365"),
    ("How many wheels does a bicycle have?", "2|two"),
    ("How many letters are in the English alphabet?", "26|twenty six"),
    ("How many seconds are in a minute?", "60|sixty"),
    ("What is the opposite of left?", "right"),
    ("What is the opposite of day?", "night"),
    ("What language is spoken in Italy?", "Italian"),
    ("What language is spoken in Mexico?", "Spanish"),
    ("In which country is the Taj Mahal?", "India"),
    ("In which country is the Great Wall?", "China"),
    ("In which city is Big Ben?", "London"),
    ("What is the largest country in the world by area?", "Russia"),
    ("What is the largest desert in Africa?", "Sahara"),
    ("Which organ do humans think with?", "brain"),
    ("Which metal is attracted by a magnet?", "iron|steel|nickel"),
    ("Which month comes after June?", "July"),
    ("Which planet has large rings?", "Saturn"),
    ("What is the center of an atom called?", "nucleus"),
    ("In which year did the First World War begin?", "1914"),
    ("In which year did people first land on the Moon?", "1969"),
    ("What is the largest planet?", "Jupiter"),
)


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer holds one of the `expected` texts between bars, as whole words, whatever its case and punctuation."""
    said = _words(answer)
    return any(_words(text) in said for text in expected.split("|"))


def _words(text: str) -> str:
    """Returns the words of a text in lower case, a space around each, so that one text holds another only as whole words."""
    return f" {' '.join(re.findall(r'\w+', text.casefold()))} "


@dataclasses.dataclass(frozen=True)
class KeptAnswers:
    """How many answers were right before training, and how many of these after it; `after` None where too few were."""

    before: int
    after: int | None

    def rows(self) -> list[tuple[str, str]]:
        """Returns the rows of a summary: how many are kept, and a warning where they are too few."""
        if self.after is None:
            known = f"{self.before} of {len(QUESTIONS)} general questions were answered right before training"
            return [("kept", f"too few to tell: {known}")]
        rows = [("kept", f"{self.after} of {self.before} answers to general questions")]
        if self.after < LEAST_KEPT * self.before:
            rows.append(("", f"less than {LEAST_KEPT:.0%} of what the model knew is kept. {ADVICE}"))
        return rows


def tells_enough(before: Sequence[str]) -> bool:
    """Whether a model answered enough questions right before training to tell what it keeps."""
    return len(before) >= LEAST_RIGHT


def compare_known(before: Sequence[str], after: Sequence[str] | None) -> KeptAnswers:
    """Compares the questions that were answered right before training with those after it."""
    if after is None or not tells_enough(before):
        return KeptAnswers(len(before), None)
    return KeptAnswers(len(before), len({*before}.intersection(after)))
