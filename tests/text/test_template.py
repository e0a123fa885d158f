"""The chat template's structure, compared with jinja's rendering of the template itself."""

from __future__ import annotations

import pytest

from mlx_medphi.data.examples import Message
from mlx_medphi.errors import DataError, TokenizerError
from mlx_medphi.text.template import ChatTemplate, Piece

BOS, EOS = "<s>", "<|endoftext|>"

_TAIL = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
_RULES = (
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
)
_SYSTEM = "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
_LOOP = "{% for message in messages %}"
_USER_OPENS = (
    "{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + message['content'] + '<|end|>' + "
    "'\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)

# How Phi-3 checkpoints were published, and the two forms people write most.
WITH_SYSTEM = {
    "mini": f"{_LOOP}{{% if message['role'] == 'system' %}}{_SYSTEM}{_RULES}{_TAIL}",
    "phi-3.5": (
        f"{_LOOP}{{% if message['role'] == 'system' and message['content'] %}}"
        f"{_SYSTEM}{_RULES}{_TAIL}"
    ),
    "any-role": (
        f"{{{{ bos_token }}}}{_LOOP}{{{{'<|' + message['role'] + '|>' + '\n' + message['content']"
        f" + '<|end|>\n' }}}}{{% endfor %}}{_TAIL}"
    ),
    "any-role-without-line-breaks": (
        f"{_LOOP}{{{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
    "no-closing-token": (
        f"{_LOOP}{{% if message.role == 'system' %}}{_SYSTEM}{_RULES}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "laid-out": """{%- for message in messages -%}
    {%- if message['role'] == 'system' and message['content'] -%}
        {{-'<|system|>\\n' + message['content'] + '<|end|>\\n'-}}
    {%- elif message['role'] == 'user' -%}
        {{-'<|user|>\\n' + message['content'] + '<|end|>\\n'-}}
    {%- elif message['role'] == 'assistant' -%}
        {{-'<|assistant|>\\n' + message['content'] + '<|end|>\\n'-}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- else -%}
    {{- eos_token -}}
{%- endif -%}
""",
    "trimmed-blocks": (
        f"{_LOOP}\n  {{% if message['role'] == 'system' %}}\n{_SYSTEM}{_RULES}{_TAIL}\n"
    ),
}
WITHOUT_SYSTEM = {
    "mini-first-release": f"{{{{ bos_token }}}}{_LOOP}{_USER_OPENS}",
    "medium": f"{_LOOP}{_USER_OPENS}",
}
TEMPLATES = WITH_SYSTEM | WITHOUT_SYSTEM

USER, NOTE = Message("user", "Doctor: Any  pain?\nPatient: No. "), Message("assistant", " None.\n")
CHATS = {
    "one": (USER, NOTE),
    "two": (USER, NOTE, Message("user", "And now?"), Message("assistant", "Still none.")),
}
SYSTEM_CHATS = {
    "system": (Message("system", "Write notes."), USER, NOTE),
    "empty-system": (Message("system", ""), USER, NOTE),
}


def rendered_by_jinja(template: str, messages: tuple[Message, ...], generation: bool) -> str:
    sandbox = pytest.importorskip("jinja2.sandbox")
    # The settings with which transformers renders chat templates.
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    chat = [{"role": message.role, "content": message.content} for message in messages]
    text: str = environment.from_string(template).render(
        messages=chat, add_generation_prompt=generation, bos_token=BOS, eos_token=EOS
    )
    return text


def rendered_by_us(template: str, messages: tuple[Message, ...], generation: bool) -> str:
    pieces = ChatTemplate.parse(template, BOS, EOS).pieces(messages, generation)
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_finished_chat_is_what_jinja_renders(name: str, chat: str) -> None:
    template, messages = TEMPLATES[name], CHATS[chat]
    assert rendered_by_us(template, messages, False) == rendered_by_jinja(template, messages, False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_prompt_is_what_jinja_renders(name: str) -> None:
    template = TEMPLATES[name]
    assert rendered_by_us(template, (USER,), True) == rendered_by_jinja(template, (USER,), True)


@pytest.mark.parametrize("chat", SYSTEM_CHATS)
@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_system_message_is_what_jinja_renders(name: str, chat: str) -> None:
    template, messages = TEMPLATES[name], SYSTEM_CHATS[chat]
    assert rendered_by_us(template, messages, False) == rendered_by_jinja(template, messages, False)


def test_phi3_chat_written_out_by_hand() -> None:
    assert rendered_by_us(TEMPLATES["mini"], CHATS["one"], False) == (
        "<|user|>\nDoctor: Any  pain?\nPatient: No. <|end|>\n"
        "<|assistant|>\n None.\n<|end|>\n<|endoftext|>"
    )


def test_only_assistant_text_and_its_end_are_trained() -> None:
    pieces = ChatTemplate.parse(TEMPLATES["mini"], BOS, EOS).pieces(CHATS["two"])
    trained = [piece for piece in pieces if piece.trained]
    assert trained == [
        Piece(" None.\n", False, True),
        Piece("<|end|>", True, True),
        Piece("Still none.", False, True),
        Piece("<|end|>", True, True),
    ]


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
def test_system_message_is_refused_rather_than_dropped(name: str) -> None:
    with pytest.raises(DataError, match="role 'system'.*assistant, user"):
        rendered_by_us(TEMPLATES[name], SYSTEM_CHATS["system"], False)


def test_unknown_role_is_refused() -> None:
    with pytest.raises(DataError, match="role 'tool'"):
        rendered_by_us(TEMPLATES["mini"], (Message("tool", "x"),), False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("", "no loop"),
        (f"{_LOOP}{{{{ '<|im_start|>' + message['role'] }}}}{{% endfor %}}", "no rule for"),
        (TEMPLATES["mini"].replace("message['content']", "message['content'] | trim"), "no rule"),
        (TEMPLATES["mini"].replace("<|assistant|>", "<|bot|>"), "no <|assistant|>"),
        (TEMPLATES["mini"].replace("<|end|>", "<|im_end|>"), "no rule for"),
        ("Be kind. " + TEMPLATES["mini"], "text outside"),
        ("{{ '<|system|>\nBe kind.<|end|>\n' }}" + TEMPLATES["mini"], "before the messages"),
        (TEMPLATES["mini"].replace("{% elif", " {% elif"), "text outside"),
        (TEMPLATES["mini"].replace("{% endfor", "{{ eos_token }}{% endfor"), "inside"),
    ],
)  # fmt: skip
def test_template_of_another_structure_is_refused(template: str, what: str) -> None:
    with pytest.raises(TokenizerError, match=what):
        ChatTemplate.parse(template, BOS, EOS)
