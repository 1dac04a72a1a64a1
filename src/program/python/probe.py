# What a Python is: run once, unjailed, by the interpreter that the user named, before anything of a
# program is. Follows a line `NAMES = {...}`. Prints one line of JSON. Reads as any Python of the last
# fifteen years, so that an old one can be told from none.
import json
import os
import sys

found = {"version": list(sys.version_info[:3])}
if sys.version_info >= (3, 9):
    for module in NAMES["modules"] + NAMES["beside"] + ["ast", "builtins", "errno", "posix", "struct", "types", "warnings"]:
        __import__(module)
    code = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            parts = line.rstrip("\n").split(None, 5)
            if len(parts) == 6 and "x" in parts[1] and os.path.isfile(parts[5]):
                code.add(os.path.realpath(parts[5]))
    found["executable"] = os.path.realpath(sys.executable)
    found["code"] = sorted(code)
    found["path"] = [os.path.realpath(entry) for entry in sys.path if os.path.exists(entry)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        folder = os.path.dirname(os.path.realpath(numpy.__file__))
        found["numpy"] = [numpy.__version__, os.path.dirname(folder), folder]
print(json.dumps(found))
