# Runs one program in CPython for its parent, then ends the process. This text follows a line
# `NAMES = {...}` (see names() in mod.rs) and is what `python -c` is given.
#
# Nothing here keeps a hostile program in: the kernel does (jail.rs), and a program that gets around
# what this text refuses meets it. This text makes CPython answer as the embedded interpreter does: the
# same tools, names, kinds of errors, lines and limits. The parent takes every word as hostile.
#
# Python 3.9 or newer.
import sys

sys.path[:] = NAMES["path"]

import ast
import builtins
import errno
import posix
import struct
import types
import warnings

for _module in NAMES["modules"] + NAMES["beside"]:
    __import__(_module)


def _serve():
    program_file = "<program>"
    modules = frozenset(module.partition(".")[0] for module in NAMES["modules"])
    refused_modules = frozenset(NAMES["refused_modules"])
    # The embedded interpreter meets `open` in another way, with the same end.
    refused_names = frozenset(NAMES["refused_names"]) | {"open"}
    refused_attributes = frozenset(NAMES["refused_attributes"])
    numpy = sys.modules.get("numpy")
    real_import = builtins.__import__
    # Freed when memory has run out, so that there is some to say so with.
    reserve = bytearray(2 << 20)
    # What modules seed themselves from was random when they were imported.
    for name in ("random", "numpy.random"):
        if name in sys.modules:
            sys.modules[name].seed(0)
    warnings.simplefilter("ignore")

    class Unfit(Exception):
        """A value that cannot leave the worker; says why."""

    def pack(value, out, depth, left):
        """Appends a value in the form of wire.rs. `left`: parts and bytes of text that it may still have.

        Only methods of the builtin types are called, none that a program overrides.
        """
        left[0] -= 1
        if left[0] < 0:
            raise Unfit("a value with too many parts")
        kind = type(value)
        if value is None:
            out.append(b"n")
        elif kind is bool:
            out.append(b"1" if value else b"0")
        elif issubclass(kind, int):
            number = int.__index__(value)
            if not -(1 << 63) <= number < 1 << 63:
                raise Unfit("an int of more than 64 bits")
            out.append(b"i" + struct.pack("<q", number))
        elif issubclass(kind, float):
            out.append(b"f" + struct.pack("<d", float.__pos__(value)))
        elif issubclass(kind, str):
            out.append(b"s" + pack_text(value, left))
        elif issubclass(kind, dict):
            if depth == 0:
                raise Unfit("a value nested too deeply")
            items = list(dict.items(value))
            out.append(b"d" + struct.pack("<I", len(items)))
            for key, item in items:
                out.append(pack_text(key_text(key), left))
                pack(item, out, depth - 1, left)
        elif issubclass(kind, (list, tuple, set, frozenset)):
            if depth == 0:
                raise Unfit("a value nested too deeply")
            base = next(base for base in (list, tuple, set, frozenset) if issubclass(kind, base))
            items = list(base.__iter__(value))
            out.append(b"l" + struct.pack("<I", len(items)))
            for item in items:
                pack(item, out, depth - 1, left)
        elif numpy is not None and issubclass(kind, (numpy.ndarray, numpy.generic)):
            if value.size > left[0]:
                raise Unfit("a value with too many parts")
            plain = value.tolist()
            if issubclass(type(plain), (numpy.ndarray, numpy.generic)):
                raise Unfit("a value that JSON does not have")
            pack(plain, out, depth, left)
        elif issubclass(kind, type):
            raise Unfit("a type")
        elif kind in (types.FunctionType, types.BuiltinFunctionType, types.MethodType):
            raise Unfit("a function")
        elif kind.__module__ == "__main__":
            raise Unfit("a '%s' object" % kind.__name__)
        else:
            raise Unfit("a value that JSON does not have")

    def pack_text(text, left):
        try:
            data = str.encode(text, "utf-8")
        except UnicodeError:
            raise Unfit("text that is not Unicode") from None
        left[1] -= len(data)
        if left[1] < 0:
            raise Unfit("a value with too much text")
        return struct.pack("<I", len(data)) + data

    def key_text(key):
        """As json.dumps would write it."""
        kind = type(key)
        if issubclass(kind, str):
            return key
        if key is None:
            return "null"
        if kind is bool:
            return "true" if key else "false"
        if issubclass(kind, int):
            return int.__repr__(key)
        if issubclass(kind, float) and key - key == 0:
            return float.__repr__(key)
        raise Unfit("a dict whose keys are not strings")

    def packed(value):
        """One of our own, which always fits."""
        out = []
        pack(value, out, 64, [1 << 30, 1 << 30])
        return b"".join(out)

    def unpack(data):
        """A value from the parent."""
        at = 0

        def size():
            nonlocal at
            at += 4
            return struct.unpack_from("<I", data, at - 4)[0]

        def text():
            nonlocal at
            length = size()
            at += length
            return data[at - length : at].decode("utf-8")

        def value():
            nonlocal at
            tag = data[at : at + 1]
            at += 1
            if tag == b"n":
                return None
            if tag in (b"0", b"1"):
                return tag == b"1"
            if tag in (b"i", b"f"):
                at += 8
                return struct.unpack_from("<q" if tag == b"i" else "<d", data, at - 8)[0]
            if tag == b"s":
                return text()
            if tag == b"l":
                return [value() for _ in range(size())]
            items = {}
            for _ in range(size()):
                key = text()
                items[key] = value()
            return items

        return value()

    def read(length):
        parts = []
        while length > 0:
            part = posix.read(0, min(length, 1 << 20))
            if not part:
                posix._exit(0)
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def receive():
        return unpack(read(struct.unpack("<I", read(4))[0]))

    def send(body):
        data = struct.pack("<I", len(body)) + body
        while data:
            data = data[posix.write(0, data) :]

    # The parent has seen to it by now that nothing more can be opened or started.
    send(packed(["ready"]))
    _, source, img_pth, limits = receive()
    _, _, recursion, output_bytes, prompt_bytes, answer_depth, answer_nodes, message_bytes = limits

    printed = []
    left_to_print = output_bytes
    wrong_picture = False

    def clean(text):
        return str.encode(text, "utf-8", "replace").decode("utf-8")

    def failed(kind, type_name, line, message):
        """The end, which no `except` of the program can stop."""
        text = clean("".join(printed))
        send(packed(["failed", kind, type_name, line, clean(message)[:2000], text]))
        posix._exit(0)

    def line_here():
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename == program_file:
                return frame.f_lineno
            frame = frame.f_back
        return None

    def deny(what):
        failed("denied", None, line_here(), "'%s' is not available to programs" % what)

    class Output:
        encoding = "utf-8"

        def write(self, text):
            nonlocal left_to_print
            if not isinstance(text, str):
                raise TypeError("write() argument must be str, not %s" % type(text).__name__)
            left_to_print -= len(str.encode(text, "utf-8", "replace"))
            if left_to_print < 0:
                failed("output_limit", None, line_here(), "printed more than %d bytes" % output_bytes)
            printed.append(str.__str__(text))
            return len(text)

        def flush(self):
            pass

    def tool(name):
        def call(*args, **kwargs):
            nonlocal wrong_picture
            left = [1000, prompt_bytes + 4096]
            body = [b"l" + struct.pack("<I", 5), packed("call"), packed(name)]
            try:
                body.append(b"l" + struct.pack("<I", len(args)))
                for arg in args:
                    pack(arg, body, 8, left)
                body.append(b"d" + struct.pack("<I", len(kwargs)))
                for key, arg in kwargs.items():
                    body.append(pack_text(key, left))
                    pack(arg, body, 8, left)
            except Unfit as why:
                raise TypeError("%s() cannot take %s" % (name, why)) from None
            body.append(packed(line_here()))
            send(b"".join(body))
            reply = receive()
            if reply[0] == "return":
                return reply[1]
            if reply[0] != "raise":
                failed("host_calls", None, line_here(), "too many tool calls")
            raised = getattr(builtins, reply[1], RuntimeError)
            wrong_picture = wrong_picture or raised is FileNotFoundError
            raise raised(reply[2])

        call.__name__ = call.__qualname__ = name
        return call

    def stand_in(module):
        """What importing a refused module gives: harmless until it is used."""

        def use(*_, **__):
            deny(module)

        names = ("__getattribute__", "__setattr__", "__call__", "__repr__", "__str__", "__iter__", "__eq__")
        return type("module", (), dict.fromkeys(names, use))()

    def import_module(name, globals=None, locals=None, fromlist=(), level=0):
        root = name.partition(".")[0]
        if level == 0 and root in modules:
            return real_import(name, None, None, fromlist, 0)
        if level == 0 and root in refused_modules:
            return stand_in(root)
        if root == "numpy":
            raise ModuleNotFoundError("numpy is not given to programs here (sandbox.numpy)")
        raise ModuleNotFoundError("No module named '%s'" % name)

    refusal = "refused "

    class Builtins(dict):
        """The builtins of the program. Looking up what no program gets ends it."""

        def __missing__(self, name):
            if name.startswith(refusal):
                deny(name[len(refusal) :])
            if name in ("exit", "quit"):
                failed("exit", None, line_here(), "'%s' is not available to programs" % name)
            if name in refused_names:
                deny(name)
            if name == "np":
                why = "numpy is not given to programs here (sandbox.numpy)"
                failed("unsupported", None, line_here(), why)
            raise KeyError(name)

    # Of the refused ones these two are what `class` and `import` call.
    needed = {"__build_class__": builtins.__build_class__, "__import__": import_module}
    named = Builtins((k, v) for k, v in vars(builtins).items() if k not in refused_names and k not in ("exit", "quit"))
    named.update(needed)

    def syntax_error(error):
        line = error.lineno
        if line is not None:
            # At the end of the text the last line is meant, not the one after it.
            line = max(1, min(line, source.rstrip().count("\n") + 1))
        failed("error", type(error).__name__, line, error.msg or "invalid syntax")

    def is_exit(node, taken):
        """`exit()`, `quit()`, `sys.exit()`, whatever code they give."""
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            return False
        called = node.value.func
        if isinstance(called, ast.Name):
            return called.id in ("exit", "quit") and called.id not in taken
        return (
            isinstance(called, ast.Attribute)
            and called.attr == "exit"
            and isinstance(called.value, ast.Name)
            and called.value.id == "sys"
            and "sys" in taken
        )

    def ended_early(tree):
        """Replaces statements by which the program ends itself by `return`: it ends with the answer that it has by
        then. Not inside functions, nor where something would be done on the way out. Are there any?"""
        taken = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                taken.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                taken.add(node.name)
            elif isinstance(node, ast.alias):
                taken.add(node.asname or node.name)
            elif isinstance(node, ast.arg):
                taken.add(node.arg)
        if "final_answer" not in taken:
            return False
        exits = False
        # `match` came with 3.10.
        names = ("Module", "If", "For", "While", "Match", "match_case")
        through = tuple(getattr(ast, name) for name in names if hasattr(ast, name))
        todo = [tree]
        while todo:
            for _, field in ast.iter_fields(todo.pop()):
                for at, item in enumerate(field if isinstance(field, list) else ()):
                    if is_exit(item, taken):
                        exits = True
                        field[at] = ast.copy_location(ast.Return(), item)
                    elif isinstance(item, through):
                        todo.append(item)
        return exits

    def read_program():
        """The program's tree, with what it may not name replaced, the lines that its `raise`s cover, and whether it
        can end itself."""
        tree = ast.parse(source, program_file)
        raises = set()
        exits = ended_early(tree)
        hidden = refused_names & (set(needed) | {"__builtins__", "__loader__"})
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                raises.update(range(node.lineno, node.end_lineno + 1))
            elif isinstance(getattr(node, "ctx", None), ast.Load):
                # No text of a program names these, as they hold a blank: their lookup comes to Builtins.
                if isinstance(node, ast.Attribute) and node.attr in refused_attributes:
                    name = ast.Name(refusal + node.attr, ast.Load())
                    node.value = ast.copy_location(name, node.value)
                elif isinstance(node, ast.Name) and node.id in hidden:
                    node.id = refusal + node.id
        return tree, raises, exits

    def wrapped(tree):
        """The program as the body of a function, for programs with a bare `return` (or a `nonlocal` of
        their own names). What it binds stays global, but for those names."""
        nonlocals, globals_ = set(), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Nonlocal):
                nonlocals.update(node.names)
            elif isinstance(node, ast.Global):
                globals_.update(node.names)
        # `global` of the program's own level says what is so anyway, and may stand too late here.
        todo = [tree]
        while todo:
            node = todo.pop()
            for _, field in ast.iter_fields(node):
                for at, item in enumerate(field if isinstance(field, list) else ()):
                    if isinstance(item, ast.Global):
                        field[at] = ast.copy_location(ast.Pass(), item)
                    elif isinstance(item, ast.AST) and not isinstance(
                        item, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
                    ):
                        todo.append(item)

        def inside(body):
            shell = ast.parse("def _program():\n pass\n_program()\n")
            shell.body[0].body = body or [ast.Pass()]
            return compile(ast.fix_missing_locations(shell), program_file, "exec", dont_inherit=True)

        code = inside(tree.body)
        function = next(c for c in code.co_consts if isinstance(c, types.CodeType))
        bound = set(function.co_varnames) | set(function.co_cellvars) | {"final_answer"}
        return inside([ast.Global(sorted(bound - (nonlocals - globals_)))] + tree.body)

    def compiled(tree):
        try:
            return compile(tree, program_file, "exec", dont_inherit=True)
        except SyntaxError:
            return wrapped(tree)

    def diagnose(error, raises):
        """What ended the program: decided from where an exception was raised, not from its text."""
        line, last, at = None, None, error.__traceback__
        while at is not None:
            last = (at.tb_frame.f_code.co_filename, at.tb_lineno)
            if last[0] == program_file:
                line = last[1]
            at = at.tb_next
        own = last is not None and last[0] == program_file and last[1] in raises
        lines = source.split("\n")
        text = lines[line - 1] if line is not None and line <= len(lines) else ""
        if isinstance(error, SystemExit):
            kind = "exit"
        elif own:
            kind = "error"
        elif isinstance(error, MemoryError):
            kind = "memory"
        elif isinstance(error, RecursionError):
            kind = "recursion"
        elif isinstance(error, (NotImplementedError, ImportError)):
            kind = "unsupported"
        elif isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            kind = "denied"
        elif isinstance(error, AttributeError) and any(name in text for name in refused_attributes):
            kind = "denied"
        elif isinstance(error, FileNotFoundError) and wrong_picture:
            kind = "denied"
        else:
            kind = "error"
        return kind, type(error).__name__, line

    def run():
        nonlocal reserve
        raises, exits = set(), False
        try:
            tree, raises, exits = read_program()
            code = compiled(tree)
        except SyntaxError as error:
            syntax_error(error)
        except (RecursionError, MemoryError, ValueError) as error:
            failed("error", "SyntaxError", None, "the program is too complex: %s" % error)
        tree = None
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        space = vars(main)
        space.update(__builtins__=named, img_pth=img_pth, math=sys.modules["math"])
        space.update((name, tool(name)) for name in NAMES["tools"])
        if numpy is not None:
            space["np"] = numpy
        sys.stdout = Output()
        depth, frame = 0, sys._getframe()
        while frame is not None:
            depth, frame = depth + 1, frame.f_back
        try:
            sys.setrecursionlimit(depth + 1 + recursion)
            exec(code, space)
            sys.setrecursionlimit(1000)
            if "final_answer" not in space and exits:
                failed("exit", None, None, "it ended before final_answer was set")
            if "final_answer" not in space:
                failed("NoAnswer", None, None, "the program never set final_answer")
            body = [b"l" + struct.pack("<I", 3), packed("done")]
            pack(space["final_answer"], body, answer_depth, [answer_nodes, message_bytes // 2])
            body = b"".join(body) + packed(clean("".join(printed)))
            if len(body) > message_bytes:
                raise Unfit("a value with too many parts")
            send(body)
            posix._exit(0)
        except Unfit as why:
            failed("bad_answer", None, None, "final_answer is %s" % why)
        except BaseException as error:
            reserve = None
            sys.setrecursionlimit(1000)
            kind, name, line = diagnose(error, raises)
            # The program's values live as long as its frames.
            error.__traceback__ = None
            space.clear()
            try:
                message = str(error)
            except BaseException:
                message = ""
            failed(kind, name, line, message)

    try:
        run()
    except MemoryError:
        posix._exit(NAMES["out_of_memory"])


_serve()
