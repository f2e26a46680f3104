"""Writes Python functions of plain arithmetic as JavaScript, so that a page computes by the same source."""

import ast
import inspect
from types import ModuleType

_OPERATORS: dict[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**", ast.Gt: ">", ast.GtE: ">=", ast.LtE: "<=",
    ast.Eq: "===",
}  # fmt: skip


def javascript(module: ModuleType) -> str:
    """Returns a module's constants and functions. Raises TypeError for syntax that has no translation here."""
    lines = ["const {exp, floor, log10, min, max} = Math;"]
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef):
            names = ", ".join(argument.arg for argument in node.args.args)
            body = "".join(f"  {_write(line)}\n" for line in node.body[1:])  # without the docstring
            lines.append(f"function {node.name}({names}) {{\n{body}}}")
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            lines.append(_write(node))
    return "\n".join(lines)


def _write(node: ast.AST) -> str:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return f"const {name} = {_write(value)};"
        case ast.Return(value=ast.expr() as value):
            return f"return {_write(value)};"
        case ast.Constant(value=value):
            return repr(value)
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{_write(value)}.{name}"
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            return f"({_write(left)} {_OPERATORS[type(op)]} {_write(right)})"
        case ast.IfExp(test=test, body=body, orelse=other):
            return f"({_write(test)} ? {_write(body)} : {_write(other)})"
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return f"{name}({', '.join(map(_write, args))})"
        case ast.Dict(keys=[*keys], values=values):
            return f"{{{', '.join(f'{_write(key)}: {_write(value)}' for key, value in zip(keys, values) if key)}}}"
    raise TypeError(f"There is no JavaScript for {ast.unparse(node)!r}.")
