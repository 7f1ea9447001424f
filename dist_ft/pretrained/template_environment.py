"""Jinja templates that others wrote, rendered in bounded time and memory.

The sandbox of Jinja keeps a template away from files and code, but lets it loop and multiply text
without end. Here each iteration, call, output and operation that creates text is counted before it
happens (`template_budget`). A template within the limits renders as it does in the environment of
transformers, whose filters, functions and extensions these are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Template
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dist_ft.pretrained import template_operations
from dist_ft.pretrained.template_budget import CONTAINERS, RenderBudget

BLOCKS_PER_STEP = 64
"""Output blocks that an extension may read for the cost of one step."""


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
        """Count comparisons, which take long for long values."""
        self._wrap("(environment.count_step(0) and ", super().visit_Compare, node, frame)

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
        budget.step()
        if characters:
            budget.charge(characters)
        return True

    def count_output(self, value: Any) -> Any:
        """Count a value that is about to be written; return it."""
        budget = getattr(self._local, "budget", None)
        if budget is not None:  # a constant is written while the template is compiled
            budget.step()
            budget.charge_text(value)
        return value

    def count_slice(self, value: Any) -> Any:
        """Count a slice; return it."""
        budget = self._local.budget
        budget.step()
        if isinstance(value, str | bytes):
            budget.charge(len(value))
        elif isinstance(value, list | tuple):
            budget.charge(8 * len(value))
        return value

    def count_container(self, value: Any) -> Any:
        """Count a new container; return it."""
        budget = self._local.budget
        budget.step()
        budget.weigh(value)
        budget.charge(8 * len(value))
        return value

    def join_counted(self, join: Callable[[Any], Any], parts: tuple[Any, ...]) -> Any:
        """Return the joined text of `parts`."""
        budget = self._local.budget
        budget.step()
        for part in parts:
            budget.charge_text(part)
        return join(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of a binary operator that may create a large value."""
        budget = self._local.budget
        budget.step()
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
            budget = self.budget
            template_operations.check_format(budget, template, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method from a template."""
        budget = __self._local.budget
        budget.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int | float):
            args = template_operations.check_method(budget, owner, __obj.__name__, args, kwargs)
        elif isinstance(owner, Extension):
            # It joins all output so far.
            blocks = getattr(owner, "_rendered_blocks", None) or ()
            budget.step(len(blocks) // BLOCKS_PER_STEP)
        else:
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, CONTAINERS):
                    budget.weigh(argument)
            template_operations.check_function(__obj, args, kwargs)

        result = super().call(__context, __obj, *args, **kwargs)
        __self._count_result(budget, result)
        return result

    @staticmethod
    def _count_result(budget: RenderBudget, result: Any) -> None:
        if isinstance(result, str | bytes):
            budget.charge(len(result))
        elif isinstance(result, list | tuple | dict):
            # Of a view of a mapping, all parts were counted with the mapping.
            budget.weigh(result)
            budget.charge(8 * len(result))

    def _counted_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that checks what it gets and counts what it returns."""
        # Jinja passes some filters the context first, by a mark of the function, which stays.
        first = int(getattr(function, "jinja_pass_arg", None) is not None)
        check = template_operations.FILTER_CHECKS.get(name)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            budget = self.budget
            budget.step()
            if len(args) > first:
                value = args[first]
                if name in template_operations.ITERABLE_FILTERS and isinstance(value, Iterator):
                    value = template_operations.to_list(budget, value)
                    args = (*args[:first], value, *args[first + 1 :])
                template_operations.check_counts(name, args[first + 1 :], kwargs)
                if check is not None:
                    check(budget, value, args[first + 1 :], kwargs)

            result = function(*args, **kwargs)
            if isinstance(result, str | bytes):
                budget.charge(len(result))
            elif isinstance(result, list | tuple):
                budget.charge(8 * len(result))
            return result

        return counted

    def _counted_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            return function(*args, **kwargs)

        return counted
