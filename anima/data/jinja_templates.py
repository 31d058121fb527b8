"""The plain-text templates in Jinja, so that a merged model's tokenizer renders what training rendered.

Servers know a model's chat template only from its tokenizer. Held equal to `text_templates.py` by a test.
"""

import json

from anima.data.text_templates import ALPACA_WITHOUT_INPUT, VICUNA_SYSTEM

_SPLIT = (
    '{% if messages[0]["role"] == "system" %}{% set system = messages[0]["content"] %}{% set turns = messages[1:] %}'
    "{% else %}{% set system = none %}{% set turns = messages %}{% endif %}"
)


def _text(text: str) -> str:
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"


def _or_system(default: str) -> str:
    return "{{ system if system is not none else " + json.dumps(default, ensure_ascii=False) + " }}"


def _loop(before_later: str, asked: str, answered: str) -> str:
    later = f"{{% if not loop.first %}}{_text(before_later)}{{% endif %}}" if before_later else ""
    return (
        '{% for message in turns %}{% if message["role"] == "user" %}'
        f"{later}{asked}{{% else %}}{answered}{{% endif %}}{{% endfor %}}"
    )


_CONTENT = '{{ message["content"] }}'


def jinja_of(name: str, *, adds_bos: bool) -> str:
    """A plain-text template as Jinja.

    Args:
        name: alpaca, vicuna, guanaco or plain.
        adds_bos: Whether BOS opens the text, see `text_templates.py`.

    Raises:
        KeyError: another name.
    """
    answer = _CONTENT + "{{ eos_token }}"
    alpaca = _text("### Instruction:\n") + _CONTENT + _text("\n\n### Response: ")
    vicuna = _text("USER: ") + _CONTENT + _text(" ASSISTANT:")
    guanaco = _text("### Human: ") + _CONTENT + _text("\n### Assistant:")
    system_line = "{% if system is not none %}{{ system }}" + _text("\n") + "{% endif %}"
    bodies = {
        "alpaca": _or_system(ALPACA_WITHOUT_INPUT) + _text("\n\n") + _loop("\n\n", alpaca, answer),
        "vicuna": _or_system(VICUNA_SYSTEM) + _text(" ") + _loop("", vicuna, _text(" ") + answer),
        "guanaco": system_line + _loop("\n", guanaco, _text(" ") + answer),
        "plain": _loop("", _CONTENT, answer),
    }
    return ("{{ bos_token }}" if adds_bos else "") + _SPLIT + bodies[name]
