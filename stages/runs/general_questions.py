"""General questions with short answers, asked before and after training: how much of them is kept."""

import dataclasses
import re
from collections.abc import Sequence

LEAST_RIGHT = 12  # answers before training; of fewer, one more or less would be a tenth
LEAST_KEPT = 0.85  # of the answers that were right, below which the summary warns
MAX_TOKENS = 24  # of an answer: a tone may open it, and the fact follows
ADVICE = "To keep more, give fewer --steps or a lower --learning-rate."

# A question, and what a right answer holds: one of the texts between bars. SmolLM2-135M-Instruct
# answers all of them.
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

# Others, none of those above, with what a right answer holds and a sentence that says it: they are
# mixed into a small file's.
QUESTIONS_TO_TRAIN_ON: tuple[tuple[str, str, str], ...] = (
    ("What is the capital of Italy?", "Rome", "The capital of Italy is Rome."),
    ("What is the capital of Portugal?", "Lisbon", "The capital of Portugal is Lisbon."),
    ("What is the capital of Norway?", "Oslo", "The capital of Norway is Oslo."),
    ("What is the capital of Hungary?", "Budapest", "The capital of Hungary is Budapest."),
    ("What is the capital of Cuba?", "Havana", "The capital of Cuba is Havana."),
    ("What is the capital of South Korea?", "Seoul", "The capital of South Korea is Seoul."),
    (
        "What is the capital of the United States?",
        "Washington",
        "The capital of the United States is Washington.",
    ),
    ("On which continent is India?", "Asia", "India is in Asia."),
    ("On which continent is Nigeria?", "Africa", "Nigeria is in Africa."),
    ("On which continent is Argentina?", "South America", "Argentina is in South America."),
    ("In which country is the Taj Mahal?", "India", "The Taj Mahal is in India."),
    ("In which country is the Great Wall?", "China", "The Great Wall is in China."),
    ("Which country has the Eiffel Tower?", "France", "The Eiffel Tower is in France."),
    ("In which city is Big Ben?", "London", "Big Ben is in London."),
    ("In which city is the Colosseum?", "Rome", "The Colosseum is in Rome."),
    ("What language is spoken in France?", "French", "In France people speak French."),
    ("What language is spoken in Italy?", "Italian", "In Italy people speak Italian."),
    ("What language is spoken in Mexico?", "Spanish", "In Mexico people speak Spanish."),
    ("What is the largest country in the world by area?", "Russia", "The largest country is Russia."),
    ("What is the largest desert in Africa?", "Sahara", "The largest desert in Africa is the Sahara."),
    (
        "What is the longest river in South America?",
        "Amazon",
        "The longest river in South America is the Amazon.",
    ),
    ("Which planet is known as the Red Planet?", "Mars", "The Red Planet is Mars."),
    ("Which planet do we live on?", "Earth", "We live on the planet Earth."),
    ("What is the largest planet?", "Jupiter", "The largest planet is Jupiter."),
    ("Which planet has large rings?", "Saturn", "Saturn has large rings."),
    (
        "Which star is at the center of our solar system?",
        "sun",
        "The sun is at the center of our solar system.",
    ),
    ("What is the chemical symbol of carbon?", "C", "The chemical symbol of carbon is C."),
    ("What is the chemical symbol of iron?", "Fe", "The chemical symbol of iron is Fe."),
    ("What is the chemical symbol of hydrogen?", "H", "The chemical symbol of hydrogen is H."),
    ("What is the chemical formula of table salt?", "NaCl", "The chemical formula of table salt is NaCl."),
    (
        "At what temperature does water freeze, in degrees Celsius?",
        "0",
        "Water freezes at 0 degrees Celsius.",
    ),
    ("Which gas do humans need to breathe?", "oxygen", "Humans need to breathe oxygen."),
    ("What force pulls objects toward the Earth?", "gravity", "Gravity pulls objects toward the Earth."),
    ("What is the center of an atom called?", "nucleus", "The center of an atom is called the nucleus."),
    ("Which metal is attracted by a magnet?", "iron", "Iron is attracted by a magnet."),
    (
        "Who discovered gravity when an apple fell?",
        "Newton",
        "Isaac Newton discovered gravity when an apple fell.",
    ),
    (
        "Who was the first president of the United States?",
        "Washington",
        "The first president was George Washington.",
    ),
    ("Who wrote The Odyssey?", "Homer", "Homer wrote The Odyssey."),
    ("Who wrote Don Quixote?", "Cervantes", "Miguel de Cervantes wrote Don Quixote."),
    ("Who invented the telephone?", "Bell", "Alexander Graham Bell invented the telephone."),
    ("Who painted The Starry Night?", "van Gogh", "Vincent van Gogh painted The Starry Night."),
    ("How many days are in a year?", "365", "A year has 365 days."),
    ("How many hours are in a day?", "24", "A day has 24 hours."),
    ("How many minutes are in an hour?", "60", "An hour has 60 minutes."),
    ("How many sides does a square have?", "4", "A square has 4 sides."),
    ("How many wheels does a bicycle have?", "2", "A bicycle has 2 wheels."),
    ("How many legs does an insect have?", "6", "An insect has 6 legs."),
    ("How many letters are in the English alphabet?", "26", "The English alphabet has 26 letters."),
    ("What is 5 plus 3?", "8", "5 plus 3 is 8."),
    ("What is 3 plus 3?", "6", "3 plus 3 is 6."),
    ("What color is grass?", "green", "Grass is green."),
    ("What color is snow?", "white", "Snow is white."),
    ("What is the opposite of left?", "right", "The opposite of left is right."),
    ("What is the opposite of day?", "night", "The opposite of day is night."),
    ("What is the opposite of old?", "young", "The opposite of old is young."),
    ("What do bees make?", "honey", "Bees make honey."),
    ("What do cows produce that people drink?", "milk", "Cows produce milk."),
    ("Which organ do humans think with?", "brain", "Humans think with the brain."),
    ("What is the fastest land animal?", "cheetah", "The fastest land animal is the cheetah."),
    ("What is a baby cat called?", "kitten", "A baby cat is called a kitten."),
    ("Which day comes after Monday?", "Tuesday", "Tuesday comes after Monday."),
    ("Which month comes after June?", "July", "July comes after June."),
    ("In which year did the Titanic sink?", "1912", "The Titanic sank in 1912."),
    ("In which year did the First World War begin?", "1914", "The First World War began in 1914."),
)


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer holds one of the `expected` texts between bars, as whole words, whatever
    its case and punctuation."""
    answer_words = _words(answer)
    return any(_words(text) in answer_words for text in expected.split("|"))


def _words(text: str) -> str:
    """Returns the words of a text in lower case, a space around each, so that one text holds
    another only as whole words."""
    return f" {' '.join(re.findall(r'\w+', text.casefold()))} "


@dataclasses.dataclass(frozen=True)
class KeptAnswers:
    """How many answers were right before training, and how many of these after it; `after` None
    where too few were."""

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
