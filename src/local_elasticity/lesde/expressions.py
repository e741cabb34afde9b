"""Arithmetic expressions of t, read by the grammar and never executed: "0.02*exp(-t/2000)"."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from local_elasticity.base.errors import InputError

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: np.power,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
}
_TWO = ("min", "max")
_LONGEST = 500


def parse(text: str, name: str = "expression") -> Callable[[Any], Any]:
    """Read an expression of t.

    Numbers, t, pi, e, + - * / ** and the functions exp, log, sqrt, sin, cos, tanh, abs, min(a, b), max(a, b).

    Args:
        text: the expression.
        name: what errors call it.

    Returns:
        A function of a scalar or an array t.

    Raises:
        InputError: for anything that is not such arithmetic.
    """
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"more than {_LONGEST} characters")
        tree = ast.parse(text.strip(), mode="eval").body
        _check(tree)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise InputError(
            expected=f"{name} as arithmetic of t: numbers, t, pi, e, + - * / **, {', '.join(FUNCTIONS)}",
            got=f"{text[:60]!r} ({reason})",
            do='write it like "0.02*exp(-t/2000)"',
        ) from None

    def function(t: Any) -> Any:
        t = np.asarray(t, dtype=np.float64)
        with np.errstate(all="ignore"):  # what is not finite is refused where it is used
            return np.broadcast_to(np.asarray(_value(tree, t), dtype=np.float64), t.shape)

    return function


def _check(node: ast.AST) -> None:
    """Refuse whatever is not in the grammar, before anything is computed."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            float(value)
        case ast.Name(id="t" | "pi" | "e"):
            pass
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            _check(left)
            _check(right)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            _check(operand)
        case ast.Call(func=ast.Name(id=called), args=arguments, keywords=[]) if called in FUNCTIONS:
            if len(arguments) != (2 if called in _TWO else 1):
                raise ValueError(f"{called} takes {2 if called in _TWO else 1} argument(s)")
            for argument in arguments:
                _check(argument)
        case ast.Name(id=unknown) | ast.Call(func=ast.Name(id=unknown)):
            raise ValueError(f"unknown name {unknown}")
        case _:
            raise ValueError(f"{type(node).__name__} is no arithmetic")


def _value(node: ast.AST, t: Any) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value):
            return np.float64(value)
        case ast.Name(id=named):
            return {"t": t, "pi": np.float64(np.pi), "e": np.float64(np.e)}[named]
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_value(left, t), _value(right, t))
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_value(operand, t))
        case ast.Call(func=ast.Name(id=called), args=arguments):
            return FUNCTIONS[called](*(_value(argument, t) for argument in arguments))
    raise AssertionError(node)
