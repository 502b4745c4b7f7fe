"""The chat template of the official RWKV-7 folders."""

# as the official folders show a conversation: the last system text first, an empty thought in front of new answers only
OFFICIAL = """{%- set ns = namespace(system='') -%}
{%- for m in messages -%}{%- if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- endif -%}{%- endfor -%}
{%- if ns.system -%}{{- 'System: ' + ns.system + '\\n\\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- 'User: ' + m.content + '\\n\\n' -}}
{%- elif m.role == 'assistant' -%}
{{- 'Assistant: ' -}}{%- generation -%}{{- m.content + '\\n\\n' -}}{%- endgeneration -%}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: <think></think>\\n' -}}{%- endif -%}"""
