"""How a reader refuses a file."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import UserError


def refusal(read: Callable[..., Any], *args: Any) -> str:
    """Returns the sentence with which a file is refused: one short, printable line."""
    with pytest.raises(UserError) as error:
        read(*args)
    sentence = str(error.value)
    assert len(sentence) < 600
    assert sentence.isprintable()
    return sentence
