//! Programs through the real worker: the corpus in tests/sandbox (and in the folder named by
//! `VALOR_SANDBOX`), the defects of method.md 10 that concern programs, and what becomes of workers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use valor::program::{ErrorKind, Limits, Outcome, Sandbox};
use valor::tools::mock::MockTools;
use valor::tools::stub::StubTools;

/// Good programs that the executor does not run. Exact: one that starts to pass must leave the list.
const GAPS: &[&str] = &[];

fn sandbox() -> Sandbox {
    Sandbox::with_executable(Limits::default(), env!("CARGO_BIN_EXE_valor")).expect("a worker starts")
}

fn run(source: &str) -> Outcome {
    sandbox().run(source, "a.png", &mut StubTools)
}

fn kind(source: &str) -> Option<ErrorKind> {
    run(source).result.err().map(|e| e.kind)
}

fn answer(source: &str) -> Value {
    run(source).result.unwrap_or_else(|e| panic!("{e}\n{source}"))
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sandbox")
}

pub(super) fn folders() -> Vec<PathBuf> {
    std::iter::once(here()).chain(std::env::var_os("VALOR_SANDBOX").map(PathBuf::from)).collect()
}

pub(super) fn programs(folder: &Path) -> Vec<(String, String)> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "py"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} holds no program", folder.display());
    let name = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
    files.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

pub(super) fn header<'a>(source: &'a str, key: &str) -> Option<&'a str> {
    source
        .lines()
        .find_map(|line| line.strip_prefix("# ")?.strip_prefix(key)?.strip_prefix(": "))
        .map(str::trim)
}

pub(super) fn tools(folder: &Path) -> MockTools {
    let scene = std::fs::read_to_string(folder.join("scene.json")).unwrap();
    MockTools::new(serde_json::from_str(&scene).unwrap())
}

/// Equal as JSON, numbers to 1e-6.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() <= 1e-6,
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        _ => a == b,
    }
}

/// Is the outcome one that a header's `expect` names?
pub(super) fn expected(outcome: &Outcome, expect: &str) -> bool {
    match &outcome.result {
        Ok(answer) => serde_json::from_str(expect).is_ok_and(|value| same(answer, &value)),
        Err(error) => {
            let Some(wanted) = expect.strip_prefix("error:") else { return false };
            let (wanted, line) =
                wanted.split_once('@').map_or((wanted, None), |(w, line)| (w, line.parse().ok()));
            (error.kind.as_str() == wanted || error.type_name.as_deref() == Some(wanted))
                && (line.is_none() || error.line == line)
        }
    }
}

/// `denied` and `unsupported` count alike.
pub(super) fn contained(outcome: &Outcome, expect: &str) -> bool {
    expect.split('|').any(|one| match (&outcome.result, one.strip_prefix("value:")) {
        (Ok(answer), Some(value)) => same(answer, &serde_json::from_str(value).unwrap()),
        (Err(error), None) => {
            let alike =
                |kind: &str| if kind == "unsupported" { "denied".to_owned() } else { kind.to_owned() };
            alike(error.kind.as_str()) == alike(one)
        }
        _ => false,
    })
}

#[test]
fn good_programs_answer() {
    for folder in folders() {
        let mut tools = tools(&folder);
        let image = tools.image().to_owned();
        let mut sandbox = sandbox();
        let mut failed = BTreeSet::new();
        let mut notes = String::new();
        for (name, source) in programs(&folder.join("ok")) {
            let outcome = sandbox.run(&source, &image, &mut tools);
            if !expected(&outcome, header(&source, "expect").unwrap()) {
                notes.push_str(&format!("{name}: {:?}\n", outcome.result));
                failed.insert(name);
            }
        }
        let gaps: BTreeSet<String> = GAPS.iter().map(|name| (*name).to_owned()).collect();
        // A folder of the reader's own may lack programs of the list.
        let listed: BTreeSet<String> =
            programs(&folder.join("ok")).into_iter().map(|(name, _)| name).collect();
        let gaps: BTreeSet<String> = gaps.intersection(&listed).cloned().collect();
        assert_eq!(failed, gaps, "{}\n{notes}", folder.display());
    }
}

#[test]
fn hostile_programs_are_contained() {
    for folder in folders() {
        let mut tools = tools(&folder);
        let image = tools.image().to_owned();
        let mut sandbox = sandbox();
        let mut wrong = String::new();
        for (name, source) in programs(&folder.join("hostile")) {
            let outcome = sandbox.run(&source, &image, &mut tools);
            let escaped = matches!(&outcome.result, Ok(Value::String(s)) if s.starts_with("ESCAPED"));
            if escaped || !contained(&outcome, header(&source, "expect").unwrap()) {
                wrong.push_str(&format!("{name}: {:?}\n", outcome.result));
            }
            // Nothing of it is left for the next one.
            let next =
                sandbox.run("final_answer = [len([1, 2]), depth(img_pth, [0, 0, 1, 1])]", &image, &mut tools);
            if next.result != Ok(json!([2, 10.0])) {
                wrong.push_str(&format!("after {name}: {:?}\n", next.result));
            }
        }
        assert!(wrong.is_empty(), "{}\n{wrong}", folder.display());
    }
}

/// Programs run outside this process, with no builtins that reach it, and an endless one ends.
#[test]
fn defect_10_4_programs_run_in_a_jail_with_a_time_limit() {
    let limits = Limits { seconds: 0.2, ..Limits::default() };
    let mut sandbox = Sandbox::with_executable(limits, env!("CARGO_BIN_EXE_valor")).unwrap();
    let mut kind = |source: &str| sandbox.run(source, "a.png", &mut StubTools).result.unwrap_err().kind;
    assert_eq!(kind("while True: pass"), ErrorKind::Timeout);
    for source in
        ["eval('1')", "open('/etc/passwd')", "__import__('os')", "import os\nos.getcwd()", "globals()"]
    {
        assert_eq!(kind(source), ErrorKind::Denied, "{source}");
    }
}

/// With these an answer would hang on when it was asked for, and on luck.
#[test]
fn clocks_and_dice_are_denied() {
    for source in [
        "import time\nfinal_answer = time.time()",
        "from time import monotonic\nfinal_answer = monotonic()",
        "import datetime\nfinal_answer = str(datetime.datetime.now())",
        "from datetime import datetime\nfinal_answer = str(datetime.now())",
        "import random\nfinal_answer = random.random()",
        "import random as dice\nfinal_answer = dice.choice([1, 2])",
        "from random import choice\nfinal_answer = choice([1, 2])",
        "from time import *\nfinal_answer = 1",
    ] {
        assert_eq!(kind(source), Some(ErrorKind::Denied), "{source}");
    }
    // What is only imported, as language models like to, does no harm.
    for source in
        ["from datetime import datetime\nfinal_answer = 1", "from os import path, sep\nfinal_answer = 1"]
    {
        assert_eq!(answer(source), json!(1), "{source}");
    }
}

/// The stub, like every other implementation, takes the box by either name.
#[test]
fn defect_10_12_one_signature_for_every_tool() {
    for name in ["box", "bbox"] {
        let source = format!("final_answer = vqa(img_pth, {name}=[0, 0, 5, 5], prompt='what is it?')");
        assert_eq!(answer(&source), json!("1"));
    }
}

#[test]
fn a_look_alike_is_no_limit() {
    for (raised, limit) in [
        ("MemoryError('memory limit exceeded: 1 bytes > 1 bytes')", ErrorKind::Memory),
        ("TimeoutError('time limit exceeded')", ErrorKind::Timeout),
        ("RecursionError('maximum recursion depth exceeded')", ErrorKind::Recursion),
    ] {
        assert_eq!(kind(&format!("raise {raised}")), Some(ErrorKind::Error), "{limit}");
    }
}

#[test]
fn lines_are_the_programs_own() {
    for (source, line) in [
        ("x = 1\ny = x + 'a'\n", 2),
        ("import numpy as np\n\nx = np.array([1, 2])\ny = x[5]\n", 4),
        ("if True:\n    s = '''a\nb'''\n    1 / 0\nreturn\n", 4),
        ("class A:\n    pass\nclass B(A):\n    def f(self):\n        return 1 / 0\nB().f()\n", 5),
        ("def g():\n    yield 1\n    yield 1 / 0\nlist(g())\n", 3),
    ] {
        assert_eq!(run(source).result.unwrap_err().line, Some(line), "{source}");
    }
}

#[test]
fn the_trace_tells_what_the_tools_said() {
    let outcome =
        run("o = gd_detect(img_pth, 'chair, table')\nfinal_answer = depth(img_pth, o[1]['bbox'])\n");
    assert_eq!(outcome.result, Ok(json!(0.5)));
    let [detect, depth] = outcome.calls.as_slice() else { panic!("{:?}", outcome.calls) };
    assert_eq!((detect.tool.as_str(), detect.line), ("gd_detect", Some(1)));
    assert_eq!(detect.args, json!({"prompt": "chair, table"}));
    assert_eq!(detect.value.as_ref().unwrap()[1], json!({"bbox": [0, 0, 10, 10], "label": "table"}));
    assert_eq!((depth.tool.as_str(), depth.line, &depth.value), ("depth", Some(2), &Some(json!(0.5))));
}

#[cfg(unix)]
#[test]
fn a_killed_worker_is_replaced() {
    struct Killer(u32);
    impl valor::sight::Tools for Killer {
        fn gd_detect(&mut self, _: &str) -> Result<Vec<valor::sight::Detection>, valor::sight::ToolError> {
            // SAFETY: sends a signal to the worker that this test started.
            unsafe { libc::kill(self.0 as i32, libc::SIGKILL) };
            Ok(vec![])
        }
        fn depth(&mut self, _: valor::sight::BBox) -> Result<f64, valor::sight::ToolError> {
            Ok(1.)
        }
        fn vqa(&mut self, _: Option<valor::sight::BBox>, _: &str) -> Result<String, valor::sight::ToolError> {
            Ok(String::new())
        }
        fn point3d(&mut self, _: valor::sight::BBox) -> Result<[f64; 3], valor::sight::ToolError> {
            Ok([0.; 3])
        }
        fn size3d(&mut self, _: valor::sight::BBox) -> Result<[f64; 3], valor::sight::ToolError> {
            Ok([0.; 3])
        }
    }
    let mut sandbox = sandbox();
    let first = sandbox.worker_id().unwrap();
    let outcome = sandbox.run("gd_detect(img_pth, 'a')\nfinal_answer = 1", "a.png", &mut Killer(first));
    assert_eq!(outcome.result.unwrap_err().kind, ErrorKind::Crash);
    assert_eq!(outcome.calls.len(), 1);
    // Killed while idle, too: the next program does not notice.
    let outcome = sandbox.run("final_answer = 2", "a.png", &mut StubTools);
    assert_eq!(outcome.result, Ok(json!(2)));
    let second = sandbox.worker_id().unwrap();
    assert_ne!(first, second);
    // SAFETY: as above.
    unsafe { libc::kill(second as i32, libc::SIGKILL) };
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(sandbox.run("final_answer = 3", "a.png", &mut StubTools).result, Ok(json!(3)));
}

/// State, parent, and ticks of processor time of a process that is there.
#[cfg(target_os = "linux")]
fn stat(pid: u32) -> Option<(String, u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may hold anything.
    let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(((*fields.first()?).to_owned(), number(1)?, number(11)? + number(12)?))
}

/// One that is busy, too: it would not see the end of its pipe for as long as its program runs.
#[cfg(target_os = "linux")]
#[test]
fn a_worker_dies_with_its_parent() {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    struct Ended(Child);
    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    let dir = tempfile::tempdir().unwrap();
    let endless = dir.path().join("endless.py");
    std::fs::write(&endless, "while True:\n    pass\n").unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_valor"))
        .args(["program", "run", "--set", "sandbox.seconds=80", "--scene"])
        .args([here().join("scene.json"), endless])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut parent = Ended(child);
    let id = u64::from(parent.0.id());
    // A fifth of a second of its own: far more than it takes to get ready.
    let busy = |pid: &u32| stat(*pid).is_some_and(|(_, of, ticks)| of == id && ticks >= 20);
    let started = Instant::now();
    let worker = loop {
        let mut all = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        if let Some(worker) = all.find(busy) {
            break worker;
        }
        assert!(parent.0.try_wait().unwrap().is_none(), "it ended by itself");
        assert!(started.elapsed() < Duration::from_secs(30), "no worker is busy");
        std::thread::sleep(Duration::from_millis(10));
    };
    drop(parent);
    let killed = Instant::now();
    // Whoever takes in orphans may leave it a zombie.
    while stat(worker).is_some_and(|(state, ..)| !["Z", "X"].contains(&&*state)) {
        if killed.elapsed() > Duration::from_secs(10) {
            // SAFETY: sends a signal to the worker that this test's child started.
            unsafe { libc::kill(worker as i32, libc::SIGKILL) };
            panic!("the worker outlived its parent");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn every_layer_of_the_jail_holds_here() {
    let sandbox = sandbox();
    let names: Vec<&str> = sandbox.layers().0.iter().map(|layer| layer.name.as_str()).collect();
    assert_eq!(names, ["environment", "descriptors", "parent death", "landlock", "rlimits", "seccomp"]);
    // Landlock is the kernel's to have; the others are not.
    for layer in &sandbox.layers().0 {
        assert!(layer.active || layer.name == "landlock", "{}", sandbox.layers());
    }
}

/// Each with what CPython makes of it.
#[test]
fn rewriting_changes_no_meaning() {
    let cases = [
        // A method that is handed over, of a program with names like ours.
        ("a=['x','y','y','z','y']; final_answer=max(set(a),key=a.count)", json!("y")),
        ("a=[3,1,2]; final_answer=sorted([1,2,3],key=a.index)", json!([3, 1, 2])),
        ("a={'x':1,'y':3}; final_answer=max(a,key=a.get)", json!("y")),
        // Data that is called like a method.
        ("class T:\n def __init__(self): self.count=4\nfinal_answer=T().count", json!(4)),
        ("class T:\n index: int = 7\nfinal_answer=T.index", json!(7)),
        (
            "from collections import namedtuple\nP=namedtuple('P','index count')\nfinal_answer=P(2,3).count",
            json!(3),
        ),
        // Builtins that the program binds for itself.
        ("list=[3,1,2]; final_answer=min(list,key=lambda c: -c)", json!(3)),
        ("len=5; final_answer=max([1,3,2],key=lambda c: -c)+len", json!(6)),
        ("range=9; final_answer=sorted([1,3,2],key=lambda c: -c)", json!([3, 2, 1])),
        ("str='a'; final_answer='%d'%3+str", json!("3a")),
        (
            "import numpy as np\nsum=0; max=1\nfinal_answer=float(np.mean([1,2,3]))+float(np.max([1,5]))",
            json!(7.),
        ),
        // One list under two names.
        (
            "import numpy as np\ndef more(acc): acc += [1, 2]\nl=[]\nmore(l)\nmore(l)\nfinal_answer=len(l)",
            json!(4),
        ),
        ("import numpy as np\nl=[1]; m=l; l+=(3,)\nfinal_answer=m", json!([1, 3])),
        ("import numpy as np\na=np.array([1,2]); b=a; b+=1\nfinal_answer=a.tolist()", json!([2, 3])),
        ("import numpy as np\nn=1; n+=2\nfinal_answer=n", json!(3)),
        // Targets are stored to in their order.
        ("a=[0,0]; i=0\na[i], i = 5, 1\nfinal_answer=[a, i]", json!([[5, 0], 1])),
        ("a=[1,2]; i=0\ni, a[i] = 1, 7\nfinal_answer=a", json!([1, 7])),
        (
            "import numpy as np\na=np.array([1,2]); a[0], a[1] = a[1], a[0]\nfinal_answer=a.tolist()",
            json!([2, 1]),
        ),
        // To the nearest decimal of the number itself.
        (
            "final_answer=[round(2.675,2), round(-0.445,2), round(1.405,2), round(7,1), round(2.5)]",
            json!([2.67, -0.45, 1.41, 7, 2]),
        ),
        ("x=2.675; final_answer=round(number=x,ndigits=2)", json!(2.67)),
        ("import numpy as np\nfinal_answer=round(float(np.mean([2.675])),2)", json!(2.67)),
        // Parentheses.
        ("x=2\nmatch (x):\n case (2 | 3): final_answer='few'\n case _: final_answer='many'", json!("few")),
        ("match 5:\n case n if (n > 3 and n < 9): final_answer=n\n case _: final_answer=0", json!(5)),
        (
            "def g():\n for i in range(3):\n  yield (i + 1)\n yield from (9 for _ in range(1))\nfinal_answer=list(g())",
            json!([1, 2, 3, 9]),
        ),
        (
            "import numpy as np\na=np.array([[1,2],[3,4]])\nfinal_answer=(a+1).T.tolist()",
            json!([[2, 4], [3, 5]]),
        ),
        (
            "l=[1,2]; final_answer=[2,1,2]\n(l or final_answer).sort(key=lambda x: -x)\nfinal_answer=l",
            json!([2, 1]),
        ),
        ("f=([1,1,2] or []).count\nfinal_answer=f(1)", json!(2)),
        // What is put at the head of a body stands as far in as the rest of a program that returns.
        (
            "def g(n):\n for i in range(n):\n  yield i\nfor v in g(3):\n if v==1:\n  final_answer=v\n  return",
            json!(1),
        ),
        (
            "class A:\n def f(self): return 3\nclass B(A):\n x=1\nfinal_answer=B().f()\nif final_answer: return",
            json!(3),
        ),
        // Truth values are numbers, wherever they come from.
        (
            "a = 3 > 2; b = 4 > 2\nfinal_answer = [a + b, a - b, 1 + a, 2.5 - b, a % 2, -a + 1]",
            json!([2, 0, 2, 1.5, 1, 0]),
        ),
        (
            "def left(a, b): return a < b\nn = 0\nfor x in [1, 2, 3]:\n c = x > 1\n n = n + c\nfinal_answer = n + left(1, 2) + left(3, 1)",
            json!(3),
        ),
        (
            "flags = [True, False, True]; d = {'red': True}\nclass O:\n ok = True\no = O(); n = 0\nn += flags[0]; n += d['red']; n += o.ok; n -= flags[2]\nfinal_answer = n",
            json!(2),
        ),
        (
            "import numpy as np\nflags = [True, False, True]; n = 5\nn -= flags[0]\nfinal_answer = [n, 7 - (3 > 2), (3 > 2) % 2]",
            json!([4, 6, 1]),
        ),
        (
            "a = 'x'; b = ['y']\nfinal_answer = [a + 'z', b + [a], 'n: ' + str(1 > 0), (a or b) + 'w', (1, 2) + (3,)]",
            json!(["xz", ["y", "x"], "n: True", "xw", [1, 2, 3]]),
        ),
        // What is stored to among several targets is rewritten itself.
        (
            "import numpy as np\nm = [[1,2],[3,4]]\nm[0][0], m[1][0] = m[1][0], m[0][0]\nfinal_answer = m",
            json!([[3, 2], [1, 4]]),
        ),
        (
            "import numpy as np\nd = {'a': {}}\nd['a']['x'], d['a']['y'] = 1, 2\nfinal_answer = d",
            json!({"a": {"x": 1, "y": 2}}),
        ),
        (
            "import numpy as np\nclass X: pass\nxs = [X(), X()]\nxs[0].v, xs[1].v = 1, 2\nfinal_answer = [x.v for x in xs]",
            json!([1, 2]),
        ),
        (
            "class B:\n def __init__(self): self.p = {}\n @property\n def pos(self): return self.p\nb = B()\nb.pos['x'], b.pos['y'] = 1, 2\nfinal_answer = b.p",
            json!({"x": 1, "y": 2}),
        ),
        (
            "import numpy as np\nm = np.zeros((2, 2)); m[0,1] = m[1,0] = 5.0\na = m[0, 0] = (7)\nfinal_answer = [m.tolist(), a]",
            json!([[[7.0, 5.0], [5.0, 0.0]], 7]),
        ),
        (
            "import numpy as np\nm = np.array([[1, 2], [3, 4]]); m[0, :], k = 9, 1\nfinal_answer = m.tolist()",
            json!([[9, 9], [3, 4]]),
        ),
        // So are the bounds of slices and what is deleted.
        (
            "import numpy as np\nn = 4; a = [1,2,3,4]\nfinal_answer = a[:max(1, int(np.ceil(n*0.3)))]",
            json!([1, 2]),
        ),
        (
            "import numpy as np\nx = np.array([3, 2, 1]); a = [1, 2, 3]\ndel a[int(np.argmax(a))]\nfinal_answer = [x[:np.argmin(x)].tolist(), a]",
            json!([[3, 2], [1, 2]]),
        ),
        (
            "import numpy as np\narr = np.array([1, 2, 3, 4]); idx = np.array([1, 3])\nfinal_answer = arr[idx[0]:idx[1]].tolist()",
            json!([2, 3]),
        ),
        ("a = [1, 2, 3]; flags = [True, False]\na[sum(flags):2] = [9]\nfinal_answer = a", json!([1, 9, 3])),
        // Properties are seen by name, too.
        (
            "class S:\n @property\n def area(self): return 2\n def big(self): return getattr(self, 'area', 0) > 1\ns = S()\nfinal_answer = [s.big(), hasattr(s, 'area'), hasattr(s, 'no'), getattr(s, 'no', 7)]",
            json!([true, true, false, 7]),
        ),
        (
            "from operator import attrgetter\nclass S:\n def __init__(self, w): self.w = w\n @property\n def area(self): return self.w * 2\nboxes = [S(1), S(3), S(2)]\nfinal_answer = [max(boxes, key=attrgetter('area')).w, attrgetter('w', 'area')(boxes[0])]",
            json!([3, [1, 2]]),
        ),
        (
            "class A:\n @property\n def area(self): return 2\nclass B(A):\n @property\n def area(self): return super().area + 1\nfinal_answer = B().area",
            json!(3),
        ),
        (
            "class A:\n n = 3\n @classmethod\n def one(cls, x): return cls.two(x) + 1\n @classmethod\n def two(cls, x): return cls.n * x\n def f(self): return self.one(2)\nclass B(A):\n n = 5\nfinal_answer = [A.one(1), B.one(1), A().f(), B().f()]",
            json!([4, 6, 7, 11]),
        ),
        // Copies are copies.
        (
            "import copy\nfrom collections import defaultdict\nd = defaultdict(list); d['a'].append(1)\ne = copy.deepcopy(d); e['a'].append(2); e['b'].append(3)\nt = copy.deepcopy((1, [2]))\nfinal_answer = [dict(d), dict(e), copy.copy(5), copy.deepcopy({'k': [1]}), list(t)]",
            json!([{"a": [1]}, {"a": [1, 2], "b": [3]}, 5, {"k": [1]}, [1, [2]]]),
        ),
        (
            "import numpy as np\na = np.array([1, 2, 3]); b = np.array(a); c = np.asarray(a); b[0] = 9; c[1] = 8\nfinal_answer = a.tolist()",
            json!([1, 8, 3]),
        ),
        // numpy as programs write it.
        (
            "import numpy as np\nx = np.array([1.5])\nfinal_answer = [isinstance(x, np.ndarray), isinstance(5, (list, np.ndarray)), isinstance([5], (list, np.ndarray))]",
            json!([true, false, true]),
        ),
        (
            "import numpy as np\nc = np.zeros(3); i = 1; c[i] += 1; c[i] *= 4\nd = {'a': [1]}; d['a'][0] += 2; d['a'] += [5]\nclass O: pass\no = O(); o.v = np.array([1, 2]); o.v = o.v + 1; o.v += 1\nfinal_answer = [c.tolist(), d, o.v.tolist()]",
            json!([[0.0, 4.0, 0.0], {"a": [3, 5]}, [3, 4]]),
        ),
        (
            "import numpy as np\nm = np.array([[1, 2], [3, 4]])\nn = m.copy(); n[n > 2] = 0\nfinal_answer = [m[m > 2].tolist(), n.tolist(), (m % 2).tolist()]",
            json!([[3, 4], [[1, 2], [0, 0]], [[1, 0], [1, 0]]]),
        ),
        (
            "import numpy as np\na = np.array([7, 8]); a //= 2\nfinal_answer = [a.tolist(), float(np.round(2.567, decimals=2)), float(np.clip(5, a_min=0, a_max=1)), np.clip([1, 5], 2, None).tolist()]",
            json!([[3, 4], 2.57, 1.0, [2, 5]]),
        ),
        (
            "import numpy as np\nfinal_answer = [np.sort([[3, 1], [2, 0]]).tolist(), np.zeros(2, dtype=int).tolist(), str(np.ones(1, dtype=int)[0]), np.full(2, 1.5).tolist(), float(np.linalg.norm([3, 4], 2))]",
            json!([[[1, 3], [0, 2]], [0, 0], "1", [1.5, 1.5], 5.0]),
        ),
        (
            "import numpy as np\nrows, cols = np.where(np.array([[1, 5], [7, 2]]) > 2)\nfinal_answer = [rows.tolist(), cols.tolist(), np.where(np.array([1, 5]) > 2)[0].tolist()]",
            json!([[0, 1], [1, 0], [1]]),
        ),
        (
            "import statistics\nfinal_answer = [str(statistics.mean([1, 2, 3])), statistics.mean([1, 2]), statistics.mean([True, False]), str(statistics.mean([2.0, 4.0]))]",
            json!(["2", 1.5, 0.5, "3.0"]),
        ),
        // One name, the module's and a function's own.
        (
            "count = 0\ndef g():\n global count\n count += 1\ndef outer():\n count = 0\n def inner():\n  nonlocal count\n  count += 1\n inner(); return count\ng(); g()\nfinal_answer = [count, outer()]",
            json!([2, 1]),
        ),
    ];
    let mut sandbox = sandbox();
    // Within the limits on parts and on text, but not of what a worker may send.
    let large = sandbox.run("final_answer=[1]*99000+['x'*400000]", "a.png", &mut StubTools);
    assert_eq!(large.result.unwrap_err().kind, ErrorKind::BadAnswer);
    let mut wrong = Vec::new();
    for (source, want) in cases {
        match sandbox.run(source, "a.png", &mut StubTools).result {
            Ok(got) if same(&got, &want) => {}
            got => wrong.push(format!("{source}\n  {got:?}, not {want}")),
        }
    }
    // No more is asked for than is needed.
    let asked = "seen=[]\ndef ask(x):\n seen.append(x)\n return x\n";
    for (rest, want) in [
        ("r=any(ask(x)>1 for x in [1,2,3])", json!([true, [1, 2]])),
        ("r=all((ask(x)) < 2 for x in [1,2,3] )", json!([false, [1, 2]])),
        ("r=next(ask(x) for x in [1,2,3])", json!([1, [1]])),
        ("r=next((ask(x) for x in [1,2,3] if ask(x)>1), None)", json!([2, [1, 2, 2]])),
        ("r=next((x for x in [1,2] if x > 2), (ask('none')))", json!(["none", ["none"]])),
        ("r=next((x for x in [] ), -1 ,)", json!([-1, []])),
        ("r=any(ask(x) for x in [])", json!([false, []])),
        ("r=next(((x for x in [1, 2] if ask(x) > 1)), None)", json!([2, [1, 2]])),
        ("r=any(((x for x in [0, 1])))", json!([true, []])),
        (
            "try:\n r=any(a > 4 for a, b in [[1, 2], [5, 6, 7]])\nexcept ValueError as e: r=str(e)",
            json!(["too many values to unpack (expected 2)", []]),
        ),
        (
            "fs=[]\nr=all(fs.append(lambda: x) is None for x in [1, 2])\nr=[f() for f in fs]",
            json!([[2, 2], []]),
        ),
        ("r=all(ask(x) for x in [])", json!([true, []])),
        (
            "r=any((ask(a + b) == 4\n  for a in [1, 2, 3] # loops\n  if a > 1 for b in (a, 1) if b < 3))",
            json!([true, [4]]),
        ),
        ("r=any(ask(i * b) > 2 for i, (a, b) in enumerate([(1, 2), (3, 4), (5, 6)]))", json!([true, [0, 4]])),
        ("r=all(ask(a) for _, a, _ in [(0, 1, 2), (3, 0, 4), (5, 6, 7)])", json!([false, [1, 0]])),
        ("r=any(ask(_) for _, _ in [(1, 0), (0, 2), (3, 4)])", json!([true, [0, 2]])),
        ("r=any(ask(x) == 2 for x in [[1], [2], [3]] for x in x)", json!([true, [1, 2]])),
        (
            "def f(k):\n return any(ask(x) == k for x in range(9) if x > 2 and x != 4)\nr=f(5)",
            json!([true, [3, 5]]),
        ),
        ("r=all(any(ask(x) == y for x in [1, 2]) for y in [1, 3, 2])", json!([false, [1, 1, 2]])),
        ("r=any(1 / x > 0 for x in [ask(1), 0])", json!([true, [1]])),
        ("r=any((m := x) and ask(x) > 1 for x in [1, 2, 3])\nr=[r, m]", json!([[true, 2], [1, 2]])),
        ("r=all((bad := x) < 2 and ask(x) for x in [1, 2, 3])\nr=[r, bad]", json!([[false, 2], [1]])),
        ("r=next((h := ask(x)) for x in [4, 2, 3])\nr=[r, h]", json!([[4, 4], [4]])),
        ("r=next((h for x in [4, 2, 3] if (h := ask(x)) < 3), None)\nr=[r, h]", json!([[2, 2], [4, 2]])),
        ("r=next(((h := x) for x in []), 'none')", json!(["none", []])),
        ("r=any((q := 8 / x) > 1 for x in [4, 0, 2])\nr=[r, q]", json!([[true, 2.0], []])),
        (
            "r=any((p := ask(x * y)) > 3 for x in (1, 2) for y in [1, 2, 3] if y > 1)\nr=[r, p]",
            json!([[true, 4], [2, 3, 4]]),
        ),
        (
            "def f():\n if any((w := ask(x)) > 1 for x in [1, 2, 3]): return w\n return 0\nr=f()",
            json!([2, [1, 2]]),
        ),
        ("r=[any(ask(y) for x in [1, 2] if (y := x - 1)), y]", json!([[true, 1], [1]])),
        (
            "import numpy as np\nr=any(ask(int(a[0])) > 1 for a in np.array([[1, 2], [3, 4], [5, 6]]))",
            json!([true, [1, 3]]),
        ),
        ("class C:\n k=[1, 2]\n r=any(ask(x) == 1 for x in k)\nr=C.r", json!([true, [1]])),
        ("def any(x): return list(x)\nr=any(ask(x) for x in [1, 2])", json!([[1, 2], [1, 2]])),
        ("r=f'{any(ask(x) for x in [0, 1, 2])}'", json!(["True", [0, 1]])),
    ] {
        let source = format!("{asked}{rest}\nfinal_answer=[r, seen]");
        match sandbox.run(&source, "a.png", &mut StubTools).result {
            Ok(got) if same(&got, &want) => {}
            got => wrong.push(format!("{source}\n  {got:?}, not {want}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A gap is told as one, so that CPython may be asked in its place, and is no fault of the program.
#[test]
fn gaps_of_the_library_are_told_as_gaps() {
    for source in [
        "class V:\n def __lt__(self, o): return True\nfinal_answer = sorted([V(), V()])",
        "class V:\n def __getitem__(self, k): return k\nfinal_answer = V()[3]",
        "import copy\nclass V:\n def __init__(self): self.b = [1]\nfinal_answer = copy.deepcopy(V()).b",
        "import numpy as np\nfinal_answer = float(np.linalg.norm([3, 4], 1))",
        "import numpy as np\nm = np.zeros((2, 2))\nfinal_answer = m[[[0], [1]]].tolist()",
        "class A:\n n = 0\n def __init__(self): A.n += 1\nclass B(A): pass\nB()\nfinal_answer = B.n",
    ] {
        assert_eq!(kind(source), Some(ErrorKind::Unsupported), "{source}");
    }
}
