"""Jinja templates that others wrote, rendered in bounded time and memory.

The sandbox of Jinja keeps a template away from files and code, but lets it loop and multiply text
without end. Here each iteration, call, output and operation that creates text is counted before it
happens (`template_budget`). A template within the limits renders as it does in the environment of
transformers, whose filters, functions and extensions these are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Template
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dist_ft.pretrained import template_operations
from dist_ft.pretrained.template_budget import POINTER_BYTES, STEP, RenderBudget
from dist_ft.pretrained.template_operations import PLAIN_METHODS

BYTES_PER_BLOCK = 2
"""Cost of each output block that an extension reads."""


class _CountingCodeGenerator(CodeGenerator):
    """Compiles a template to code that counts what it does."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """Count each iteration, and each item that a condition of the loop looks at."""
        node.body.insert(0, _count_step(node.body))
        if node.test is not None:
            counted = _call("count_step", nodes.Const(0))
            node.test = nodes.And(counted, node.test)
        super().visit_For(node, frame)

    def visit_Macro(self, node: nodes.Macro, frame: Frame) -> None:
        """Count the text of each call."""
        node.body.insert(0, _count_step(node.body))
        super().visit_Macro(node, frame)

    def visit_CallBlock(self, node: nodes.CallBlock, frame: Frame) -> None:
        """Count the text of each call."""
        node.body.insert(0, _count_step(node.body))
        super().visit_CallBlock(node, frame)

    def visit_Block(self, node: nodes.Block, frame: Frame) -> None:
        """Count the text of each call: a template may write a block of its own again."""
        node.body.insert(0, _count_step(node.body))
        super().visit_Block(node, frame)

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        """Write calls of the counting itself without those of the sandbox."""
        if isinstance(node.node, nodes.EnvironmentAttribute) and node.node.name == "count_step":
            (characters,) = node.args
            assert isinstance(characters, nodes.Const)
            self.write(f"environment.count_step({characters.value})")
            return
        super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """Count comparisons of values that may be long."""
        if _is_short(node):
            super().visit_Compare(node, frame)
        else:
            self._wrap("(environment.count_step(0) and ", super().visit_Compare, node, frame)

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        """Count the text of a sum; by a method of its own, as templates add all their text."""
        self.write("environment.add(")
        self.visit(node.left, frame)
        self.write(", ")
        self.visit(node.right, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """Count the copies that slices are."""
        if isinstance(node.arg, nodes.Slice):
            self._wrap("environment.count_slice(", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """Count the parts of a new list."""
        self._wrap("environment.count_container(", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """Count the parts of a new mapping."""
        self._wrap("environment.count_container(", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """Count the parts of a new tuple; those on the left of an assignment are none."""
        if node.ctx == "load":
            self._wrap("environment.count_container(", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Count the parts of a joined text."""
        join = "str_join"
        if frame.eval_ctx.volatile:
            join = "(markup_join if context.eval_ctx.volatile else str_join)"
        elif frame.eval_ctx.autoescape:
            join = "markup_join"
        self.write(f"environment.join_counted({join}, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _wrap(
        self, before: str, visit: Callable[..., None], node: nodes.Node, frame: Frame
    ) -> None:
        self.write(before)
        visit(node, frame)
        self.write(")")


def _is_short(node: nodes.Compare) -> bool:
    """Whether a comparison is one for equality with a constant of the template."""
    if len(node.ops) != 1 or node.ops[0].op not in ("eq", "ne"):
        return False
    return isinstance(node.expr, nodes.Const) or isinstance(node.ops[0].expr, nodes.Const)


def _call(method: str, *arguments: nodes.Expr) -> nodes.Call:
    """Return the node that calls a method of the environment."""
    return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)


def _count_step(body: list[nodes.Node]) -> nodes.ExprStmt:
    """Return the statement that counts one pass through `body` and its fixed text."""
    characters = 0
    for statement in body:
        for data in (statement, *statement.find_all((nodes.TemplateData, nodes.Const))):
            if isinstance(data, nodes.TemplateData):
                characters += len(data.data)
            elif isinstance(data, nodes.Const) and isinstance(data.value, str):
                characters += len(data.value)
    return nodes.ExprStmt(_call("count_step", nodes.Const(characters)))


class _CountedTemplate(Template):
    """A template with a new budget for each rendering."""

    def new_context(
        self,
        vars: dict[str, Any] | None = None,
        shared: bool = False,
        locals: Mapping[str, Any] | None = None,
    ) -> Context:
        """Start a budget for the variables of a rendering."""
        environment: Any = self.environment
        environment.start_budget(vars or {})
        return super().new_context(vars, shared, locals)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates count what they do; one for each template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CountingCodeGenerator
    template_class = _CountedTemplate

    def __init__(self, source: ImmutableSandboxedEnvironment) -> None:
        """Take options, extensions, filters, tests and functions from `source`."""
        super().__init__(
            trim_blocks=source.trim_blocks,
            lstrip_blocks=source.lstrip_blocks,
            extensions=[type(extension) for extension in source.extensions.values()],
            finalize=self.count_output,
        )
        # Budgets by thread: one compiled template serves all threads of a process.
        self._local = threading.local()
        self.globals.update(source.globals)
        for name, function in source.filters.items():
            self.filters[name] = self._counted_filter(name, function)
        tests: dict[str, Any] = dict(source.tests)
        for name, test in tests.items():
            self.tests[name] = self._counted_test(test)

    def start_budget(self, inputs: Any) -> None:
        """Start the budget of a rendering in this thread."""
        self._local.budget = RenderBudget(inputs)

    @property
    def budget(self) -> RenderBudget:
        """The budget of the rendering in this thread.

        Raises:
            Impossible: nothing is rendered. The compiler then leaves an expression as it is.
        """
        budget = getattr(self._local, "budget", None)
        if budget is None:
            raise nodes.Impossible()
        return budget  # type: ignore[no-any-return]

    def count_step(self, characters: int) -> bool:
        """Count one step that writes `characters` of fixed text; return True."""
        budget = self._local.budget
        budget.left -= STEP + characters
        if budget.left < budget.next_check:
            budget.check()
        return True

    def count_output(self, value: Any) -> Any:
        """Count a value that is about to be written; return it."""
        try:
            budget = self._local.budget
        except AttributeError:
            return value  # a constant, written while the template is compiled

        if type(value) is str:
            budget.left -= STEP + len(value)
            if budget.left < budget.next_check:
                budget.check()
        else:
            budget.spend(budget.weigh(value))
        return value

    def count_slice(self, value: Any) -> Any:
        """Count a slice; return it."""
        if isinstance(value, str | bytes):
            self._local.budget.spend(len(value))
        else:
            self._local.budget.spend(POINTER_BYTES * len(value))
        return value

    def count_container(self, value: Any) -> Any:
        """Count a new container; return it."""
        budget = self._local.budget
        budget.weigh(value)
        budget.spend(POINTER_BYTES * len(value))
        return value

    def join_counted(self, join: Callable[[Any], Any], parts: tuple[Any, ...]) -> Any:
        """Return the joined text of `parts`."""
        budget = self._local.budget
        for part in parts:
            budget.spend_text(part)
        return join(parts)

    def add(self, left: Any, right: Any) -> Any:
        """Return `left + right`."""
        budget = self._local.budget
        if type(left) is str and type(right) is str:
            budget.left -= STEP + len(left) + len(right)
            if budget.left < budget.next_check:
                budget.check()
        else:
            template_operations.check_operator(budget, "+", left, right)
        return left + right

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of a binary operator that may create a large value."""
        budget = self._local.budget
        budget.spend(0)
        template_operations.check_operator(budget, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """Return the sandbox's `str.format`, without widths that create large texts."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        # A method of a text: it may be called through a filter, without `call`.
        template = value.__self__

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            template_operations.check_format(self.budget, template, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)  # type: ignore[no-any-return]

        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method from a template."""
        budget = __self._local.budget
        budget.spend(0)
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str and __obj.__name__ in PLAIN_METHODS:
            pass
        elif isinstance(owner, str | bytes | int | float):
            args = template_operations.check_method(budget, owner, __obj.__name__, args, kwargs)
        elif isinstance(owner, Extension):
            # It joins all output so far.
            blocks = getattr(owner, "_rendered_blocks", None) or ()
            budget.spend(len(blocks) * BYTES_PER_BLOCK)
        else:
            for argument in (*args, *kwargs.values()):
                budget.weigh(argument)
            template_operations.check_function(__obj, args, kwargs)

        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str | bytes):
            budget.spend(len(result))
        elif isinstance(result, list | tuple | dict):
            # Of a view of a mapping, all parts were counted with the mapping.
            budget.spend(POINTER_BYTES * len(result))
            budget.weigh(result)
        return result

    def _counted_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that checks what it gets and counts what it returns."""
        # Jinja passes some filters the context first, by a mark of the function, which stays.
        first = int(getattr(function, "jinja_pass_arg", None) is not None)
        num_plain = first + 1
        if name not in template_operations.PLAIN_FILTERS:
            num_plain = -1

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            budget = self.budget
            if len(args) == num_plain and not kwargs:
                value = args[first]
                budget.spend(len(value) if type(value) is str else 0)
                return function(*args)

            args = template_operations.check_filter(budget, name, args, first, kwargs)
            result = function(*args, **kwargs)
            if isinstance(result, str | bytes):
                budget.spend(len(result))
            elif isinstance(result, list | tuple):
                budget.spend(POINTER_BYTES * len(result))
            return result

        return counted

    def _counted_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.budget.spend(0)
            return function(*args, **kwargs)

        return counted
