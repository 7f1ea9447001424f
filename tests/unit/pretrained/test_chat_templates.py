"""Templates of others render as in transformers, or are refused within bounded time and memory."""

from __future__ import annotations

import resource
import threading
import time
from typing import Any

import pytest
import tiny_tasks
from transformers.utils import chat_template_utils

from dist_ft.pretrained import chat_templates
from dist_ft.pretrained.chat_templates import TemplateError

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi\nthere"}]
TOOL_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5, None, "a<b"]}}}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

# The constructs of the templates of Llama 3.1, Qwen 3, Mistral and DeepSeek.
LEGITIMATE = {
    "loop": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}",
    "llama": (
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
        "{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}"
        "{%- else %}{%- set system_message = '' %}{%- endif %}{{- system_message }}"
        "{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}"
        "{%- endfor %}{%- endif %}{%- for message in messages %}"
        "{%- if not (message.role == 'tool' or 'tool_calls' in message) %}"
        "{{- '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|eot|>' }}"
        "{%- elif 'tool_calls' in message %}{%- if not message.tool_calls|length == 1 %}"
        "{{- raise_exception('one call') }}{%- endif %}"
        "{%- set tool_call = message.tool_calls[0].function %}{{- tool_call.arguments | tojson }}"
        "{%- for name, value in tool_call.arguments | items %}{{ name ~ '=' ~ value }}{% endfor %}"
        "{%- endif %}{%- endfor %}"
    ),
    "qwen": (
        "{%- set ns = namespace(found=true, last=messages|length - 1) %}"
        "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
        "{%- if ns.found and message.role == 'user' and message.content is string and "
        "not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}"
        "{%- set ns.found = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}{%- set content = message.content %}"
        "{%- if '</think>' in content %}{%- set thought = "
        "content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{{ thought }}{%- endif %}{{- '<|im_start|>' + message.role + '\\n' + content }}"
        "{% if loop.last or loop.first %}{{ loop.index0 > ns.last }}{% endif %}{%- endfor %}"
    ),
    "macros": (
        "{% macro show(m, depth=0) %}{{ '  ' * depth }}{{ m.role | upper }}: {{ caller() }}"
        "{% endmacro %}{% for m in messages if m.role != 'tool' %}{% call show(m, depth=loop.index) %}"
        "{{ m.content | replace('h', 'H') | indent(2) }}{% endcall %}{% else %}none{% endfor %}"
        "{{ messages | map(attribute='role') | join(', ') }} {{ '%s-%03d' % ('a', 7) }}"
        "{{ '{} {text}'.format(1, text='b') }} {{ [1, 2] + [3] }} {{ {'a': (1, 2)} }} {{ 2 ** 10 }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ undefined_name }}"
        "{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}"
    ),
    "recursive": (
        "{% for item in [{'n': 1, 'c': [{'n': 2, 'c': []}]}] recursive %}{{ item.n }}"
        "{{ loop(item.c) }}{% endfor %}{% set x %}{{ messages[0].content }}{% endset %}{{ x }}"
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tasks.make_tokenizer()


@pytest.mark.parametrize("messages", [CHAT, [*CHAT, TOOL_CALL], CHAT * 200], ids=len)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", LEGITIMATE)
def test_templates_within_the_limits_render_as_in_transformers(name, tools, messages):
    template = LEGITIMATE[name]
    variables = {"messages": messages, "tools": tools, "bos_token": "<s>"}
    original = chat_template_utils._cached_compile_jinja_template(template)
    limited = chat_templates.compile_template(template)
    assert limited.render(**variables) == original.render(**variables)


def test_generation_marks_are_those_of_transformers(tokenizer):
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    text, marks = chat_templates.render_with_marks(tokenizer, CHAT * 3, template)
    assert [text[start:stop] for start, stop in marks] == ["hi\nthere"] * 3


def double(step: str) -> str:
    """Return a template that repeats `step` on `ns.x`, and on `ns.y`, and writes the result."""
    return (
        "{% set ns = namespace(x='a', y='a') %}{% for i in range(100) %}"
        + step
        + "{% endfor %}{{ ns.x }}"
    )


def chain(step: str, count: int = 60) -> str:
    return "".join(step.replace("NEXT", f"a{i + 1}").replace("LAST", f"a{i}") for i in range(count))


LONG = "{% set x = 'a' * 100000 %}"
BOMBS = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "text": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxx{% endfor %}{% endfor %}",
    "filtered": "{% for a in range(99999) %}{% for b in range(99999) if 0 %}{% endfor %}{% endfor %}",
    "recursive": "{% for a in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
    "range": "{{ range(10 ** 9) | list }}",
    "product": "{{ 'a' * 10000000000 }}",
    "product-of-constants": "{% set x = ('a' * 100000) * 100000 %}",
    "sum": double("{% set ns.x = ns.x + ns.x %}"),
    "concatenation": double("{% set ns.x = ns.x ~ ns.x %}"),
    "markup": "{% autoescape true %}"
    + double("{% set ns.x = ns.x ~ ns.x %}")
    + "{% endautoescape %}",
    "list": double("{% set ns.x = [ns.x, ns.x] %}"),
    "list-sum": double("{% set ns.x = [1] + (ns.x | list) + (ns.x | list) %}"),
    "mapping": double("{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
    "mapping-call": double("{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "tuple": double("{% set ns.x = (ns.x, ns.x) %}"),
    "json": double("{% set ns.x = [ns.x, ns.x] %}").replace("{{ ns.x }}", "{{ ns.x | tojson }}"),
    "equality": double("{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}").replace(
        "{{ ns.x }}", "{{ ns.x == ns.y }}"
    ),
    "arguments": "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1, 2) }}",
    "set-blocks": "{% set a0 %}aaaa{% endset %}"
    + chain("{% set NEXT %}{{ LAST }}{{ LAST }}{% endset %}"),
    "macros": "{% macro a0() %}x{% endmacro %}"
    + chain("{% macro NEXT() %}{{ LAST() }}{{ LAST() }}{% endmacro %}")
    + "{{ a60() }}",
    "endless-macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.encode().zfill(10000000000) }}",
    "to-bytes": "{{ (5).to_bytes(10000000000, 'big') }}",
    "format": "{{ '{:>10000000000}'.format('a') }}",
    "format-nested": "{{ '{:>{w}}'.format('a', w=10000000000) }}",
    "format-map": "{{ '{a:>10000000000}'.format_map({'a': 'a'}) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent-bytes": "{{ '%10000000000d'.encode() % 1 }}",
    "percent-star": "{{ '%*d' % (10000000000, 1) }}",
    "format-filter": "{{ '%10000000000d' | format(1) }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": double("{% set ns.x = (ns.x | int + 9) * (ns.x | int + 9) %}"),
    "replace": LONG + "{{ x.replace('a', x) }}",
    "replace-filter": LONG + "{{ x | replace('a', x) }}",
    "replace-nothing": LONG + "{{ x.replace('', x) }}",
    "join": LONG + "{{ x.join(range(100000) | map('string')) }}",
    "join-filter": "{{ range(100000) | join('a' * 1000000) }}",
    "defaults": LONG + "{{ range(100000) | map(attribute='q', default=x) | join }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000) }}",
    "indent-text": LONG + "{{ ('\\n' * 100000) | indent(x) }}",
    "json-indent": "{{ ([1] * 100000) | tojson(indent=100000) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "round": "{{ 5 | round(1000000000, 'ceil') }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "expandtabs": "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "translate": LONG + "{{ x.translate({97: x}) }}",
    "sum-of-lists": "{{ ([[1] * 1000] * 100000) | sum(start=[]) }}",
    "comments": "{{ ('<!---->' * 100000) | striptags }}",
    "links": "{{ ('http://a.b ' * 10000) | urlize(target='a' * 10000) }}",
    "wrap": "{{ ('a ' * 90000) | wordwrap(1, wrapstring='b' * 100000) }}",
    "idna": "{{ ('a' * 100000).encode('idna') }}",
    "slices": LONG + "{% set z = [" + "x[:-1]," * 5000 + "] %}",
    "compare": "{% set x = 'a' * 9999999 %}{% set y = 'a' * 9999999 %}{% for i in range(99999) %}"
    "{% if x == y %}{% endif %}{% endfor %}",
    "search": "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% if 'ab' in x %}{% endif %}"
    "{% endfor %}",
    "count": "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% set q = x.count('ab') %}"
    "{% endfor %}",
    "tests": "{% set x = 'a' * 9999999 %}{{ range(99999) | map('string') | select('in', x) | list }}",
    "long": "x" * 300_000,
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep-blocks": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "constants": "{{ 'a' | center(99999) }}" * 5000,
    "marks": "{% for i in range(99999) %}{% generation %}{{ 'x' * 999 }}{% endgeneration %}{% endfor %}",
    "division": "{{ 1 / 0 }}",
    "escape": "{{ ''.__class__.__mro__ }}",
    "include": "{% include '/etc/passwd' %}",
    "syntax": "{% if %}",
}
MAX_SECONDS = 8
MAX_GROWTH_MIB = 700


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_bounded_time_and_memory(tokenizer, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        chat_templates.render(tokenizer, CHAT, BOMBS[name])
    assert time.thread_time() - started < MAX_SECONDS
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert growth < MAX_GROWTH_MIB
    assert str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_large_conversations_have_larger_limits(tokenizer):
    """A template that copies each message a few times renders a conversation of 60 MB."""
    template = (
        "{% for m in messages %}{% set c = m.content | trim %}{% set c = c.replace('q', 'Q') %}"
        "{{ '<|' + m.role + '|>' + c.strip() + '<|end|>' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "many words " * 60_000}] * 90
    text = chat_templates.render(tokenizer, messages, template)
    assert len(text) > 58_000_000


def test_budgets_of_threads_are_apart(tokenizer):
    """A bomb in one thread does not use up the budget of a rendering in another."""
    template = "{% for i in range(n or 3) %}{% for j in range(100000) %}{% endfor %}{% endfor %}ok"
    compiled = chat_templates.compile_template(template)
    outcomes = []

    def render(count: int) -> None:
        try:
            outcomes.append((count, compiled.render(n=count)))
        except Exception as error:
            outcomes.append((count, type(error).__name__))

    threads = [threading.Thread(target=render, args=(count,)) for count in (5, 50, 5, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [(5, "ok")] * 2 + [(50, "TemplateLimitError")] * 2


def test_nothing_in_the_process_compiles_templates_without_limits(tokenizer):
    chat_templates.compile_template("x")
    compiled = chat_template_utils._compile_jinja_template("{{ messages[0].content }}")
    assert type(compiled.environment).__name__ == "BoundedEnvironment"
    with pytest.raises(TemplateError, match="steps"):
        chat_templates._call(
            tokenizer.apply_chat_template, CHAT, chat_template=BOMBS["loops"], tokenize=False
        )
