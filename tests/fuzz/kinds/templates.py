"""Chat templates and prompt templates, mutated, on rows that are correct."""

from __future__ import annotations

import json
import random

import tiny

from fuzz import mutate
from fuzz.inputs import Input
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

CHAT = (
    tiny.TEMPLATE,
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ bos_token }}{% set ns = namespace(a=0) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}"
    "{{ m['content'] | trim }}{{ eos_token }}{% endfor %}{{ strftime_now('%d %b %Y') }}",
    "{% macro f(x) %}{{ x | tojson }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
)
PROMPT = ("{prompt}\n", "Q: {prompt}\nA: ", "{system}\n{prompt}", "{{x}} {prompt!r:>20}")
LABEL = ("Text: {text}\nKind:", "{text} {pair} is", "{{a}} {text!s:.5} =")
TOKENS = (
    *("for", "endfor", "if", "endif", "set", "in", "range", "9999999999", "messages", "m", "loop"),
    *("{%", "%}", "{{", "}}", "{#", "__class__", "__mro__", "self", "cycler", "raise_exception"),
    *(
        "generation",
        "endgeneration",
        "include",
        "import",
        "extends",
        "block",
        "do",
        "break",
        "*",
        "/",
    ),
    *("prompt", "text", "pair", "system", "!r", ":>99", ":{text}", "[0]", "0", "format", "lipsum"),
)


def generate(rng: random.Random, materials: Materials, number: int) -> Input:
    """Return mutated templates and the kind of rows they are used on."""
    use = rng.choice(("chat", "chat", "prompt", "label"))
    template = rng.choice({"chat": CHAT, "prompt": PROMPT, "label": LABEL}[use])
    for _ in range(rng.choice((1, 1, 2, 4))):
        if rng.random() < 0.2:
            content = mutate.mutate_bytes(rng, template.encode("utf-8", "surrogatepass"))
            template = content.decode("utf-8", "replace")
        else:
            template = mutate.mutate_tokens(rng, template, TOKENS)

    question = {"use": use, "template": template}
    return Input(
        call="fill_templates",
        materials=("model",),
        files={"question.json": json.dumps(question).encode()},
    )


KIND = Kind("templates", generate, ("model",), quick_cases=20)
