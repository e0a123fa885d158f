"""The structure of a Phi-3 chat, in the one module that knows its strings.

`ChatTemplate.parse` reads that structure from the checkpoint's own template and refuses a template
it could not reproduce; `pieces` then says which parts of a chat are tokens of the template, which
are text, and which are trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_medphi.data.examples import Message, Role
from mlx_medphi.errors import DataError, TokenizerError

__all__ = ["END", "END_OF_TEXT", "ChatTemplate", "Piece", "role_token"]

END = "<|end|>"
END_OF_TEXT = "<|endoftext|>"

_CONTENT = r"['\"]\s*\+\s*message(?:\[['\"]content['\"]\]|\.content)\s*\+\s*['\"]<\|end\|>(\n?)"
# Phi-3-small and Phi-3-vision write one rule for every role; the others one rule per role.
_ANY_ROLE = r"<\|['\"]\s*\+\s*message(?:\[['\"]role['\"]\]|\.role)\s*\+\s*['\"]\|>"
_EACH_MESSAGE = re.compile(rf"{_ANY_ROLE}(\n?){_CONTENT}")
_USER_MESSAGE = re.compile(rf"<\|user\|>(\n?){_CONTENT}")
_LOOP = re.compile(r"^(?P<head>.*?)\{%\s*for\b(?P<loop>.*)\{%\s*endfor\s*%\}(?P<tail>.*)$", re.S)


def role_token(role: Role) -> str:
    """The token that opens a message: `<|user|>`, `<|assistant|>` or `<|system|>`."""
    return f"<|{role}|>"


@dataclass(frozen=True)
class Piece:
    """A part of a rendered chat: one added token when `special`, plain text otherwise."""

    text: str
    special: bool
    trained: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """What Phi-3's published templates differ in.

    Args:
        opening: the token before the first message, or nothing.
        closing: the token after the last message of a finished chat, or nothing.
        after_role: text between a role token and the message, a line break in Phi-3.
        after_end: text behind `<|end|>`, a line break in Phi-3.
        knows_system: whether system messages are written at all.
        skips_empty_system: Phi-3.5 leaves an empty system message out.
    """

    opening: str
    closing: str
    after_role: str
    after_end: str
    knows_system: bool
    skips_empty_system: bool

    @classmethod
    def parse(cls, template: str, bos_token: str, eos_token: str) -> ChatTemplate:
        """Read a jinja template of the Phi-3 family.

        Raises:
            TokenizerError: the template has another structure; the message says what is missing.
        """
        flat = _flatten(template)
        parts = _LOOP.match(flat)
        if parts is None:
            raise _unknown("no loop over the messages")
        message = _USER_MESSAGE.search(flat) or _EACH_MESSAGE.search(flat)
        any_role = _EACH_MESSAGE.search(flat) is not None
        if message is None:
            raise _unknown("no rule for <|user|> that ends in <|end|>")
        if role_token("assistant") not in flat:
            raise _unknown("no <|assistant|>")
        literal = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", "", flat, flags=re.S)
        if literal:
            raise _unknown("text outside its rules")
        if re.fullmatch(r"(\{\{\s*bos_token\s*\}\})?", parts["head"]) is None:
            raise _unknown("something other than bos_token before the messages")
        if "bos_token" in parts["loop"] or "eos_token" in parts["loop"]:
            raise _unknown("a bos_token or eos_token inside the loop over the messages")
        return cls(
            opening=bos_token if parts["head"] else "",
            closing=eos_token if "eos_token" in parts["tail"] else "",
            after_role=message[1],
            after_end=message[2],
            knows_system=any_role or role_token("system") in flat,
            skips_empty_system=re.search(r"==\s*'system'\s+and\s+message", flat) is not None,
        )

    def pieces(self, messages: Sequence[Message], generation: bool = False) -> list[Piece]:
        """A chat as its parts; trained are an assistant's text and the `<|end|>` behind it.

        Args:
            messages: user and assistant in turn, after an optional system message.
            generation: end in `<|assistant|>`, for the model to go on, not in the closing token.

        Raises:
            DataError: a role the template cannot write.
        """
        out = [Piece(self.opening, True)]
        for message in messages:
            self._check_role(message.role)
            if message.role == "system" and not message.content and self.skips_empty_system:
                continue
            trained = message.role == "assistant"
            out += [
                Piece(role_token(message.role), True),
                Piece(self.after_role, False),
                Piece(message.content, False, trained),
                Piece(END, True, trained),
                Piece(self.after_end, False),
            ]
        if generation:
            out += [Piece(role_token("assistant"), True), Piece(self.after_role, False)]
        else:
            out.append(Piece(self.closing, True))
        return [piece for piece in out if piece.text]

    def _check_role(self, role: str) -> None:
        known = {"user", "assistant"} | ({"system"} if self.knows_system else set())
        if role not in known:
            raise DataError(
                f"a message has the role {role!r}; this checkpoint's chat template writes "
                f"{', '.join(sorted(known))}. Put the text into a user message."
            )


def _flatten(template: str) -> str:
    """The template without the whitespace that rendering drops, neighbouring literals joined."""
    text = template.replace("\\n", "\n")
    text = re.sub(r"['\"]\s*\+\s*['\"]", "", text)
    # As transformers renders: trim_blocks, lstrip_blocks, and the minus signs of jinja.
    text = re.sub(r"\s*(\{[{%#])-", r"\1", text)
    text = re.sub(r"-([}%#]\})\s*", r"\1", text)
    text = re.sub(r"^[ \t]+(\{[%#])", r"\1", text, flags=re.M)
    text = re.sub(r"([%#]\})\n", r"\1", text)
    return text.removesuffix("\n")


def _unknown(what: str) -> TokenizerError:
    return TokenizerError(
        f"the chat template is not of Phi-3's form: {what}. Expected <|user|>, <|assistant|> and "
        "<|end|> around every message; take tokenizer_config.json from a Phi-3 checkpoint."
    )
