//! Programs through the system's Python: the same corpus as for the embedded interpreter, and programs
//! that get around everything that Python itself refuses, which the kernel has to stop. `VALOR_PYTHON`
//! names another Python than `python3`. Where there is none, or this kernel's jail is not whole, the
//! tests say so and pass.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use valor::program::{ErrorKind, Executor, Interpreter, Limits, Outcome, Python, Sandbox, SandboxError};
use valor::tools::stub::StubTools;

use super::sandbox::{contained, expected, folders, header, programs, tools};

const VALOR: &str = env!("CARGO_BIN_EXE_valor");

fn name() -> String {
    std::env::var("VALOR_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

fn open(executor: fn(Python) -> Executor, numpy: bool, limits: Limits) -> Option<Sandbox> {
    let python = match Python::find(&name(), numpy) {
        Ok(python) => python,
        Err(e) => {
            eprintln!("SKIPPED: {e}");
            return None;
        }
    };
    match Sandbox::open(limits, executor(python), Some(VALOR.into())) {
        Ok(sandbox) => Some(sandbox),
        Err(e @ SandboxError::Weak { .. }) => {
            eprintln!("SKIPPED: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn cpython() -> Option<Sandbox> {
    open(Executor::Cpython, false, patient())
}

/// Limits that a busy machine does not reach by itself.
fn patient() -> Limits {
    Limits { seconds: 4., ..Limits::default() }
}

fn is_python_3_9() -> bool {
    Python::find(&name(), false).is_ok_and(|python| python.version.starts_with("3.9."))
}

fn run(sandbox: &mut Sandbox, source: &str) -> Outcome {
    sandbox.run(source, "a.png", &mut StubTools)
}

fn kind(outcome: &Outcome) -> Option<ErrorKind> {
    outcome.result.as_ref().err().map(|e| e.kind)
}

#[test]
fn good_programs_answer_as_the_embedded_interpreters() {
    let Some(mut plain) = cpython() else { return };
    let mut numpy = open(Executor::Cpython, true, patient());
    for folder in folders() {
        let mut tools = tools(&folder);
        let image = tools.image().to_owned();
        let mut wrong = String::new();
        for (name, source) in programs(&folder.join("ok")) {
            let sandbox = match (header(&source, "needs"), &mut numpy) {
                (None, _) => &mut plain,
                (Some("numpy"), Some(numpy)) => numpy,
                (Some(module), _) => {
                    eprintln!("SKIPPED: {name} needs {module}");
                    continue;
                }
            };
            if name.ends_with("_match") && is_python_3_9() {
                eprintln!("SKIPPED: {name} needs Python 3.10");
                continue;
            }
            let outcome = sandbox.run(&source, &image, &mut tools);
            assert_eq!(outcome.interpreter, Interpreter::Cpython);
            if !expected(&outcome, header(&source, "expect").unwrap()) {
                wrong.push_str(&format!("{name}: {:?}\n", outcome.result));
            }
        }
        assert!(wrong.is_empty(), "{}\n{wrong}", folder.display());
    }
}

#[test]
fn hostile_programs_of_the_corpus_are_contained() {
    let Some(mut sandbox) = cpython() else { return };
    for folder in folders() {
        let mut tools = tools(&folder);
        let image = tools.image().to_owned();
        let mut wrong = String::new();
        for (name, source) in programs(&folder.join("hostile")) {
            let outcome = sandbox.run(&source, &image, &mut tools);
            let escaped = matches!(&outcome.result, Ok(Value::String(s)) if s.starts_with("ESCAPED"));
            if escaped || !contained(&outcome, header(&source, "expect").unwrap()) {
                wrong.push_str(&format!("{name}: {:?}\n", outcome.result));
            }
        }
        assert!(wrong.is_empty(), "{}\n{wrong}", folder.display());
    }
}

/// Gets at `posix` and the real import, around all that bootstrap.py refuses.
const REACH: &str = r#"
def _reach():
    for c in getattr(object, "__subcl" + "asses__")():
        if c.__name__ == "_wrap_close":
            return getattr(c.__init__, "__glo" + "bals__")
g = _reach()
b = g["__builtins__"]
load = b["__import__"] if isinstance(b, dict) else b.__import__
real_open = b["open"] if isinstance(b, dict) else b.open
sys = g["sys"]
posix = load("posix")
"#;

/// What follows [`REACH`]; the kinds of error that say that the kernel stopped it. `MARK` is a file that
/// must not come to be, `PARENT` this process.
const ESCAPES: &[(&str, &str, &[ErrorKind])] = {
    use ErrorKind as E;
    const STOPPED: &[ErrorKind] = &[E::Denied, E::Unsupported];
    &[
        ("fork", "posix.fork()", STOPPED),
        ("fork bomb", "while True:\n    posix.fork()", STOPPED),
        ("exec", "posix.execv('/bin/true', ['true'])", STOPPED),
        ("exec of itself", "posix.execv(sys.executable, ['python', '-c', 'pass'])", STOPPED),
        ("spawn", "posix.posix_spawn('/bin/true', ['true'], {})", STOPPED),
        ("system", "if posix.system('touch MARK') != 0:\n    raise g['error'](1, 'no shell')", &[E::Error]),
        ("read passwd", "real_open('/etc/passwd').read()", STOPPED),
        ("read a module", "real_open(load('os').__file__).read()", STOPPED),
        ("read its memory", "posix.open('/proc/self/mem', 2)", STOPPED),
        ("read the environment", "real_open('/proc/self/environ').read()", STOPPED),
        ("write", "posix.open('MARK', posix.O_CREAT | posix.O_WRONLY)", STOPPED),
        ("make a folder", "posix.mkdir('MARK')", STOPPED),
        ("make a pipe in the file system", "posix.mkfifo('MARK')", STOPPED),
        ("list", "posix.listdir('/')", STOPPED),
        ("stat", "posix.stat('/etc/passwd')", STOPPED),
        ("change folder", "posix.chdir('/tmp')", STOPPED),
        ("signal the parent", "posix.kill(PARENT, 0)", STOPPED),
        ("a memory file", "load('posix').memfd_create('x')", STOPPED),
        ("a pipe", "posix.pipe()", STOPPED),
        ("a copy of its socket", "posix.dup(0)", STOPPED),
        ("random numbers", "posix.urandom(8)", STOPPED),
        ("ctypes", "load('ctypes').CDLL(None).fork()", STOPPED),
        ("a socket", "load('_socket').socket()", STOPPED),
        ("mmap", "load('mmap').mmap(-1, 4096, prot=7)", STOPPED),
        ("a handler of signals", "load('_signal').signal(14, lambda *a: None)", STOPPED),
        ("an alarm", "load('_signal').setitimer(0, 0.01)", STOPPED),
        ("a thread", "load('_thread').start_new_thread(print, ())", &[E::Error, E::Denied]),
        ("a program of its own", "load('os').popen('id').read()", STOPPED),
        ("memory", "x = bytearray(10**9)", &[E::Memory]),
        ("memory in small parts", "x = []\nwhile True:\n    x.append(bytes(1000))", &[E::Memory, E::Timeout]),
        (
            "recursion in C",
            "sys.setrecursionlimit(10**8)\nclass A:\n    def __getattr__(self, n):\n        return getattr(self, n)\nA().x",
            &[E::Recursion, E::Memory, E::Crash, E::Timeout],
        ),
        (
            "a recursive function",
            "sys.setrecursionlimit(10**8)\ndef f(n):\n    return repr(sorted([n], key=f))\nf(1)",
            &[E::Recursion, E::Memory, E::Crash, E::Timeout],
        ),
        (
            "garbage on the wire",
            "while True:\n    posix.write(0, b'\\xff' * 100)",
            &[E::Protocol, E::Timeout],
        ),
        ("a message without end", "posix.write(0, b'\\xff\\xff\\x0f\\x00')\nwhile True: pass", &[E::Timeout]),
        ("output past the counter", "while True:\n    posix.write(1, b'x' * 100000)", &[E::Timeout]),
        (
            "time",
            "while True:\n    try:\n        load('time').sleep(9)\n    except BaseException:\n        pass",
            &[E::Timeout],
        ),
        ("an early end", "posix._exit(0)", &[E::Crash]),
    ]
};

#[test]
fn what_gets_around_python_meets_the_kernel() {
    let limits = Limits { seconds: 2., ..Limits::default() };
    let Some(mut sandbox) = open(Executor::Cpython, false, limits) else { return };
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    let mut wrong = String::new();
    for (what, attempt, kinds) in ESCAPES {
        let attempt = attempt
            .replace("MARK", &mark.display().to_string())
            .replace("PARENT", &std::process::id().to_string());
        let outcome = run(&mut sandbox, &format!("{REACH}{attempt}\nfinal_answer = 'ESCAPED'\n"));
        if !kind(&outcome).is_some_and(|kind| kinds.contains(&kind)) || mark.exists() {
            wrong.push_str(&format!("{what}: {:?}\n", outcome.result));
        }
    }
    // That the walk works at all: else nothing was tried.
    let reached = run(&mut sandbox, &format!("{REACH}final_answer = [posix.getpid.__name__, 'open' in b]"));
    if reached.result != Ok(json!(["getpid", true])) {
        wrong.push_str(&format!("the walk: {:?}\n", reached.result));
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// numpy brings `ctypes` along, with which any system call can be made.
#[test]
fn system_calls_of_its_own_meet_the_kernel_too() {
    let Some(mut sandbox) = open(Executor::Cpython, true, patient()) else { return };
    let raw = format!(
        "{REACH}c = sys.modules['ctypes']\nlibc = c.CDLL(None, use_errno=True)\n\
         def call(*args):\n    c.set_errno(0)\n    return [libc.syscall(*args), c.get_errno()]\n"
    );
    // socket, clone, vfork, execve, ptrace, kill, openat, memfd_create, io_uring_setup, seccomp, prctl
    let calls = "[(41, 2, 1, 0), (56, 0, 0, 0, 0, 0), (58,), (59, b'/bin/true', None, None), (101, 0, 0, 0, 0), \
                 (62, 1, 0), (257, -100, b'/etc/passwd', 0), (319, b'x', 0), (425, 1, 0), (317, 1, 0, 0), \
                 (157, 38, 1, 0, 0, 0)]";
    let outcome = run(
        &mut sandbox,
        &format!("{raw}bad = [n[0] for n in {calls} if call(*n)[0] != -1]\nfinal_answer = bad\n"),
    );
    if cfg!(target_arch = "x86_64") {
        assert_eq!(outcome.result, Ok(json!([])));
    }
    // No memory that can be executed, nor made so.
    let code = "libc.mmap.restype = c.c_void_p\n\
                libc.mmap.argtypes = [c.c_void_p, c.c_size_t, c.c_int, c.c_int, c.c_int, c.c_long]\n\
                libc.mprotect.argtypes = [c.c_void_p, c.c_size_t, c.c_int]\n\
                rw = libc.mmap(None, 4096, 3, 0x22, -1, 0)\n\
                final_answer = [libc.mmap(None, 4096, 7, 0x22, -1, 0) == 2**64 - 1, rw != 2**64 - 1, \
                libc.mprotect(rw, 4096, 5)]\n";
    assert_eq!(run(&mut sandbox, &format!("{raw}{code}")).result, Ok(json!([true, true, -1])));
}

#[test]
fn its_environment_holds_no_more_than_its_settings() {
    let Some(mut sandbox) = cpython() else { return };
    let outcome =
        run(&mut sandbox, &format!("{REACH}final_answer = [str(k) for k in sorted(posix.environ)]\n"));
    assert_eq!(outcome.result, Ok(json!(["b'PYTHONHASHSEED'"])));
}

#[test]
fn limits_kinds_and_lines_are_those_of_the_embedded_interpreter() {
    let limits = Limits { host_calls: 3, ..patient() };
    let Some(mut sandbox) = open(Executor::Cpython, false, limits) else { return };
    let cases: &[(&str, ErrorKind, Option<u32>)] = &[
        ("while True: pass", ErrorKind::Timeout, None),
        ("def f(n):\n    return f(n + 1)\nf(0)", ErrorKind::Recursion, Some(2)),
        ("x = [0] * 10**10", ErrorKind::Memory, Some(1)),
        ("x = bytearray(120 << 20)\ny = bytearray(60 << 20)", ErrorKind::Memory, Some(2)),
        ("while True:\n    print('x' * 1000)", ErrorKind::OutputLimit, Some(2)),
        (
            "try:\n    while True: depth(img_pth, [0, 0, 1, 1])\nexcept BaseException: pass",
            ErrorKind::HostCalls,
            Some(2),
        ),
        ("import os\nos.getcwd()", ErrorKind::Denied, Some(2)),
        ("import time\ntime.time()", ErrorKind::Denied, Some(2)),
        ("import random\nrandom.random()", ErrorKind::Denied, Some(2)),
        ("open('/etc/passwd')", ErrorKind::Denied, Some(1)),
        ("x = 1\neval('1')", ErrorKind::Denied, Some(2)),
        ("__import__('os').getcwd()", ErrorKind::Denied, Some(1)),
        ("__builtins__", ErrorKind::Denied, Some(1)),
        ("gd_detect(img_pth + 'x', 'chair')", ErrorKind::Denied, Some(1)),
        ("import pandas", ErrorKind::Unsupported, Some(1)),
        ("import numpy as np", ErrorKind::Unsupported, Some(1)),
        ("x = np.zeros(3)", ErrorKind::Unsupported, Some(1)),
        ("\nquit()", ErrorKind::Exit, Some(2)),
        ("x = 1\nif x == 1:\n    exit()\nfinal_answer = 1", ErrorKind::Exit, None),
        ("try:\n    exit()\nfinally:\n    final_answer = 1", ErrorKind::Exit, Some(2)),
        ("def f():\n    exit()\nfinal_answer = 1\nf()", ErrorKind::Exit, Some(2)),
        ("raise SystemExit(3)", ErrorKind::Exit, Some(1)),
        ("raise MemoryError('memory limit exceeded')", ErrorKind::Error, Some(1)),
        ("raise RecursionError('maximum recursion depth exceeded')", ErrorKind::Error, Some(1)),
        ("final_answer = object()", ErrorKind::BadAnswer, None),
        ("final_answer = 2**64", ErrorKind::BadAnswer, None),
        ("final_answer = float('nan')", ErrorKind::BadAnswer, None),
        ("x = 1", ErrorKind::NoAnswer, None),
        ("x = 1\ny = x + 'a'\n", ErrorKind::Error, Some(2)),
        ("if True:\n    s = '''a\nb'''\n    1 / 0\nreturn\n", ErrorKind::Error, Some(4)),
        ("x = 1\nfinal_answer = (x +\n", ErrorKind::Error, Some(2)),
        ("nothing_of_that_name", ErrorKind::Error, Some(1)),
    ];
    let mut wrong = String::new();
    for (source, wanted, line) in cases {
        let outcome = run(&mut sandbox, source);
        let error = outcome.result.as_ref().err();
        if error.is_none_or(|e| e.kind != *wanted || e.line != *line) {
            wrong.push_str(&format!("{source}\n  {:?}\n", outcome.result));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn answers_are_read_as_the_embedded_interpreters_are() {
    let Some(mut sandbox) = cpython() else { return };
    for (source, answer) in [
        ("final_answer = (1, 2.5, None, True, 'ä')", json!([1, 2.5, null, true, "ä"])),
        (
            "final_answer = {1: 'a', 2.5: {'b'}, None: frozenset()}",
            json!({"1": "a", "2.5": ["b"], "null": []}),
        ),
        ("from collections import Counter\nfinal_answer = Counter('aab')", json!({"a": 2, "b": 1})),
        ("from collections import namedtuple\nfinal_answer = namedtuple('P', 'x y')(1, 2)", json!([1, 2])),
        ("if True:\n    final_answer = 3\n    return\nfinal_answer = 4", json!(3)),
        ("if True:\n    final_answer = 3\n    exit()\nfinal_answer = 4", json!(3)),
        ("import sys\nfor i in [1, 2]:\n    final_answer = i\n    sys.exit(0)", json!(1)),
        ("def f():\n    global final_answer\n    final_answer = 5\nf()\nreturn", json!(5)),
        ("final_answer = 1\nglobal final_answer\nfinal_answer = 2\nreturn", json!(2)),
        ("n = 1\ndef f():\n    nonlocal n\n    n += 1\nf()\nfinal_answer = n", json!(2)),
        ("final_answer = math.floor(2.5)", json!(2)),
        ("final_answer = vqa(img_pth, box=[0, 0, 5, 5], prompt='?')", json!("1")),
        ("if __name__ == '__main__':\n    final_answer = 'main'", json!("main")),
        (
            "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int' = 3\nfinal_answer = P().x",
            json!(3),
        ),
    ] {
        assert_eq!(run(&mut sandbox, source).result, Ok(answer), "{source}");
    }
    let orders: Vec<_> = (0..3)
        .map(|_| run(&mut sandbox, "final_answer = list({str(i) for i in range(40)})").result)
        .collect();
    assert!(
        orders[0].is_ok() && orders.iter().all(|order| *order == orders[0]),
        "sets of strings keep their order"
    );
}

#[test]
fn the_trace_tells_what_the_tools_said() {
    let Some(mut sandbox) = cpython() else { return };
    let outcome = run(
        &mut sandbox,
        "o = gd_detect(img_pth, 'chair, table')\nprint('hi')\nfinal_answer = depth(img_pth, o[1]['bbox'])\n",
    );
    assert_eq!((outcome.result, outcome.stdout.as_str()), (Ok(json!(0.5)), "hi\n"));
    let [detect, depth] = outcome.calls.as_slice() else { panic!("{:?}", outcome.calls) };
    assert_eq!((detect.tool.as_str(), detect.line), ("gd_detect", Some(1)));
    assert_eq!(detect.value.as_ref().unwrap()[1], json!({"bbox": [0, 0, 10, 10], "label": "table"}));
    assert_eq!((depth.tool.as_str(), depth.line, &depth.value), ("depth", Some(3), &Some(json!(0.5))));
}

#[test]
fn the_fallback_runs_what_is_unsupported_and_nothing_else() {
    let Some(mut sandbox) = open(Executor::Fallback, false, patient()) else { return };
    let unsupported =
        "class A:\n    pass\na = A()\na.x = depth(img_pth, [0, 0, 1, 1])\ndel a.x\nfinal_answer = 'gone'\n";
    let embedded =
        Sandbox::with_executable(Limits::default(), VALOR).unwrap().run(unsupported, "a.png", &mut StubTools);
    assert_eq!(
        (kind(&embedded), embedded.interpreter),
        (Some(ErrorKind::Unsupported), Interpreter::Embedded)
    );
    let outcome = run(&mut sandbox, unsupported);
    assert_eq!((outcome.result, outcome.interpreter), (Ok(json!("gone")), Interpreter::Cpython));
    assert_eq!(outcome.calls.len(), 1);
    for source in [
        "final_answer = 1",
        "1 / 0",
        "import os\nos.getcwd()",
        "x = 1",
        "final_answer = (",
        "while True: pass",
    ] {
        assert_eq!(run(&mut sandbox, source).interpreter, Interpreter::Embedded, "{source}");
    }
}

/// One program's Python is gone before the next one's starts, and a late one is ended.
#[test]
fn a_python_ends_with_its_program() {
    let limits = Limits { seconds: 0.2, ..Limits::default() };
    let Some(mut sandbox) = open(Executor::Cpython, false, limits) else { return };
    let started = Instant::now();
    assert_eq!(kind(&run(&mut sandbox, "while True:\n    pass\n")), Some(ErrorKind::Timeout));
    assert!(started.elapsed() < Duration::from_secs(3));
    run(&mut sandbox, "import json\njson.dumps = None\nfinal_answer = 1");
    let outcome = run(&mut sandbox, "import json\nfinal_answer = json.dumps([1])");
    assert_eq!(outcome.result, Ok(json!("[1]")));
}

#[test]
fn a_python_that_will_not_do_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("old");
    std::fs::write(&old, "#!/bin/sh\necho '{\"version\": [3, 8, 18]}'\n").unwrap();
    let broken = dir.path().join("broken");
    std::fs::write(&broken, "#!/bin/sh\necho 'cannot: at all' >&2\nexit 3\n").unwrap();
    let repeats = dir.path().join("repeats");
    std::fs::write(&repeats, "#!/bin/sh\necho \"no such file: $*\" | tr '\\n' ' ' >&2\nexit 2\n").unwrap();
    #[cfg(unix)]
    for path in [&old, &broken, &repeats] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let cases = [
        (&*old, "Python 3.8"),
        (&*broken, "cannot: at all"),
        (&*repeats, "(no such file: -I"),
        (Path::new("/no/such/python"), "is not there"),
    ];
    for (path, part) in cases.into_iter().filter(|_| cfg!(target_os = "linux")) {
        let error = Python::find(&path.display().to_string(), false).unwrap_err().to_string();
        assert!(error.starts_with("sandbox.python = ") && error.contains(part), "{error}");
        assert!(!error.contains('\n') && error.len() < 500, "{error}");
        for option in ["--executor", "--fallback"] {
            let output = Command::new(VALOR)
                .args(["program", "run", "-", "--scene", "tests/sandbox/scene.json", option, "cpython"])
                .args(["--set", &format!("sandbox.python={}", path.display())])
                .current_dir(env!("CARGO_MANIFEST_DIR"))
                .stdin(std::process::Stdio::null())
                .output()
                .unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{stderr}");
            assert!(stderr.starts_with("valor: sandbox.python") && stderr.lines().count() == 1, "{stderr}");
        }
    }
}

/// As on a kernel that lacks a layer: the system call that asks for it is not there.
#[cfg(target_os = "linux")]
#[test]
fn where_the_jail_is_not_whole_it_refuses_to_start() {
    use std::os::unix::process::CommandExt;

    /// Lets one system call fail with ENOSYS, in this process and all that it starts.
    fn without(call: i64) -> std::io::Result<()> {
        let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut steps = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
        // SAFETY: integers, and a pointer to a filter that outlives the call.
        let rc = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program)
        };
        if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    if let Err(e) = Python::find(&name(), false) {
        eprintln!("SKIPPED: {e}");
        return;
    }
    for (call, layer) in [(libc::SYS_landlock_create_ruleset, "landlock"), (libc::SYS_seccomp, "seccomp")] {
        let run = |more: &[&str]| {
            let mut command = Command::new(VALOR);
            command
                .args(["program", "run", "tests/sandbox/ok/01_height_ratio.py"])
                .args(["--scene", "tests/sandbox/scene.json", "--set"])
                .arg(format!("sandbox.python={}", name()))
                .args(more)
                .current_dir(env!("CARGO_MANIFEST_DIR"));
            // SAFETY: between fork and exec it makes system calls only.
            unsafe { command.pre_exec(move || without(call)) };
            let output = command.output().unwrap();
            (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        for option in ["--executor", "--fallback"] {
            let (code, said) = run(&[option, "cpython"]);
            assert_eq!(code, Some(2), "{layer} {option}: {said}");
            assert!(said.contains("refuses to start") && said.contains(layer), "{layer} {option}: {said}");
            assert_eq!(said.lines().count(), 1, "{said}");
        }
        let (code, said) = run(&[]);
        assert_eq!(code, Some(0), "the embedded interpreter has limits of its own");
        let told = said.starts_with("valor: this machine lacks layers of the programs' jail (");
        assert!(told && said.contains(layer) && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn the_command_line_names_the_executor_and_embedded_is_the_default() {
    let run = |more: &[&str]| {
        let program = "class A:\n    pass\na = A()\na.x = 1\ndel a.x\nfinal_answer = 'gone'\n";
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("p.py"), program).unwrap();
        let output = Command::new(VALOR)
            .args(["program", "run", &dir.path().join("p.py").display().to_string()])
            .args(["--scene", "tests/sandbox/scene.json", "--json", "--set"])
            .arg(format!("sandbox.python={}", name()))
            .args(more)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, said) = run(&[]);
    assert!(code == Some(1) && said.contains("\"kind\":\"unsupported\""), "{said}");
    if cpython().is_some() {
        for option in ["--executor", "--fallback"] {
            assert_eq!(
                run(&[option, "cpython"]),
                (Some(0), "{\"answer\":\"gone\"}\n".to_owned()),
                "{option}"
            );
        }
    }
}

#[test]
fn the_doctor_knows_whether_there_is_a_python() {
    let said = |python: &str, more: &[&str]| -> Value {
        let output = Command::new(VALOR)
            .args(["doctor", "--json", "--set", &format!("sandbox.python={python}")])
            .args(more)
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let finding = |report: &Value| -> (bool, String) {
        let all = report["findings"].as_array().unwrap();
        let one = all.iter().find(|f| f["what"] == "cpython").unwrap();
        (one["ok"].as_bool().unwrap(), one["detail"].as_str().unwrap().to_owned())
    };
    let report = said("/no/such/python", &[]);
    let (ok, detail) = finding(&report);
    assert!(!ok && (detail.contains("is not there") || !cfg!(target_os = "linux")), "{detail}");
    assert_eq!(report["configs"][0]["missing"], json!([]), "nobody asked for it");
    let report = said("/no/such/python", &["--set", "sandbox.fallback=cpython"]);
    assert_eq!(report["configs"][0]["missing"].as_array().unwrap().len(), 1);
    if cpython().is_some() {
        let (ok, detail) = finding(&said(&name(), &[]));
        assert!(ok && detail.contains("jail is whole") && detail.starts_with("3."), "{detail}");
    }
}
