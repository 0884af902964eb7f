"""Changes a template before it is compiled, at the operations that Jinja offers no way to intercept.

It puts filters around loops, ``~``, slices, comparisons and everything that makes or writes a value, so that `sandbox`
can measure it. Their names have a space in front, so that no template can use or replace them.
"""

from __future__ import annotations

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

TIMED = " timed"
"""Of what a loop goes through."""

MADE = " made"
"""Of a new list, tuple, dict or slice."""

COMPARED = " compared"
"""Of each side of a comparison, and of the keys of a dict, which are compared by their hash."""

WRITTEN = " written"
"""Of text that goes into a variable or a macro's result; the renderer counts what goes into the prompt."""

JOINED = " joined"
"""Of a list, for ``~``."""

APPENDED = " appended"
"""The same where the result takes the place of the first one."""

ADDED = " added"
"""The same for ``+``."""


def rewritten(tree: nodes.Template) -> nodes.Template:
    """The tree of a template with these in it; it is changed in place."""
    _Rewriter().visit(tree)
    return tree


class _Rewriter(NodeTransformer):
    def __init__(self) -> None:
        self._aside = 0

    def visit_For(self, node: nodes.For) -> nodes.Node:
        _leave_when_found(node)
        self._visit(node, aside=node.recursive)
        node.iter = _filtered(node.iter, TIMED)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        how, parts = ADDED, _terms(node.node)
        if isinstance(node.node, nodes.Concat):
            how, parts = APPENDED, [*node.node.nodes]
        if len(parts) == 1 or not _is_read(node.target, parts[0]):
            return self.generic_visit(node)
        parts = [self.visit(part) for part in parts]
        node.node = _filtered(nodes.List(parts, lineno=node.lineno), how)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), JOINED)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE) if node.ctx == "load" else node  # another one is what a loop or a set assigns to

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _compared(node.key)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        node.expr = self._side(node.expr)
        for operand in node.ops:
            operand.expr = self._side(operand.expr)
        return node

    def _side(self, node: nodes.Expr) -> nodes.Expr:
        return node if _is_plain(node) else _compared(self.visit(node))

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._visit(node, aside=True)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._visit(node, aside=True)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._visit(node, aside=True)

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.Node:
        return self._visit(node, aside=True)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        return self._visit(node, aside=True)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        if not self._aside:
            return node  # the renderer counts it
        return _filtered(nodes.Const(node.data, lineno=node.lineno), WRITTEN)

    def _visit(self, node: nodes.Node, *, aside: bool) -> nodes.Node:
        self._aside += aside
        self.generic_visit(node)
        self._aside -= aside
        return node


def _terms(value: nodes.Node) -> list[nodes.Node]:
    """What a sum adds up, from left to right."""
    later: list[nodes.Node] = []
    while isinstance(value, nodes.Add):
        later.append(value.right)
        value = value.left
    return [value, *reversed(later)]


def _is_read(target: nodes.Node, value: nodes.Node) -> bool:
    """Whether a value is the attribute of a namespace that is assigned to."""
    return (
        isinstance(target, nodes.NSRef)
        and isinstance(value, nodes.Getattr)
        and isinstance(value.node, nodes.Name)
        and (value.node.name, value.attr) == (target.name, target.attr)
    )


def _leave_when_found(node: nodes.For) -> None:
    """Make a loop end that would do nothing in any further turn.

    Jinja has no ``break`` of its own, so templates search with ``{% for … %}{% if not ns.found %}…``: as often as there
    are messages, for each message. What the condition looks at can only change where the condition holds.
    """
    if len(node.body) != 1 or not isinstance(node.body[0], nodes.If):
        return
    condition = node.body[0]
    plain = (nodes.Name, nodes.Getattr, nodes.Const, nodes.Not)
    parts = [condition.test, *condition.test.find_all(nodes.Node)]
    changing = {name.name for name in (node.target, *node.target.find_all(nodes.Name)) if isinstance(name, nodes.Name)}
    names = {part.name for part in parts if isinstance(part, nodes.Name)}
    if condition.elif_ or condition.else_ or names & {*changing, "loop"}:
        return
    if all(isinstance(part, plain) for part in parts):
        condition.else_ = [nodes.Break(lineno=node.lineno)]


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _compared(node: nodes.Expr) -> nodes.Expr:
    return node if _is_plain(node) else _filtered(node, COMPARED)


def _is_plain(node: nodes.Node) -> bool:
    """Whether it is a constant, or a list of them that nothing but a comparison sees."""
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return all(map(_is_plain, node.items))
    return isinstance(node, nodes.Const)
