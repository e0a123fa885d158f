"""A checkpoint's own tokenizer.json, read as it is and never rewritten.

Text becomes ids by a copy of the file's pipeline, in memory, that has no added tokens and no
vocabulary entry for them. So text inside a conversation cannot become `<|end|>`, `</s>` or any
other added token, whatever its words are; for other text the ids are the file's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import tokenizers

from mlx_medphi.data.examples import Message
from mlx_medphi.errors import DataError, TokenizerError, capped
from mlx_medphi.text.template import END, END_OF_TEXT, ChatTemplate, Piece, role_token
from mlx_medphi.text.tokenizer_files import TokenizerFiles

__all__ = ["TextStream", "Tokenizer"]

# What a token with rstrip swallows: Unicode's White_Space. Python's own strip() takes four
# separators more, U+001C to U+001F.
_WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# How a vocabulary writes a single byte.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PROBE = (
    Message("user", "Doctor: any  fever?\n\nPatient: 38.5 °C, since Monday \n"),
    Message("assistant", " Fever of 38.5 °C."),
)


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """Text to ids and back, as one checkpoint does it. Made by `Tokenizer.load`.

    Args:
        files: the checkpoint's tokenizer files by name, to be copied byte for byte.
        template: the structure of its chats.
        vocab_size: one more than the largest id; the model's embedding may be larger.
        bos_id: the token config's bos_token (`<s>`), which Phi-3's chats do not use.
        eos_id: the token config's eos_token (`<|endoftext|>`), which closes a chat.
        pad_id: the token config's pad_token.
        stop_ids: what ends a generation: generation_config's ids, `<|end|>`, `<|endoftext|>`.

    >>> tokenizer = Tokenizer.load("tests/fixtures/phi3/mini-4k")
    >>> tokenizer.decode(tokenizer.encode_text("Doctor: how are you?"))
    'Doctor: how are you?'
    """

    files: Mapping[str, Path]
    template: ChatTemplate
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    _added: Mapping[str, int]
    _strips: Mapping[str, tuple[bool, bool]]
    _pipeline: tokenizers.Tokenizer
    _plain: tokenizers.Tokenizer

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read the tokenizer files of a checkpoint directory.

        Raises:
            TokenizerError: a file is missing or damaged, a token of Phi-3's chats is missing, or
                the chat template has another structure.
        """
        directory = Path(directory)
        files = TokenizerFiles.read(directory)
        flags = files.pipeline.get_added_tokens_decoder()
        added = {token.content: number for number, token in flags.items()}
        eos = files.tokens["eos_token"] or END_OF_TEXT
        bos = files.tokens["bos_token"] or eos
        roles = [role_token(role) for role in ("system", "user", "assistant")]
        missing = {token for token in (*roles, END, bos, eos) if token not in added}
        if missing:
            raise TokenizerError(
                f"{directory}: tokenizer.json has no added token {capped(missing)}. Expected the "
                "tokens of a Phi-3 chat; take the tokenizer files from a Phi-3 checkpoint."
            )
        closing = {added[token] for token in (END, END_OF_TEXT, eos) if token in added}
        tokenizer = cls(
            files=files.paths,
            template=ChatTemplate.parse(files.chat_template, bos, eos),
            vocab_size=max(files.pipeline.get_vocab(with_added_tokens=True).values()) + 1,
            bos_id=added[bos],
            eos_id=added[eos],
            pad_id=added.get(files.tokens["pad_token"], added[eos]),
            stop_ids=tuple(sorted(closing.union(files.generation_stops))),
            _added=added,
            _strips={token.content: (token.lstrip, token.rstrip) for token in flags.values()},
            _pipeline=files.pipeline,
            _plain=files.plain,
        )
        tokenizer._prove(directory)
        return tokenizer

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} ids, stops at {list(self.stop_ids)})"

    @property
    def end_id(self) -> int:
        """`<|end|>`, behind every message."""
        return self._added[END]

    @property
    def user_id(self) -> int:
        """`<|user|>`."""
        return self._added[role_token("user")]

    @property
    def assistant_id(self) -> int:
        """`<|assistant|>`."""
        return self._added[role_token("assistant")]

    @property
    def system_id(self) -> int:
        """`<|system|>`."""
        return self._added[role_token("system")]

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; never an added token.

        Raises:
            DataError: the text holds half of a surrogate pair, so it cannot be written as UTF-8.
        """
        return list(self._encode(text).ids)

    def encode_with_special(self, text: str) -> list[int]:
        """Ids by the file's own pipeline, where `<|end|>` in the text becomes that token.

        For comparing with a rendered chat template only; conversations go through `encode_pieces`.
        """
        return list(self._pipeline.encode(text, add_special_tokens=False).ids)

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Ids of a chat's parts and, made with them, their loss mask (1 = trained on).

        Text between two tokens is encoded in one go and loses the whitespace that those tokens
        swallow, as in the file's own pipeline.
        """
        ids: list[int] = []
        mask: list[int] = []
        runs = [(special, list(run)) for special, run in groupby(pieces, lambda p: p.special)]
        for at, (special, run) in enumerate(runs):
            if special:
                ids += [self._added[piece.text] for piece in run]
                mask += [int(piece.trained) for piece in run]
                continue
            before = runs[at - 1][1][-1].text if at else ""
            after = runs[at + 1][1][0].text if at + 1 < len(runs) else ""
            run_ids, run_mask = self._encode_run(run, before, after)
            ids += run_ids
            mask += run_mask
        return ids, mask

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; added tokens are left out unless `skip_special` is False."""
        if skip_special:
            added = set(self._added.values())
            ids = [number for number in ids if number not in added]
        return str(self._pipeline.decode(list(ids), skip_special_tokens=False))

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one by one."""
        return TextStream(self._pipeline, frozenset(self._added.values()))

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            return self._plain.encode(text, add_special_tokens=False)
        except TypeError as exc:
            half = next(
                at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"
            )
            raise DataError(
                f"character {half} is half of a surrogate pair. Expected text that can be written "
                "as UTF-8; write the file again from its source."
            ) from exc

    def _encode_run(
        self, run: Sequence[Piece], before: str, after: str
    ) -> tuple[list[int], list[int]]:
        """Ids and mask of neighbouring text pieces; only the last of them can be trained on."""
        text = "".join(piece.text for piece in run)
        content = len(text) - len(run[-1].text)
        if self._strips.get(before, (False, False))[1]:
            content -= len(text) - len(text.lstrip(_WHITE_SPACE))
            text = text.lstrip(_WHITE_SPACE)
        if self._strips.get(after, (False, False))[0]:
            text = text.rstrip(_WHITE_SPACE)
        if not text:
            return [], []
        encoding = self._encode(text)
        if not run[-1].trained:
            return encoding.ids, [0] * len(encoding.ids)
        if content <= 0:
            return encoding.ids, [1] * len(encoding.ids)
        return encoding.ids, [int(end > content) for _, end in encoding.offsets]

    def _prove(self, directory: Path) -> None:
        """Compare a small chat with the file's own pipeline before any work is done with it."""
        pieces = self.template.pieces(_PROBE)
        rendered = "".join(piece.text for piece in pieces)
        if self.encode_pieces(pieces)[0] != self.encode_with_special(rendered):
            raise TokenizerError(
                f"{directory}: tokenizer.json splits text beside its added tokens in another way "
                "than Phi-3's. Take the tokenizer files from a Phi-3 checkpoint."
            )


class TextStream:
    """Text of ids that arrive one by one; single bytes wait for the next id that is none.

    The joined results of `step`, then `flush`, are `Tokenizer.decode` of the same ids.
    """

    # Not tokenizers' DecodeStream: it gives out a character as soon as its bytes are whole, and
    # raises when a further byte makes the run of bytes invalid, which turns all of it to U+FFFD.

    def __init__(self, pipeline: tokenizers.Tokenizer, added: frozenset[int]) -> None:
        self._pipeline = pipeline
        self._added = added
        self._last: list[int] = []  # the id before those that wait: only a first id loses its space
        self._waiting: list[int] = []

    def step(self, token_id: int) -> str:
        """The text that is finished by this id, often empty."""
        if token_id in self._added:
            return ""
        self._waiting.append(token_id)
        is_byte = _BYTE.fullmatch(self._pipeline.id_to_token(token_id) or "")
        return "" if is_byte else self.flush()

    def flush(self) -> str:
        """What waits at the end: bytes of a character, as U+FFFD where it never got its last."""
        if not self._waiting:
            return ""
        before = str(self._pipeline.decode(self._last))
        text = str(self._pipeline.decode([*self._last, *self._waiting]))[len(before) :]
        self._last, self._waiting = self._waiting[-1:], []
        return text
