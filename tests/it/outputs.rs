//! What is written to: by one process at a time, pipes and devices too, and where there is no room.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use valor::files::Held;
use valor::rooms::{Kind, Look, Split, Thing, generate, scene_seed};
use valor::sight::Picture;

use crate::cli::refused;

const DEMO: &str = "data/demo/room.png";
const FULL: &str = "No space left on device (os error 28)";

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_valor")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn path(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).display().to_string()
}

fn names(dir: &TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A batch of questions about pictures that are nowhere, each of which has a row all the same.
fn questions(dir: &TempDir, n: usize) -> String {
    let line = |i| format!("{{\"image\": \"none{i}.png\", \"question\": \"How many?\"}}\n");
    std::fs::write(dir.path().join("ask.jsonl"), (0..n).map(line).collect::<String>()).unwrap();
    path(dir, "ask.jsonl")
}

#[cfg(unix)]
#[test]
fn what_another_process_works_on_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (out, rows, runs) = (path(&dir, "run"), path(&dir, "rows.jsonl"), path(&dir, "runs"));
    let ask = questions(&dir, 1);
    let held = [
        Held::folder("--out", Path::new(&out)).unwrap(),
        Held::file("--out", Path::new(&rows)).unwrap(),
        Held::folder("--runs", &Path::new(&runs).join("planner")).unwrap(),
    ];
    let busy = |option: &str, what: &str| format!("{option} {what} is in use by another valor process");
    for args in [&["eval", "--n", "3"][..], &["train-reasoner"], &["tune-grounding"]] {
        refused(&[args, &["--out", &out]].concat(), &[&busy("--out", &out)]);
    }
    refused(&["infer", "--batch", &ask, "--out", &rows], &[&busy("--out", &rows)]);
    refused(
        &["rooms", "pretrain", "--only", "planner", "--runs", &runs, "--out", &path(&dir, "made")],
        &[&busy("--runs", &format!("{runs}/planner"))],
    );
    // A plan does nothing there.
    let planned = run(&["tune-grounding", "--dry-run", "--out", &out]);
    assert!(planned.status.success(), "{}", stderr(&planned));
    drop(held);
    assert_eq!(names(&dir), ["ask.jsonl"]);
}

#[test]
fn samples_that_stand_twice_count_once() {
    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name).join("samples.jsonl")).unwrap();
    let double = |name: &str| {
        let twice: String = read(name).lines().map(|l| format!("{l}\n{l}\n")).collect();
        std::fs::write(dir.path().join(name).join("samples.jsonl"), twice).unwrap();
    };
    let eval = |name: &str, more: &[&str]| {
        let out = path(&dir, name);
        let done = run(&[&["eval", "--n", "12", "--seed", "3", "--out", &out], more].concat());
        assert!(done.status.success(), "{}", stderr(&done));
        done.stdout
    };
    let (table, text) = (eval("run", &[]), read("run"));
    double("run");
    assert_eq!((eval("run", &[]), read("run")), (table, text));
    let shards = ["1/2", "2/2"].map(|shard| {
        let name = shard.replace('/', "of");
        eval(&name, &["--shard", shard]);
        path(&dir, &name)
    });
    double("1of2");
    let merged = run(&["eval", "merge", "--out", &path(&dir, "merged"), &shards[0], &shards[1]]);
    assert!(merged.status.success(), "{}", stderr(&merged));
    assert_eq!(read("merged"), read("run"));
}

#[test]
fn rows_of_a_batch_that_stand_twice_are_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let (ask, rows) = (questions(&dir, 2), path(&dir, "rows.jsonl"));
    let args = ["infer", "--batch", &ask, "--out", &rows];
    let done = run(&args);
    assert_eq!(done.status.code(), Some(1), "{}", stderr(&done));
    let text = std::fs::read_to_string(&rows).unwrap();
    assert_eq!(text.lines().count(), 2);
    std::fs::write(&rows, text.repeat(2)).unwrap();
    let done = run(&args);
    let said = stderr(&done);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("what stood twice in") && said.contains("2 failed (left so)"), "{said}");
    assert_eq!(std::fs::read_to_string(&rows).unwrap(), text);
}

#[cfg(target_os = "linux")]
#[test]
fn rows_go_to_pipes_and_devices_too() {
    let dir = tempfile::tempdir().unwrap();
    let ask = questions(&dir, 2);
    let to = |out: &str| run(&["infer", "--batch", &ask, "--out", out]);
    for out in ["-", "/dev/stdout"] {
        let done = to(out);
        assert_eq!(done.status.code(), Some(1), "{out}: {}", stderr(&done));
        let rows: Vec<Value> =
            done.stdout.split(|b| *b == b'\n').filter_map(|l| serde_json::from_slice(l).ok()).collect();
        assert!(rows.len() == 2 && rows.iter().all(|r| r["error"]["kind"] == "picture"), "{out}: {rows:?}");
    }
    // That has no end that could be read.
    let done = to("/dev/zero");
    assert!(stderr(&done).contains("2 questions, 2 of all without an answer"), "{}", stderr(&done));
    let done = to("/dev/full");
    let said = stderr(&done);
    assert!(done.status.code() == Some(1) && said.contains(&format!("/dev/full: {FULL}")), "{said}");
    assert_eq!(names(&dir), ["ask.jsonl"]);
    assert!(!Path::new("-").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn an_answer_is_not_lost_with_the_files_beside_it() {
    let ask = ["infer", DEMO, "How many chairs are there?"];
    let alone = run(&ask);
    assert!(alone.status.success() && alone.stdout.ends_with(b"\n"), "{}", stderr(&alone));
    let piped = run(&[&ask[..], &["--save-overlay", "/dev/stdout"]].concat());
    assert!(piped.status.success(), "{}", stderr(&piped));
    let picture = piped.stdout.strip_prefix(&alone.stdout[..]).expect("the answer comes first");
    assert!(image::load_from_memory(picture).is_ok());
    let full = run(&[&ask[..], &["--save-overlay", "/dev/full"]].concat());
    let said = stderr(&full);
    assert_eq!((full.status.code(), full.stdout), (Some(1), alone.stdout), "{said}");
    assert!(said.contains(&format!("valor: /dev/full: {FULL}")), "{said}");
}

#[test]
fn two_files_are_not_one_and_a_dash_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let ask = ["infer", DEMO, "How many?"];
    for option in ["--report", "--save-overlay"] {
        refused(&[&ask[..], &[option, "-"]].concat(), &[&format!("{option} - is no file; name one")]);
    }
    let (page, drawn) = (path(&dir, "a"), path(&dir, "./a"));
    let both = [&ask[..], &["--report", &page, "--save-overlay", &drawn]].concat();
    refused(&both, &["--save-overlay", &drawn, "is the file of --report; name another file"]);
    assert_eq!(names(&dir), [""; 0]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_below_stdout_is_work_that_failed() {
    for args in [&["config", "show"][..], &["completions", "bash"], &["eval", "--n", "2"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let done = Command::new(env!("CARGO_BIN_EXE_valor"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(full)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
            .wait_with_output()
            .unwrap();
        let told = stderr(&done);
        assert_eq!(done.status.code(), Some(1), "{args:?}: {told}");
        assert!(told.ends_with(&format!("valor: stdout: {FULL}\n")), "{args:?}: {told}");
    }
}

/// With nothing set to make it easier.
#[test]
fn readmes_first_command_gives_what_is_true_of_the_scene() {
    let question = "What color does the bed have?";
    let command = format!("cargo run --release -- infer {DEMO} \"{question}\"");
    let readme = std::fs::read_to_string("README.md").unwrap();
    assert_eq!(readme.lines().find(|l| l.starts_with("cargo run")), Some(&*command));
    // README tells which scene it is.
    let view = generate(scene_seed(Split::Test, 1, 8), Look::Studio, 256, 192);
    let picture = Picture::open(Path::new(DEMO)).unwrap();
    // Not to the bit: sines may be rounded otherwise on another machine.
    let off = picture.rgb().iter().zip(&view.rgb).map(|(a, b)| u64::from(a.abs_diff(*b))).sum::<u64>();
    assert!(off < view.rgb.len() as u64 / 10, "{DEMO} shows another scene: {off}");
    let beds: Vec<&Thing> = view.things.iter().filter(|t| t.kind == Kind::Bed).collect();
    let [bed] = beds[..] else { panic!("{} beds", beds.len()) };
    let done = run(&["infer", DEMO, question]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert_eq!(String::from_utf8_lossy(&done.stdout), format!("{}\n", bed.colour));
}

/// Who reads what is told on stderr may leave, as `head` does.
#[test]
fn what_nobody_reads_on_stderr_ends_no_work() {
    let asked = ["infer", DEMO, "What color does the bed have?"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_valor"))
        .args(asked)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    let deaf = child.wait_with_output().unwrap();
    let heard = run(&asked);
    assert!(heard.status.success() && !heard.stdout.is_empty());
    assert_eq!((deaf.status.code(), deaf.stdout), (Some(0), heard.stdout));
}
