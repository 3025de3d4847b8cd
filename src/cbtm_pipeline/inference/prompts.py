"""Token ids from the texts and chats of requests.

Every training document begins with the separator token, so a text gets it, too. Token ids stay as they are.
A chat uses the tokenizer's template. Without one it is written as plain turns, for a model that only goes on
with text:

    user: What is rye?
    assistant: A grain.
    user: And spelt?
    assistant:

Then the answer ends where the model would begin the next turn.
"""

from collections.abc import Sequence
from typing import Any

from cbtm_pipeline.inference.refusal import Refused
from cbtm_pipeline.inference.requests import Prompt

TURNS = ("\nuser:", "\nsystem:", "\nassistant:")


def of_text(tokenizer: Any, text: str, separator: int | None) -> Prompt:
    """The ids of a text, after the separator unless it begins with it."""
    ids = list(tokenizer.encode(_checked(text), add_special_tokens=False))
    if separator is None or ids[:1] == [separator]:
        return _not_empty(ids)
    return Prompt([separator, *ids], 1)


def of_ids(ids: Sequence[int], vocab_size: int) -> Prompt:
    """Ids that the client made."""
    if wrong := [i for i in ids if i >= vocab_size]:
        expected = f"Expected ids below {vocab_size}, the size of the vocabulary"
        raise Refused(400, f"prompt: token id {wrong[0]}. {expected}. Use this model's tokenizer.", "prompt")
    return _not_empty(ids)


def of_chat(
    tokenizer: Any, messages: Sequence[dict[str, str]], separator: int | None
) -> tuple[Prompt, Sequence[str]]:
    """The ids of a chat, and texts that end the answer."""
    for message in messages:
        _checked(message["content"])
    if not getattr(tokenizer, "chat_template", None):
        turns = [f"{message['role']}: {message['content']}" for message in messages]
        return of_text(tokenizer, "\n".join([*turns, "assistant:"]), separator), TURNS
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like about turns that they do not take
        found = " ".join(str(error).split())[:200]
        expected = "Expected turns that the tokenizer's chat template takes"
        raise Refused(400, f"messages: {found}. {expected}. Correct them.", "messages") from error
    return of_text(tokenizer, text, separator), ()


def _checked(text: str) -> str:
    """The text, if it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"prompt: half a surrogate pair at character {error.start}"
        raise Refused(400, f"{found}. Expected Unicode text. Correct it.", "prompt") from error
    return text


def _not_empty(ids: Sequence[int]) -> Prompt:
    if not ids:
        raise Refused(400, "prompt: empty. Expected at least one token. Write something.", "prompt")
    return Prompt(ids)
