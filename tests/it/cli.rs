//! The binary as its user meets it: exit codes, what goes to stdout and to stderr, what is in the
//! files that it writes.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

fn valor(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_valor"));
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    valor(args).output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

/// What was told, but for what this machine lacks of the jail: where it does that is told first.
pub fn told(stderr: &[u8]) -> &str {
    let all = std::str::from_utf8(stderr).unwrap();
    match all.split_once('\n') {
        Some((first, rest)) if first.starts_with("valor: this machine lacks layers of") => rest,
        _ => all,
    }
}

fn stderr(output: &Output) -> &str {
    told(&output.stderr)
}

#[test]
fn the_configuration_shown_is_one_to_read() {
    let dir = TempDir::new().unwrap();
    let shown = run(&[
        "config",
        "show",
        "--set",
        "grounding.truth=a.json",
        "--set",
        "endpoints.my-own.model=m",
        "--set",
        "endpoints.my-own.base_url=http://127.0.0.1:1/v1",
    ]);
    assert!(shown.status.success(), "{}", stderr(&shown));
    let file = dir.path().join("shown.toml");
    std::fs::write(&file, &shown.stdout).unwrap();
    let read = run(&["config", "show", "--config", file.to_str().unwrap()]);
    assert!(read.status.success(), "{}", stderr(&read));
    let values =
        |o: &Output| stdout(o).lines().map(|l| l.split(" # ").next().unwrap().trim().to_owned()).collect();
    let (a, b): (Vec<String>, Vec<String>) = (values(&shown), values(&read));
    assert_eq!(a, b);
    assert!(
        a.contains(&"truth = \"a.json\"".to_owned()) && a.contains(&"[endpoints.my-own]".to_owned()),
        "{a:?}"
    );
}

/// Bad input: exit code 2, nothing on stdout, one line on stderr that holds `parts`.
pub fn refused(args: &[&str], parts: &[&str]) {
    let output = run(args);
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert_eq!(stdout(&output), "", "{args:?}");
    assert!(error.starts_with("valor: ") && error.trim_end().lines().count() == 1, "{args:?}: {error}");
    for part in parts {
        assert!(error.contains(part), "{args:?}: no {part:?} in: {error}");
    }
}

/// Bad usage: exit code 2 and an `error:` line that holds `part`, then how it is used.
fn misused(args: &[&str], part: &str) {
    let output = run(args);
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert_eq!(stdout(&output), "", "{args:?}");
    let line = error.lines().next().unwrap_or_default();
    assert!(line.starts_with("error: ") && line.contains(part), "{args:?}: no {part:?} in: {line}");
}

/// A folder with a program in each of the named files, and `scene.json`.
fn programs(sources: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let scene = json!({
        "image": "a.png",
        "objects": [
            {"label": "chair", "bbox": [0, 0, 40, 50], "depth": 2.0},
            {"label": "chair", "bbox": [50, 0, 90, 50], "depth": 3.0},
        ],
    });
    std::fs::write(dir.path().join("scene.json"), scene.to_string()).unwrap();
    for (name, source) in sources {
        std::fs::write(dir.path().join(name), source).unwrap();
    }
    dir
}

fn shown(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).display().to_string()
}

#[test]
fn usage() {
    misused(&["frobnicate"], "frobnicate");
    misused(&["eval", "--bench", "nonesuch"], "nonesuch");
    misused(&["rooms", "render", "--out", "x"], "required");
    misused(&["program", "run", "x.py"], "required");
    for (args, either) in [
        (&["make-queries"][..], "<--images <DIR>|--from <SETS>>"),
        (&["verify", "audit"], "<--labels <FILE>|--rooms <N>>"),
    ] {
        misused(args, "required");
        assert!(stderr(&run(args)).contains(either), "{}", stderr(&run(args)));
    }
    // A question may begin with a dash; what else does so is an option.
    refused(&["infer", "/no/such.png", "-5 beds?"], &["/no/such.png"]);
    refused(&["infer", "/no/such.png", "--jsn"], &["--jsn: is neither an option of infer nor a question"]);
    misused(&["infer", "a.png", "Why?", "--jsn"], "--jsn");
    misused(&["infer", "a.png", "Why?", "--seed", "-1"], "-1");
    misused(&["infer", "a.png", "--seed", "-1", "Why?"], "-1");
    misused(&["infer", "--batch", "x", "--out", "y", "--json"], "cannot be used with");
    misused(&["infer", "a.png", "Why?", "--greedy", "--vote", "3"], "cannot be used with");
    misused(&["make-queries", "-n", "3"], "required");
    misused(&["make-queries", "--images", "x", "--from", "vsr"], "cannot be used with");
    misused(&["make-queries", "--images", "x", "--pull"], "cannot be used with");
    misused(&["make-queries", "--images", "x", "--data", "y"], "cannot be used with");
    let help = run(&["--help"]);
    assert!(help.status.success() && stdout(&help).contains("rooms") && help.stderr.is_empty());
    let version = run(&["--version"]);
    assert_eq!(stdout(&version), format!("valor {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn program_answers_stand_on_stdout() {
    let dir = programs(&[
        ("count.py", "final_answer = len(gd_detect(img_pth, 'chair'))\n"),
        ("word.py", "final_answer = 'two chairs'\n"),
    ]);
    let scene = shown(&dir, "scene.json");
    let program = |file: &str, more: &[&str]| {
        let file = shown(&dir, file);
        let output = run(&[&["program", "run", &file, "--scene", &scene], more].concat());
        assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
        stdout(&output).to_owned()
    };
    assert_eq!(program("count.py", &[]), "2\n");
    assert_eq!(program("word.py", &[]), "two chairs\n");
    assert_eq!(program("word.py", &["--json"]), "{\"answer\":\"two chairs\"}\n");
}

/// Also where it goes through what has no order of its own.
#[test]
fn a_program_gives_the_same_json_every_time() {
    let sets = "kinds = {'lamp', 'chair', 'sofa', 'table', 'bed'}\n\
                counts = {}\n\
                for kind in kinds:\n    counts[kind] = len(gd_detect(img_pth, kind))\n\
                final_answer = [list(kinds), counts, str(kinds), depth(img_pth, [0, 0, 40, 50]) / 7]\n";
    let dir = programs(&[("sets.py", sets), ("fails.py", "a = [1]\nfinal_answer = a[3]\n")]);
    let scene = shown(&dir, "scene.json");
    for (file, code, key) in [("sets.py", 0, "answer"), ("fails.py", 1, "error")] {
        let file = shown(&dir, file);
        let [first, again] = [(); 2].map(|()| run(&["program", "run", &file, "--scene", &scene, "--json"]));
        assert_eq!((first.status.code(), stderr(&first)), (Some(code), ""), "{file}");
        let said: Value = serde_json::from_str(stdout(&first)).unwrap();
        assert!(!said[key].is_null(), "{said}");
        assert_eq!((again.status.code(), stdout(&again)), (Some(code), stdout(&first)), "{file}");
    }
}

/// A program is a stranger's: what it says commands no terminal, and is one line.
#[test]
fn what_programs_say_is_shown_as_text() {
    let dir = programs(&[
        ("raises.py", "raise ValueError('\\x1b[31mred\\x1b[0m\\rX\\na\\u202eb')\n"),
        ("answers.py", "final_answer = '\\x1b[31mred\\nand\\x9b more'\n"),
        ("lists.py", "final_answer = ['\\x7f\\u2066']\n"),
    ]);
    let scene = shown(&dir, "scene.json");
    let program = |file: &str| {
        let output = run(&["program", "run", &shown(&dir, file), "--scene", &scene]);
        (output.status.code(), stdout(&output).to_owned(), stderr(&output).to_owned())
    };
    let (code, answer, error) = program("raises.py");
    assert_eq!((code, &*answer), (Some(1), ""));
    assert!(error.ends_with(": \\x1b[31mred\\x1b[0m\\rX\\na\\u{202e}b\n"), "{error:?}");
    assert_eq!(error.lines().count(), 1, "{error:?}");
    let answered = |said: &str| (Some(0), format!("{said}\n"), String::new());
    assert_eq!(program("answers.py"), answered("\\x1b[31mred\\nand\\x9b more"));
    assert_eq!(program("lists.py"), answered("[\"\\x7f\\u{2066}\"]"));
}

#[test]
fn programs_come_from_standard_input_too() {
    let dir = programs(&[]);
    let mut child = valor(&["program", "run", "-", "--scene", &shown(&dir, "scene.json")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"final_answer = depth(img_pth, [0, 0, 40, 50])\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stdout(&output), stderr(&output)), (Some(0), "2.0\n", ""));
}

#[test]
fn a_program_that_fails_is_exit_code_1_and_no_answer() {
    let dir = programs(&[("bad.py", "a = 1\nfinal_answer = open('/etc/passwd').read()\n")]);
    let (file, scene) = (shown(&dir, "bad.py"), shown(&dir, "scene.json"));
    let output = run(&["program", "run", &file, "--scene", &scene, "--json"]);
    assert_eq!((output.status.code(), stderr(&output)), (Some(1), ""));
    let error: Value = serde_json::from_str(stdout(&output)).unwrap();
    assert_eq!(error["error"]["line"], 2, "{error}");
    // Refused before it ran: no exception, so no type.
    assert!(error["error"]["kind"] == "denied" && error["error"]["type"].is_null(), "{error}");
    assert!(error["error"]["message"].is_string(), "{error}");
    let output = run(&["program", "run", &file, "--scene", &scene]);
    assert_eq!((output.status.code(), stdout(&output)), (Some(1), ""));
    let error = stderr(&output);
    assert!(error.starts_with("valor: the program failed: ") && error.lines().count() == 1, "{error}");
}

#[test]
fn what_program_run_cannot_read_is_named() {
    let dir = programs(&[("ok.py", "final_answer = 1\n"), ("cut.json", "{\"image\": "), ("odd.json", "[3]")]);
    let (file, scene) = (shown(&dir, "ok.py"), shown(&dir, "scene.json"));
    std::fs::write(dir.path().join("latin1.py"), b"# \xe9\n").unwrap();
    let missing = shown(&dir, "missing");
    refused(&["program", "run", &missing, "--scene", &scene], &[&missing, "No such file"]);
    refused(&["program", "run", &file, "--scene", &missing], &[&missing, "No such file"]);
    let folder = dir.path().display().to_string();
    refused(&["program", "run", &folder, "--scene", &scene], &[&folder]);
    let latin1 = shown(&dir, "latin1.py");
    refused(&["program", "run", &latin1, "--scene", &scene], &[&latin1, "UTF-8"]);
    for name in ["cut.json", "odd.json"] {
        let bad = shown(&dir, name);
        refused(&["program", "run", &file, "--scene", &bad], &[&bad, "is no scene", "line 1"]);
    }
}

#[test]
fn nobody_reading_is_no_error() {
    let dir = programs(&[("ok.py", "final_answer = 1\n")]);
    let (file, scene) = (shown(&dir, "ok.py"), shown(&dir, "scene.json"));
    for args in [&["program", "run", &file, "--scene", &scene][..], &["--help"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = valor(args).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let output = output.wait_with_output().unwrap();
        assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn correct_programs_on_exact_tools_are_always_right() {
    let dir = tempfile::tempdir().unwrap();
    for look in ["studio", "lived-in"] {
        let out = shown(&dir, &format!("{look}.jsonl"));
        let args = ["eval", "--bench", "rooms", "-n", "40", "--seed", "5", "--json", "--out", &out];
        let output = run(&[&args[..], &["--look", look]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(stderr(&output).contains("valor: stored programs, exact tools\n"), "{}", stderr(&output));
        let report: Value = serde_json::from_str(stdout(&output)).unwrap();
        let all = report["rows"].as_array().unwrap().iter().find(|r| r["family"] == "all").unwrap();
        assert_eq!((&all["all"]["hits"], &all["all"]["n"]), (&json!(40), &json!(40)), "{report}");
        // With what it takes to measure it again.
        for (key, value) in [
            ("bench", json!("rooms")),
            ("look", json!(look)),
            ("seed", json!(5)),
            ("n", json!(40)),
            ("tools", json!("oracle")),
            ("planner", json!("stored")),
            ("models", json!({})),
            ("failures", json!({})),
            ("rooms_version", json!(valor::rooms::VERSION)),
        ] {
            assert_eq!(report[key], value, "{key}: {report}");
        }
        let records = lines(Path::new(&out));
        assert_eq!(records.len(), 40);
        assert!(records.iter().all(|r| r["correct"] == true && r["rooms_version"] == valor::rooms::VERSION));
    }
}

#[test]
fn questions_of_some_families_are_those_among_all() {
    let dir = tempfile::tempdir().unwrap();
    let rows = |name: &str, more: &[&str]| -> Vec<Value> {
        let out = shown(&dir, name);
        let output = run(&[&["eval", "--bench", "rooms", "--seed", "5", "--out", &out], more].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let version = format!("rooms version {}\n", valor::rooms::VERSION);
        assert!(stdout(&output).ends_with(&version), "{}", stdout(&output));
        lines(Path::new(&out))
    };
    let of = |r: &Value| (r["family"].clone(), r["scene"].clone(), r["question"].clone());
    let all = rows("all.jsonl", &["--n", "60"]);
    let chosen: Vec<_> =
        all.iter().filter(|r| r["family"] == "count" || r["family"] == "two-step").map(of).collect();
    let some = rows("some.jsonl", &["--n", "8", "--families", "two-step,count"]);
    assert!(chosen.len() > 8, "{}", chosen.len());
    assert_eq!(some.iter().map(of).collect::<Vec<_>>(), chosen[..8]);
    misused(&["eval", "--bench", "rooms", "--families", "counts"], "there are count, exists,");
    // What a bench has no use for is refused by its name.
    for (bench, option) in [
        ("rooms-depth", &["--families", "count"][..]),
        ("rooms-depth", &["--planner", "base"]),
        ("rooms-vlm", &["--greedy"]),
        ("rooms-detector", &["--tools", "real"]),
        ("detection", &["--prompt", "general"]),
        ("rooms-vlm", &["--one-by-one"]),
        ("rooms-verifier", &["--executor", "cpython"]),
    ] {
        let says = format!("{} says nothing to --bench {bench}", option[0]);
        refused(&[&["eval", "--bench", bench][..], option].concat(), &[&says]);
    }
    refused(
        &["eval", "--bench", "rooms-verifier", "--planner", "stored"],
        &["--planner stored says nothing"],
    );
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect()
}

#[test]
fn rendered_rooms_are_the_same_twice_and_fit_together() {
    let dir = tempfile::tempdir().unwrap();
    let render = |name: &str, look: &str| {
        let out = dir.path().join(name);
        let shown = out.display().to_string();
        let args = ["rooms", "render", "--seed", "11", "-n", "3", "--look", look, "--out", &shown];
        let output = run(&args);
        assert_eq!((output.status.code(), stdout(&output)), (Some(0), ""), "{}", stderr(&output));
        out
    };
    let out = render("new/a", "lived-in");
    let first = files(&out);
    assert!(first == files(&render("b", "lived-in")), "another run wrote other bytes");
    assert!(first["000000.png"] != files(&render("c", "studio"))["000000.png"]);

    let coco: Value = serde_json::from_slice(&first["coco.json"]).unwrap();
    let (scenes, odvg) = (lines(&out.join("scenes.jsonl")), lines(&out.join("odvg.jsonl")));
    assert_eq!((scenes.len(), odvg.len(), coco["images"].as_array().unwrap().len()), (3, 3, 3));
    for (scene, record) in scenes.iter().zip(&odvg) {
        assert_eq!(scene["filename"], record["filename"]);
        for file in [&scene["filename"], &scene["depth"]] {
            let picture = image::load_from_memory(&first[file.as_str().unwrap()]).unwrap();
            assert_eq!((picture.width(), picture.height()), (256, 192));
        }
        let boxes = record["detection"]["instances"].as_array().unwrap();
        let labels: Value = serde_json::from_slice(&first["label_map.json"]).unwrap();
        assert!(boxes.iter().all(|b| labels[b["label"].to_string()] == b["category"]));
    }
    let questions = lines(&out.join("questions.jsonl"));
    assert!(!questions.is_empty());
    assert!(questions.iter().all(|q| first.contains_key(q["image"].as_str().unwrap())));
    assert_eq!(first.len(), 3 * 2 + 5, "{:?}", first.keys());
}

#[test]
fn rooms_refuses_what_it_cannot_render() {
    let dir = programs(&[("file", "")]);
    let new = shown(&dir, "new");
    let render = |n: &'static str, out| ["rooms", "render", "-n", n, "--out", out];
    for size in ["", "256", "0x0", "15x64", "256x4097", "axb", "64x-64", "64x64x64"] {
        misused(&[&render("1", &new)[..], &["--size", size]].concat(), "--size");
    }
    misused(&render("-1", &new), "-1");
    refused(&render("0", &new), &["--n must be at least 1"]);
    let full = dir.path().display().to_string();
    refused(&render("1", &full), &[&full, "not empty"]);
    let file = shown(&dir, "file");
    refused(&render("1", &file), &[&file]);
    let below = shown(&dir, "file/below");
    refused(&render("1", &below), &[&file]);
    assert!(!Path::new(&new).exists());
}

#[test]
fn a_killed_run_leaves_only_whole_files() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("rooms");
    let shown = out.display().to_string();
    let args = ["rooms", "render", "-n", "2000", "--out", &shown];
    let mut child = valor(&args).stderr(Stdio::null()).spawn().unwrap();
    let pictures = || {
        let entries = std::fs::read_dir(&out).into_iter().flatten();
        entries.filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|x| x == "png")).count()
    };
    let start = Instant::now();
    while pictures() < 5 {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        assert!(start.elapsed() < Duration::from_secs(120), "no pictures after two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    for (name, bytes) in files(&out) {
        // Files being written have hidden names.
        if !name.starts_with('.') {
            assert!(name.ends_with(".png"), "{name} was written before all the pictures");
            image::load_from_memory(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
    refused(&args, &[&shown, "not empty"]);
}

/// What `infer` answers about a bench's picture is what `eval` scores, whatever was asked before it.
#[test]
fn infer_gives_what_eval_scores() {
    let dir = tempfile::tempdir().unwrap();
    let (out, pictures) = (shown(&dir, "rows.jsonl"), shown(&dir, "pictures"));
    let eval = run(&[
        "eval",
        "--bench",
        "rooms",
        "--tools",
        "real",
        "--planner",
        "configured",
        "--look",
        "lived-in",
        "--n",
        "8",
        "--seed",
        "31",
        "--out",
        &out,
        "--pictures",
        &pictures,
        "--json",
    ]);
    assert!(eval.status.success(), "{}", stderr(&eval));
    let told = stderr(&eval);
    assert!(told.contains("valor: models: planner: ") && told.contains(", vlm: "), "{told}");
    for row in lines(Path::new(&out)) {
        let (picture, seed) = (format!("{pictures}/{}.png", row["index"]), row["seed"].to_string());
        let infer = run(&["infer", &picture, row["question"].as_str().unwrap(), "--seed", &seed, "--json"]);
        let got: Value = serde_json::from_str(stdout(&infer)).unwrap();
        assert_eq!((&got["answer"], &got["reply"]["text"]), (&row["answer"], &row["reply"]), "{row}");
        assert!(!stderr(&infer).contains("no picture of Rooms"), "{}", stderr(&infer));
    }
}

#[test]
fn the_demo_picture_is_answered_and_another_world_is_noticed() {
    let question = "What color does the bed have?";
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/data/demo/room.png");
    let output = run(&["infer", demo, question, "--set", "planner.temperature=0"]);
    assert_eq!((stdout(&output), output.status.code()), ("green\n", Some(0)), "{}", stderr(&output));
    assert!(!stderr(&output).contains("no picture of Rooms"), "{}", stderr(&output));

    let dir = tempfile::tempdir().unwrap();
    let path = shown(&dir, "chessboard.png");
    image::RgbImage::from_fn(300, 200, |x, y| image::Rgb([255 * ((x / 25 + y / 25) % 2) as u8; 3]))
        .save(&path)
        .unwrap();
    let output = run(&["infer", &path, question, "--set", "planner.temperature=0"]);
    assert!(stderr(&output).contains("no picture of Rooms"), "{}", stderr(&output));
}

#[test]
fn checkpoints_of_pytorch_are_shown_and_converted_and_code_is_refused() {
    let sample = "tests/fixtures/grounding-dino-original/pth_samples/train_style.pth";
    let shown_as = |args: &[&str]| -> Value { serde_json::from_str(stdout(&run(args))).unwrap() };
    let shapes = shown_as(&["models", "show", sample, "--json"]);
    assert_eq!(shapes["transformer.level_embed"], json!([4, 64]));
    let dir = tempfile::tempdir().unwrap();
    let to = shown(&dir, "out.safetensors");
    let output = run(&["models", "convert", sample, &to]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(shown_as(&["models", "show", &to, "--json"]), shapes);
    refused(&["models", "convert", sample, &to], &["is there already", "--force"]);
    refused(&["models", "convert", sample, &shown(&dir, "out.bin")], &["must end in .safetensors"]);

    // A pickle that would run a command when Python loads it, in the layout from before 1.6.
    let evil = dir.path().join("evil.pth");
    let magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.";
    let call = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.";
    std::fs::write(&evil, [&magic[..], call].concat()).unwrap();
    refused(
        &["models", "show", &evil.display().to_string()],
        &["evil.pth", "posix.system", "nothing was run"],
    );
}

#[test]
fn the_embedded_models_and_what_lies_on_them_fit() {
    let dir = tempfile::tempdir().unwrap();
    let whole = "data/embedded/planner-tuned";
    let output = run(&["models", "verify", "--headers", "embedded", whole, "data/embedded/detector-tuned"]);
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
    for part in [
        "embedded planner-tuned: fits as planner",
        "embedded detector-tuned: fits as detector",
        "embedded box-verifier: fits as vlm",
        "data/embedded/planner-tuned on embedded planner: fits as planner",
        "data/embedded/detector-tuned on embedded detector: fits as detector",
    ] {
        assert!(stdout(&output).contains(part), "no {part:?} in: {}", stdout(&output));
    }
    for (name, bytes) in files(Path::new(whole)) {
        let other = String::from_utf8_lossy(&bytes).replace("\"r\": 32", "\"r\": 16");
        let bytes = if name.ends_with(".json") { other.into_bytes() } else { bytes };
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let output = run(&["models", "verify", "--headers", dir.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let said = stdout(&output);
    assert!(said.contains("on embedded planner: ") && said.contains("expected a rank of 16"), "{said}");
}

/// A MB has 10^6 bytes.
#[test]
fn embedded_models_take_at_most_32_mb_and_with_the_tuned_ones_40() {
    let made = ["depth", "detector", "familiar", "planner", "verifier", "vlm"];
    let mut sizes: BTreeMap<String, usize> = BTreeMap::new();
    for entry in std::fs::read_dir("data/embedded").unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name != "README.md" {
            sizes.insert(name, files(&entry.path()).values().map(Vec::len).sum());
        }
    }
    let all = sizes.values().sum::<usize>();
    let base = made.iter().map(|name| sizes[*name]).sum::<usize>();
    assert!(all <= 40_000_000 && base <= 32_000_000, "{all}, {base}: {sizes:?}");
    // What else there is came of them.
    sizes.retain(|name, _| !made.contains(&name.as_str()));
    assert_eq!(sizes.into_keys().collect::<Vec<_>>(), ["box-verifier", "detector-tuned", "planner-tuned"]);
}

/// Of what lies on an embedded model its own tensors.
#[test]
fn adapters_and_deltas_are_shown() {
    for (folder, tensor, base) in [
        (
            "planner-tuned",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [",
            "embedded-base",
        ),
        ("detector-tuned", ".scale [", "embedded-base"),
    ] {
        let output = run(&["models", "show", &format!("data/embedded/{folder}")]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(stdout(&output).contains(tensor), "{}", stdout(&output));
        assert!(stderr(&output).ends_with(&format!("what was changed of {base}\n")), "{}", stderr(&output));
    }
}

#[test]
fn gguf_files_are_shown_and_damaged_ones_refused() {
    let sample = "tests/fixtures/gguf-qwen3/model.gguf";
    let output = run(&["models", "show", sample]);
    assert!(stdout(&output).contains("blk.0.ffn_down.weight [256, 256] Q6_K 54 kB\n"), "{}", stdout(&output));
    assert!(stderr(&output).starts_with("qwen3: "), "{}", stderr(&output));
    let shown_as: Value = serde_json::from_str(stdout(&run(&["models", "show", sample, "--json"]))).unwrap();
    assert_eq!(
        shown_as["blk.0.ffn_down.weight"],
        json!({ "shape": [256, 256], "type": "Q6_K", "bytes": 53760 })
    );
    let dir = tempfile::tempdir().unwrap();
    let cut = shown(&dir, "cut.gguf");
    let whole = std::fs::read(sample).unwrap();
    std::fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let planner = format!("planner.model={cut}");
    refused(&["infer", "data/demo/room.png", "?", "--set", &planner], &["cut.gguf", "download it again"]);
    refused(&["models", "show", &cut], &["cut.gguf", "download it again"]);
    let vlm = format!("vlm.model={sample}");
    refused(&["infer", "data/demo/room.png", "?", "--set", &vlm], &["vlm.model", "no pictures"]);
}

/// What may be missing is said and is no failure; what the configuration needs and is no good is one.
#[test]
fn doctor_says_what_is_missing_on_a_bare_machine() {
    let home = TempDir::new().unwrap();
    let doctor = |args: &[&str]| {
        let mut command = valor(&["doctor", "--json"]);
        command.args(args).env("PATH", "").env("HF_HOME", home.path());
        let output = command.output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), report)
    };
    let (code, report) = doctor(&[]);
    assert_eq!(code, Some(0), "{report:#}");
    let finding = |what: &str| {
        let all = report["findings"].as_array().unwrap();
        all.iter().find(|f| f["what"] == what).unwrap_or_else(|| panic!("no {what}: {report:#}")).clone()
    };
    if !cfg!(feature = "cuda") {
        let cuda = finding("cuda");
        assert!(
            cuda["ok"] == false && cuda["detail"].as_str().unwrap().contains("on the processor"),
            "{cuda}"
        );
        let (code, report) = doctor(&["--device", "cuda"]);
        let missing = report["configs"][0]["missing"][0].as_str().unwrap_or_default();
        assert!(
            code == Some(1) && missing.starts_with("--device cuda: this build has no CUDA"),
            "{report:#}"
        );
    }
    assert!(finding("model cache")["detail"].as_str().unwrap().ends_with(" free"));
    assert!(finding("this folder")["detail"].as_str().unwrap().ends_with(" free"));
    assert!(finding("memory")["detail"].as_str().unwrap().contains(" free"));

    let (code, report) = doctor(&["--set", "depth.model=tests/fixtures/qwen3-tiny"]);
    let missing = report["configs"][0]["missing"][0].as_str().unwrap();
    assert!(code == Some(1) && missing.contains("is no depth (but fits as planner, verifier)"), "{missing}");
    refused(&["doctor", "--device", "gpu"], &["--device gpu", "expected cpu, cuda or cuda:N"]);
}
