"""Template variables: which of those that a request sends its chat template does not read."""

import functools
import re
from collections.abc import Iterable

MAX_NAMED_VARIABLES = 16  # in a header
IN_HEADER = re.compile(r"\w{1,64}", re.ASCII)  # a name that a header can have
# Variables that fields of the conversation fill.
OF_CONVERSATION = frozenset(("messages", "tools", "add_generation_prompt"))


def unread_variables(source: str, names: Iterable[str]) -> list[str]:
    """Returns the variables that a chat template does not read, as fields of a body.

    It is one field if a header cannot name them.
    """
    unread = [name for name in names if name not in template_variables(source)]
    can_be_named = len(unread) <= MAX_NAMED_VARIABLES and all(map(IN_HEADER.fullmatch, unread))
    if not can_be_named:
        return ["chat_template_kwargs"]
    return [f"chat_template_kwargs.{name}" for name in unread]


@functools.cache
def template_variables(source: str) -> frozenset[str]:
    """Returns the names that a chat template may read from a request, in its expressions and statements.

    Those that fields of the conversation fill are left out.
    """
    code = " ".join(re.findall(r"\{[{%](.*?)[%}]\}", source, re.DOTALL))
    without_texts = re.sub(r"'[^']*'|\"[^\"]*\"", " ", code)
    names = re.findall(r"(?<![.\w])\w+", without_texts)
    return frozenset(names) - OF_CONVERSATION
