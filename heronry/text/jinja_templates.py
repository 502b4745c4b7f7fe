"""Chat templates in the form of Hugging Face's: a text in the language Jinja."""

from __future__ import annotations

from ..errors import InputError
from .chat_templates import TEMPLATES


def chat_template(name: str) -> str:
    """A template of TEMPLATES (raven, world, g1 ...) by its name, for `tokenizer.chat_template`."""
    if name not in TEMPLATES:
        raise InputError(f"unknown chat template {name!r}; choose one of {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    before_user, before_answer = template.turn.split("{user}")
    past_answer = before_answer.removesuffix(template.opening)
    before_system, after_system = template.system.split("{system}")
    collapse = "{%- set ns.text = ns.text.split('\\n') | select | join('\\n') %}"  # runs of newlines become one
    forged = " or ".join(f"{stop!r} in ns.text" for stop in template.stops)
    return (
        "{%- for message in messages %}"
        "{%- set ns = namespace(text=message['content'].replace('\\r\\n', '\\n').strip()) %}"
        "{%- if message['role'] == 'assistant' %}"
        f"{{%- if {forged} %}}{collapse}{{%- endif %}}"
        f"{{{{- ' ' + ns.text + {template.separator!r} }}}}"
        "{%- else %}"
        f"{collapse if template.collapse else ''}"
        f"{{%- if message['role'] == 'system' %}}{{{{- {before_system!r} + ns.text + {after_system!r} }}}}"
        f"{{%- else %}}{{{{- {before_user!r} + ns.text }}}}"
        f"{{%- if not loop.last %}}{{{{- {past_answer!r} }}}}"
        f"{{%- elif add_generation_prompt %}}{{{{- {before_answer!r} }}}}{{%- endif %}}"
        "{%- endif %}{%- endif %}{%- endfor %}"
    )
