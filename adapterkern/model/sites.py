"""Where attention ends in a decoder layer: the layer's own forward in two, after the sum of residual and attention.

transformers writes each family's layer anew: norms before, after or around attention, scaled residuals, experts, state
spaces in attention's place. So the place is read from the source of the layer's forward, by following its input:

    residual = h                       a copy of the input
    h = self.input_layernorm(h)        made of the input
    h, _ = self.self_attn(h, mask=…)   attention: any module that gets the stream and an argument of the layer besides
    h = self.post_norm(h)              made of attention
    h = residual + c * h               the sum: the first statement that joins both
    ─────────────────────────────────  the cut, if nothing below reads another tensor of the stream
    …                                  the feed-forward part: modules that read h

In a parallel block, ``h = residual + attention + mlp``, no module reads the sum. The cut is then within it: ``s =
residual + attention`` above and ``h = s + mlp`` below, so that an adapter A puts A(s) − residual in attention's place.

Both halves are the statements of the class: with nothing between, they compute what it does to the bit (in a parallel
block that sums in another order, up to rounding).
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

_INPUT, _INNER, _ATTENDED = "a copy of the input", "made of the input", "made of attention"
_PROPERTIES = ("dtype", "device", "shape", "ndim")  # of a tensor, which are no tensors
_SUM = "residual_and_attention"  # in a parallel block


class Halves(NamedTuple):
    """A layer's forward in two functions."""

    attention: Callable[..., Any]  # (layer, *args, **kwargs) → the stream between, and a tuple of what ``mlp`` needs
    mlp: Callable[..., Any]  # (layer, stream, *needed) → what the layer's forward returns
    stream: str  # the name of the layer's first argument
    next: str | None  # the layer's module that reads the stream between first, and alone, such as a norm


class NoSiteError(ValueError):
    """Why a layer has no place between attention and feed-forward network."""


@functools.cache
def halves(cls: Any) -> Halves | NoSiteError:
    """The forward of a decoder layer's class in two; or why there is no place to cut it."""
    try:
        return _made(*_read(cls))
    except NoSiteError as reason:
        return reason


@functools.cache
def reads_input(cls: Any) -> str | None:
    """The layer's module that alone reads what its forward is given, such as ``input_layernorm``; None if none does."""
    try:
        _, function = _read(cls)
    except NoSiteError:
        return None
    layer, stream, *_ = (a.arg for a in function.args.args)
    return _reads(function.body, layer, stream)


@functools.cache
def reads_output(cls: Any) -> str | None:
    """The decoder's module that alone reads what its layers leave, by the source of its class; None if none does."""
    try:
        _, function = _read(cls)
    except NoSiteError:
        return None
    body = function.body
    loops = [i for i, statement in enumerate(body) if isinstance(statement, ast.For)]
    if not loops:
        return None
    left = [name.id for name in _names(body[loops[-1]]) if _is_stored(name)]
    found = (_reads(body[loops[-1] + 1 :], function.args.args[0].arg, name) for name in left)
    return next((module for module in found if module is not None), None)


def _read(cls: Any) -> tuple[Any, ast.FunctionDef]:
    """The forward of a class, and its source."""
    own = cls.forward
    while hasattr(own, "__wrapped__"):
        package, *_ = own.__globals__["__name__"].split(".")
        if package != "transformers":  # whose wrappers checkpoint, or rename arguments
            raise NoSiteError(f"its forward is wrapped by {package}")
        own = own.__wrapped__
    try:
        lines, first = inspect.getsourcelines(own)
        function = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError):
        raise NoSiteError("its forward has no source") from None
    if not isinstance(function, ast.FunctionDef) or own.__closure__ or len(function.args.args) < 2:
        raise NoSiteError("its forward is not a plain method")
    ast.increment_lineno(function, first - 1)  # tracebacks show the class's lines
    return own, function


def _reads(body: Iterable[ast.stmt], layer: str, stream: str) -> str | None:
    """The module of the first call with the stream alone, while the name holds it."""
    for statement in body:
        for call in ast.walk(statement):
            if isinstance(call, ast.Call) and [getattr(a, "id", None) for a in call.args] == [stream]:
                of = call.func
                if isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name) and of.value.id == layer:
                    return None if call.keywords else of.attr
        if any(name.id == stream and _is_stored(name) for name in _names(statement)):
            return None
    return None


def _made(own: Any, function: ast.FunctionDef) -> Halves:
    reader = _Reader(function)
    above, stream, below = _cut(function.body, reader)
    local = reader.arguments | {name.id for s in above for name in _names(s) if _is_stored(name)}
    needed = sorted(_live(below) & local - {reader.layer, stream})
    for node in ast.walk(function.args):
        if isinstance(node, ast.arg):
            node.annotation = None  # it may name what only a type checker knows
    text = f"return {stream}, ({''.join(f'{name}, ' for name in needed)})"
    top = ast.FunctionDef("attention", function.args, [*above, *ast.parse(text).body], [])
    end = ast.parse(f"def mlp({', '.join((reader.layer, stream, *needed))}): pass").body[0]
    assert isinstance(end, ast.FunctionDef)
    end.body = below
    module = ast.fix_missing_locations(ast.Module([top, end], []))
    made: dict[str, Any] = {}
    exec(compile(module, own.__code__.co_filename, "exec"), own.__globals__, made)
    return Halves(made["attention"], made["mlp"], function.args.args[1].arg, _reads(below, reader.layer, stream))


def _cut(body: list[ast.stmt], reader: "_Reader") -> tuple[list[ast.stmt], str, list[ast.stmt]]:
    """The statements above the cut, the stream's name there, and the statements below."""
    for index, statement in enumerate(body):
        if any(isinstance(node, ast.Return) for node in ast.walk(statement)):
            break
        if not reader.joins(statement):
            continue
        if not isinstance(statement, ast.Assign) or not isinstance(target := statement.targets[0], ast.Name):
            raise NoSiteError("it adds attention to the stream under a condition")
        below = body[index + 1 :]
        if not any(map(reader.called, below)):
            first, second = reader.parts(statement)
            return [*body[:index], first], _SUM, [second, *below]
        if others := sorted((_live(below) & set(reader.holds)) - {target.id}):
            raise NoSiteError(f"after attention it passes on {', '.join(others)} beside {target.id}")
        if again := reader.attention.intersection(*[set().union(*map(reader.called, below))]):
            raise NoSiteError(f"it runs {', '.join(sorted(again))} more than once")
        return body[: index + 1], target.id, below
    raise NoSiteError("it does not add attention to its input")


class _Reader:
    """Follows a layer's input through the statements of its forward, in their order."""

    def __init__(self, function: ast.FunctionDef) -> None:
        given = function.args
        names = [a.arg for a in (*given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a is not None]
        self.layer, stream, *_ = names
        self.arguments = set(names)
        self.holds = {stream: _INPUT}  # what the names hold of the stream
        self.attention: set[str] = set()  # the modules that are it
        self._besides = self.arguments - {self.layer, stream}

    def joins(self, statement: ast.stmt) -> bool:
        """Follow ``statement``; whether it, or one inside it, joins attention with what is not made of attention."""
        joined = [self.joins(inside) for inside in ast.iter_child_nodes(statement) if isinstance(inside, ast.stmt)]
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)) or statement.value is None:
            return any(joined)
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        kinds = self._kinds(statement.value)
        if isinstance(statement, ast.AugAssign):
            kinds |= self._kinds(statement.target)
        if kinds > {_ATTENDED}:
            return True
        kind = next(iter(kinds)) if len(kinds) == 1 else _INNER if kinds else None
        if kind == _INPUT and not isinstance(statement.value, ast.Name):
            kind = _INNER
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            for number, name in enumerate(names):
                if isinstance(name, ast.Name):
                    self.holds.pop(name.id, None)
                    if kind is not None and (kind != _ATTENDED or number == 0):  # then follow weights, or indices
                        self.holds[name.id] = kind
        return False

    def called(self, node: ast.AST) -> set[str]:
        """The names of the layer's modules that are called in ``node``."""
        calls = (self._module(child) for child in ast.walk(node) if isinstance(child, ast.Call))
        return {name for name in calls if name is not None}

    def parts(self, statement: ast.Assign) -> tuple[ast.stmt, ast.stmt]:
        """The sum of a parallel block as two statements: residual and attention, then the rest."""
        terms = list(_terms(statement.value))
        kinds = [self._kinds(term) for term in terms]
        if sorted(map(sorted, kinds)) != sorted([[_INPUT], [_ATTENDED], *[[_INNER]] * (len(terms) - 2)]):
            raise NoSiteError("no feed-forward network follows its attention")
        if len(terms) < 3:
            raise NoSiteError("no feed-forward network follows its attention")
        residual, attended = terms[kinds.index({_INPUT})], terms[kinds.index({_ATTENDED})]
        rest = [term for term, kind in zip(terms, kinds, strict=True) if kind == {_INNER}]
        first = ast.Assign([ast.Name(_SUM, ast.Store())], _sum([residual, attended]))
        second = ast.Assign(statement.targets, _sum([ast.Name(_SUM, ast.Load()), *rest]))
        return ast.copy_location(first, statement), ast.copy_location(second, statement)

    def _kinds(self, node: ast.AST) -> set[str]:
        """What an expression reads of the stream."""
        if isinstance(node, ast.Name):
            return {self.holds[node.id]} if node.id in self.holds else set()
        if isinstance(node, ast.Attribute) and node.attr in _PROPERTIES:
            return set()
        inside = set().union(*map(self._kinds, ast.iter_child_nodes(node)))
        module = self._module(node) if isinstance(node, ast.Call) and inside else None
        if module is None or not self._besides & {child.id for child in _names(node)}:
            return inside
        self.attention.add(module)
        return {_ATTENDED}

    def _module(self, call: ast.Call) -> str | None:
        """The name of the module of the layer that ``call`` calls: ``self.mlp(…)``, ``self.mlps[0](…)``."""
        name, node = None, call.func
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            name, node = node.attr if isinstance(node, ast.Attribute) else name, node.value
        return name if isinstance(node, ast.Name) and node.id == self.layer else None


def _terms(node: ast.expr) -> Iterable[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from (*_terms(node.left), *_terms(node.right))
    else:
        yield node


def _sum(terms: list[ast.expr]) -> ast.expr:
    return functools.reduce(lambda a, b: ast.BinOp(a, ast.Add(), b), terms)


def _names(node: ast.AST) -> list[ast.Name]:
    return [child for child in ast.walk(node) if isinstance(child, ast.Name)]


def _is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _live(body: list[ast.stmt], after: frozenset[str] = frozenset()) -> frozenset[str]:
    """The names that ``body``, or what runs ``after`` it, reads before it assigns them."""
    for statement in reversed(body):
        names = _names(statement)
        if isinstance(statement, ast.If):
            ways = _live(statement.body, after) | _live(statement.orelse, after)
            after = ways | _live([ast.Expr(statement.test)])
            continue
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            after -= {name.id for name in names if _is_stored(name)}
        after |= {name.id for name in names if not _is_stored(name) or isinstance(statement, ast.AugAssign)}
    return after
