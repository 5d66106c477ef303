"""Reads the package's source, without importing it, and writes its API pages as MyST Markdown.

A parameter is documented by the comment on its line (or on the lines just above it), a field of
a pydantic model also by `Field(description=...)`.  What `__all__` names must have a docstring.
"""

import ast
import io
import json
import re
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

CELL = re.compile(r"# %% (?:\.\./)+(?P<notebook>\S+\.ipynb) #(?P<cell>\w+)")
LONGEST_VALUE = 60  # characters of a default or a constant that a page shows


@dataclass
class Parameter:
    "One row of a parameter table."

    name: str
    type: str  # annotation as written; empty where there is none
    default: str  # as written; empty where a value is required
    comment: str


@dataclass
class Entry:
    "A documented name: a function, a class with its members, or a constant."

    kind: str  # "function", "class", "data", "method", "property", "classmethod", "staticmethod"
    name: str
    line: int
    doc: str = ""
    signature: str = ""  # "(a, b=1)", without annotations
    value: str = ""  # of a constant
    bases: list[str] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    returns: tuple[str, str] = ("", "")  # annotation and comment
    members: list["Entry"] = field(default_factory=list)


@dataclass
class Module:
    "What a page of the API shows."

    name: str  # dotted
    doc: str
    entries: list[Entry]
    places: list[tuple[int, str, str]]  # (line, notebook, id of the cell) of each exported cell

    @property
    def undocumented(self) -> list[Entry]:
        "Public functions and classes without a docstring."
        return [e for e in self.entries if e.kind in ("function", "class") and not e.doc]

    def place(self, line: int) -> tuple[str, str] | None:  # -> (notebook, id of the cell)
        "The exported cell that a line came from."
        before = [place for place in self.places if place[0] <= line]
        return before[-1][1:] if before else None


# ---- reading


class Comments:
    "The comments of a source, by line; `above` are those that have a line to themselves."

    def __init__(self, source: str):
        self.beside, self.above = {}, {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                alone = not token.line[: token.start[1]].strip()
                words = token.string.lstrip("#").strip()
                (self.above if alone else self.beside)[token.start[0]] = words

    def of(self, first: int, last: int) -> str:
        "What is said beside the last line of something, else just above its first."
        if last in self.beside:
            return self.beside[last]
        lines = []
        while (first := first - 1) in self.above:
            lines.insert(0, self.above[first])
        return " ".join(lines)


def shorten(text: str) -> str:
    "One line of limited length."
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 4] + " ..."


def show(node: ast.AST | None) -> str:
    "Source of an expression; empty for None."
    return "" if node is None else shorten(ast.unparse(node).replace("'", '"'))


def given_arguments(args: ast.arguments) -> list[tuple[str, ast.arg, ast.expr | None]]:
    "(name with its stars, argument, default or None) of each, in the order of the call."
    plain = [*args.posonlyargs, *args.args]
    missing = [None] * (len(plain) - len(args.defaults))
    found = [(a.arg, a, d) for a, d in zip(plain, [*missing, *args.defaults], strict=True)]
    if args.vararg:
        found.append((f"*{args.vararg.arg}", args.vararg, None))
    found += [(a.arg, a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        found.append((f"**{args.kwarg.arg}", args.kwarg, None))
    return found


def signature_of(args: ast.arguments, bound: bool) -> str:
    "The call, without annotations; `bound` leaves out self or cls."
    words, plain = [], len(args.posonlyargs) + len(args.args)
    for i, (name, _, default) in enumerate(given_arguments(args)):
        if i == plain and args.kwonlyargs and not args.vararg:
            words.append("*")
        value = show(default)
        short = value if len(value) < LONGEST_VALUE // 2 else "..."
        words.append(f"{name}={short}" if default is not None else name)
    return f"({', '.join(words[bound:])})"


def end_of(arg: ast.arg, default: ast.expr | None) -> int:
    "The line on which a parameter ends."
    return max(arg.end_lineno, default.end_lineno if default is not None else 0)


class Reader:
    "Entries of one module."

    def __init__(self, source: str):
        self.tree = ast.parse(source)
        self.comments = Comments(source)

    def function(self, node, kind: str = "function") -> Entry:
        "A function or method, with its parameter table."
        bound = kind in ("method", "property", "classmethod")
        given = given_arguments(node.args)[bound:]
        ends = Counter(end_of(arg, default) for _, arg, default in given)
        own = {
            line for line, count in ends.items() if count == 1
        }  # their comment is one parameter's
        return Entry(
            kind,
            node.name,
            node.lineno,
            ast.get_docstring(node) or "",
            signature_of(node.args, bound),
            parameters=[self.parameter(name, arg, default, own) for name, arg, default in given],
            returns=(show(node.returns), self.comment_on_result(node, own)),
        )

    def comment_on_result(self, node, own: set[int]) -> str:
        "The comment of a signature that stands on no parameter's line."
        lines = range(node.lineno, max(node.lineno + 1, node.body[0].lineno))
        return next(
            (self.comments.beside[i] for i in lines if i in self.comments.beside and i not in own),
            "",
        )

    def parameter(
        self, name: str, arg: ast.arg, default: ast.expr | None, own: set[int]
    ) -> Parameter:
        "One parameter with its comment."
        last = end_of(arg, default)
        comment = self.comments.of(arg.lineno, last) if last in own else ""
        return Parameter(name, show(arg.annotation), show(default), comment)

    def fields(self, node: ast.ClassDef) -> list[Parameter]:
        "Fields of a dataclass or a model, members of an enumeration, constants of a class."
        found = []
        for item in node.body:
            target = getattr(item, "target", None) or (getattr(item, "targets", None) or [None])[0]
            if not isinstance(item, (ast.Assign, ast.AnnAssign)) or not isinstance(
                target, ast.Name
            ):
                continue
            if not target.id.startswith("_"):
                found.append(self.field(item, target.id))
        return found

    def field(self, item: ast.Assign | ast.AnnAssign, name: str) -> Parameter:
        "One field; what pydantic's Field says of it comes first."
        comment = self.comments.of(item.lineno, item.end_lineno)
        default, value = show(item.value), item.value
        if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in (
            "Field",
            "field",
        ):
            words = {k.arg: k.value for k in value.keywords}
            first = value.args[0] if value.args else words.get("default")
            made = words.get("default_factory")
            default = (
                show(first) if first is not None else f"{show(made)}()" if made is not None else ""
            )
            default = "" if default == "..." else default
            description = words.get("description")
            comment = description.value if isinstance(description, ast.Constant) else comment
            limits = [f"{sign} {show(words[k])}" for k, sign in LIMITS.items() if k in words]
            comment = f"{comment} ({', '.join(limits)})" if limits else comment
        return Parameter(name, show(getattr(item, "annotation", None)), default, comment)

    def class_(self, node: ast.ClassDef) -> Entry:
        "A class: its parameters are those of `__init__`, or its fields."
        entry = Entry(
            "class",
            node.name,
            node.lineno,
            ast.get_docstring(node) or "",
            bases=[ast.unparse(b) for b in node.bases],
        )
        entry.parameters = self.fields(node)
        for item in node.body:
            if not isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if {"setter", "deleter"} & self.decorators(item):
                continue  # of a property that is there already
            if item.name == "__init__":
                made = self.function(item, "method")
                entry.signature = made.signature
                entry.parameters = made.parameters
            elif not item.name.startswith("_"):
                entry.members.append(self.function(item, self.kind(item)))
        return entry

    @staticmethod
    def decorators(node) -> set[str]:
        "The last words of a function's decorators."
        return {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}

    def kind(self, node) -> str:
        "What a function in a class is, by its decorators."
        words = sorted(self.decorators(node) & set(KINDS))
        return KINDS[words[0]] if words else "method"

    def constant(self, node: ast.Assign | ast.AnnAssign, name: str) -> Entry:
        "A constant with its value and comment."
        doc = self.comments.of(node.lineno, node.lineno) or self.comments.of(
            node.lineno, node.end_lineno
        )
        return Entry("data", name, node.lineno, doc, value=show(node.value))

    def all(self) -> dict[str, Entry]:
        "Every top-level definition, by name."
        found = {}
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[node.name] = self.function(node)
            elif isinstance(node, ast.ClassDef):
                found[node.name] = self.class_(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                        if isinstance(name, ast.Name):
                            found[name.id] = self.constant(node, name.id)
        return found


KINDS = {name: name for name in ("property", "classmethod", "staticmethod")}
KINDS["cached_property"] = "property"
LIMITS = {
    "gt": ">",
    "ge": ">=",
    "lt": "<",
    "le": "<=",
    "min_length": "length >=",
    "max_length": "length <=",
}


def read_module(path: Path, name: str) -> Module:
    "The public names of a module, in the order of its source."
    return parse_module(path.read_text(encoding="utf-8"), name)


def parse_module(source: str, name: str) -> Module:
    "The same from the text."
    reader = Reader(source)
    found = reader.all()
    public = []
    for node in reader.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = ast.literal_eval(node.value)
    entries = sorted((found[n] for n in public if n in found), key=lambda e: e.line)
    places = [
        (i, m["notebook"], m["cell"])
        for i, line in enumerate(source.splitlines(), 1)
        if (m := CELL.match(line))
    ]
    return Module(name, ast.get_docstring(reader.tree) or "", entries, places)


def read_package(top: Path) -> dict[str, Path]:
    "Dotted name -> file, of every exported module under a package's folder."
    files = sorted(p for p in top.rglob("*.py") if not p.name.startswith("_"))
    return {".".join([top.name, *p.relative_to(top).with_suffix("").parts]): p for p in files}


# ---- writing

ESCAPED = str.maketrans({c: f"\\{c}" for c in "\\|<>$*_~[]{}"})


def escape(text: str) -> str:
    "Plain text for a Markdown table; what stands between backticks stays code."
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return text.replace("`", "'").translate(ESCAPED)
    return "`".join(
        p.replace("|", "\\|") if i % 2 else p.translate(ESCAPED) for i, p in enumerate(parts)
    )


def code(text: str) -> str:
    "Inline code for a Markdown table; nothing for an empty text."
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def table(parameters: list[Parameter], title: str = "parameter") -> list[str]:
    "Rows of name, type, default and comment; a column that is empty throughout is left out."
    rows = [[code(p.name), code(p.type), code(p.default), escape(p.comment)] for p in parameters]
    heads = [title, "type", "default", "what it is"]
    keep = [i for i in range(4) if i == 0 or any(row[i] for row in rows)]
    if set(keep) <= {0, 2}:
        return []  # nothing that the signature does not say
    lines = ["| " + " | ".join(row[i] for i in keep) + " |" for row in [heads, *rows]]
    return ["", lines[0], "|" + ":--|" * len(keep), *lines[1:], ""]


def returned(entry: Entry) -> list[str]:
    "The line about what a function gives back."
    kind, comment = entry.returns
    if not kind and not comment:
        return []
    words = " ".join(filter(None, [code(kind), escape(comment)]))
    return ["", f"**Returns** {words}", ""] if kind else ["", f"*{words}*", ""]


def directive(entry: Entry, module: Module, link, depth: int = 0) -> list[str]:
    "One entry in the Python domain's directives; members are nested."
    fence = ":" * (6 - depth)
    kind = {"data": "data", "class": "class", "function": "function", "property": "property"}.get(
        entry.kind, "method"
    )
    signature = "" if kind in ("data", "property") else entry.signature
    lines = [f"{fence}{{py:{kind}}} {entry.name}{signature}"]
    if entry.kind in ("classmethod", "staticmethod"):
        lines.append(f":{entry.kind}:")
    if entry.value:
        lines.append(f":value: {json.dumps(entry.value)}")
    lines += ["", escape(entry.doc) if entry.kind == "data" else entry.doc, ""]
    notes = [f"Bases: {', '.join(code(b) for b in entry.bases)}"] if entry.bases else []
    notes += [link(module.place(entry.line))] if depth == 0 else []
    lines += [" · ".join(filter(None, notes)), ""]
    lines += table(entry.parameters, "parameter" if entry.signature else "field")
    lines += returned(entry)
    for member in entry.members:
        lines += ["", *directive(member, module, link, depth + 1)]
    return [*lines, fence, ""]


def write_module(module: Module, link) -> str:  # link: (notebook, cell) or None -> Markdown
    "The page of one module."
    lines = [f"# {module.name}", "", module.doc, ""]
    if module.places and (source := link(module.places[0][1:], whole=True)):
        lines += [source, ""]
    lines += [f"```{{py:module}} {module.name}", "```", ""]
    for entry in module.entries:
        lines += directive(entry, module, link)
    return "\n".join(lines)
