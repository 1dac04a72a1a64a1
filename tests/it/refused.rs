//! What is refused, and where work would have to be done first, before it is: no model is loaded, nothing is
//! left behind, nothing lost.

use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::refused;

const DEMO: &str = "data/demo/room.png";

/// A planner that is not there: what comes before it was met before it was opened.
const NO_PLANNER: [&str; 2] = ["--set", "planner.model=/no/planner"];

fn path(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).display().to_string()
}

fn write(dir: &TempDir, name: &str, text: &str) -> String {
    std::fs::write(dir.path().join(name), text).unwrap();
    path(dir, name)
}

fn names(dir: &TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn where_nothing_can_be_written_is_told_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(&dir, "file", "old");
    let below = path(&dir, "file/below/out");
    let infer = ["infer", DEMO, "How many?"];
    let rooms = ["eval", "--tools", "real", "--planner", "configured"];
    let labels = write(&dir, "labels.jsonl", "");
    let batch = write(&dir, "ask.jsonl", "{\"image\": \"a.png\", \"question\": \"Why?\"}\n");
    for (args, option) in [
        (&infer[..], "--report"),
        (&infer, "--save-overlay"),
        (&rooms, "--pictures"),
        (&["eval", "--bench", "rooms-verifier", "--scenes", "2"], "--out"),
        (&["verify", "audit", "--labels", &labels], "--out"),
        (&["make-queries", "--images", "data/demo"], "--out"),
        (&["rooms", "render", "-n", "3"], "--out"),
        (&["train-reasoner"], "--out"),
        (&["tune-grounding"], "--out"),
    ] {
        let mut all = [args, &[option, &below][..]].concat();
        if args[0] != "rooms" {
            all.extend(NO_PLANNER);
        }
        refused(&all, &[option, &below, &format!("{file}: is no folder"), "name another"]);
    }
    // A file where a folder is, and the other way round.
    let folder = dir.path().display().to_string();
    refused(&[&infer[..], &["--report", &folder], &NO_PLANNER].concat(), &["--report", "is a folder"]);
    refused(
        &[&rooms[..], &["--out", &path(&dir, "file/rows.jsonl")], &NO_PLANNER].concat(),
        &["--out", "is no folder"],
    );
    // Of models that there are, the first question would have been answered.
    refused(&["infer", "--batch", &batch, "--out", &below], &["--out", &below]);
    refused(
        &["rooms", "pretrain", "--only", "planner", "--runs", &path(&dir, "runs"), "--out", &below],
        &["--out", &below],
    );
    assert_eq!(names(&dir), ["ask.jsonl", "file", "labels.jsonl"]);
    assert_eq!(std::fs::read_to_string(file).unwrap(), "old");
}

#[test]
fn stages_are_of_depth_alone() {
    let dir = tempfile::tempdir().unwrap();
    let runs = path(&dir, "runs");
    let args = ["rooms", "pretrain", "--runs", &runs, "--out", &runs, "--only"];
    refused(&[&args[..], &["vlm", "--stages", "2"]].concat(), &["--stages is of depth alone"]);
    refused(&[&args[..], &["familiar", "--steps", "2"]].concat(), &["--only familiar", "--steps"]);
    assert_eq!(names(&dir), [""; 0]);
}

#[test]
fn what_was_never_trained_is_not_exported_and_leaves_no_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (runs, out) = (path(&dir, "runs"), path(&dir, "out"));
    let args = ["rooms", "pretrain", "--export-only", "--runs", &runs, "--out", &out];
    refused(&args, &["runs/planner holds no checkpoint", "--runs"]);
    for part in ["vlm", "depth", "detector"] {
        refused(&[&args[..], &["--only", part]].concat(), &[&format!("runs/{part} holds no checkpoint")]);
    }
    assert_eq!(names(&dir), [""; 0]);
}

/// Of several models some may be begun; where none is, another folder was meant.
#[test]
fn pretraining_that_was_never_begun_is_not_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let (runs, out) = (path(&dir, "runs"), path(&dir, "out"));
    let args = ["rooms", "pretrain", "--resume", "--runs", &runs, "--out", &out];
    refused(&args, &["no run in", "runs; check --runs, or leave out --resume"]);
    refused(&[&args[..], &["--only", "depth"]].concat(), &["no run in", "runs/depth; check --runs"]);
    assert_eq!(names(&dir), [""; 0]);
}

#[test]
fn precision_is_not_measured_without_boxes() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(DEMO, dir.path().join("room.png")).unwrap();
    let size = image::image_dimensions(DEMO).unwrap();
    let coco = json!({
        "images": [{ "id": 1, "file_name": "room.png", "width": size.0, "height": size.1 }],
        "annotations": [], "categories": [{ "id": 1, "name": "chair" }],
    });
    let file = write(&dir, "coco.json", &coco.to_string());
    refused(
        &["eval", "--bench", "detection", "--data", &file, "--set", "detector.model=/no/detector"],
        &["--data", &file, "there is no box in the 1 pictures"],
    );
}

#[test]
fn what_rooms_are_made_by_says_nothing_to_a_files_pictures() {
    for (option, value) in [("--seed", "3"), ("--look", "lived-in"), ("--families", "count")] {
        refused(
            &["eval", "--bench", "detection", "--data", "/no/boxes.json", option, value],
            &[option, "says nothing to --bench detection"],
        );
    }
}

/// An option says something, or is refused by its name.
#[test]
fn what_says_nothing_to_stored_programs_or_to_a_vlm_alone_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = path(&dir, "run");
    let planning = [&["--greedy"][..], &["--vote", "3"], &["--repair", "1"], &["--prompt", "general"]];
    for option in planning {
        let says =
            format!("{} says nothing to stored programs; give --planner base or configured", option[0]);
        for to in [&["--n", "2"][..], &["--planner", "stored"], &["--out", &out]] {
            refused(&[&["eval"][..], option, to].concat(), &[&says]);
        }
    }
    let more = [&["--tools", "oracle"][..], &["--planner", "base"], &["--executor", "embedded"]];
    for option in planning.into_iter().chain(more) {
        let says = format!("{} says nothing to --method direct", option[0]);
        refused(&[&["eval", "--method", "direct", "--out", &out][..], option].concat(), &[&says]);
    }
    refused(
        &["eval", "--planner-only", "--planner", "stored", "--out", &out],
        &["--planner stored says nothing to --planner-only"],
    );
    for to in [&["--out", &out][..], &[]] {
        let args = [&["eval", "--bench", "rooms-depth,rooms-vlm"][..], to].concat();
        refused(&args, &["rooms-depth is measured by itself"]);
    }
    refused(
        &["models", "verify", "--delete", "data/embedded/planner-tuned"],
        &["--delete says nothing to data/embedded/planner-tuned", "hub:OWNER/NAME"],
    );
    assert_eq!(names(&dir), [""; 0]);
}

/// As of `--set planner.model`, and before anything is opened.
#[test]
fn a_planner_that_cannot_be_is_refused_for_every_bench() {
    let dir = tempfile::tempdir().unwrap();
    let out = path(&dir, "run");
    for to in [&["--n", "1"][..], &["--out", &out], &["--bench", "rooms-verifier"]] {
        for (planner, says) in [
            ("endpoint:nope", "planner.model: names an endpoint, and there are none; add [endpoints.nope]"),
            ("", "planner.model: is empty; name embedded, a folder, a preset or hub:OWNER/NAME"),
        ] {
            refused(&[&["eval", "--planner", planner][..], to].concat(), &[says]);
        }
    }
    refused(&["eval", "--planner", "base", "--vote", "1001"], &["inference.samples: 1001 is outside 1…1000"]);
    assert_eq!(names(&dir), [""; 0]);
}

#[test]
fn a_server_is_not_trained() {
    let dir = tempfile::tempdir().unwrap();
    let out = path(&dir, "run");
    let args = ["train-reasoner", "--config", "configs/api.toml", "--dry-run", "--out", &out];
    refused(&args, &["planner.model: is a server, which cannot be trained; name weights"]);
}

#[test]
fn pictures_that_are_nowhere_are_told_with_where_they_were_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    let size = image::image_dimensions(DEMO).unwrap();
    let coco = json!({
        "images": [{ "id": 1, "file_name": "room.png", "width": size.0, "height": size.1 }],
        "annotations": [], "categories": [{ "id": 1, "name": "chair" }],
    });
    let folder = dir.path().join("coco/annotations");
    std::fs::create_dir_all(&folder).unwrap();
    let file = write(&dir, "coco/annotations/instances_val2017.json", &coco.to_string());
    let args = ["eval", "--bench", "detection", "--data", &file, "--set", "detector.model=/no/detector"];
    let folder = folder.display().to_string();
    refused(
        &args,
        &[
            "--data",
            &file,
            "none of its 1 pictures",
            "\"room.png\"",
            &folder,
            "images/val2017/",
            "a link named images",
        ],
    );
    // Where COCO has them they are found; what is missing now is a box.
    std::fs::create_dir(dir.path().join("coco/val2017")).unwrap();
    std::fs::copy(DEMO, dir.path().join("coco/val2017/room.png")).unwrap();
    refused(&args, &["--data", &file, "there is no box in the 1 pictures"]);
}

#[test]
fn questions_and_replies_that_are_none_are_refused_with_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let list = write(&dir, "list.json", "[\"How many?\",\n \"Which one?\"\n");
    let queries = format!("reasoner.queries={list}");
    let out = path(&dir, "run");
    refused(
        &[&["train-reasoner", "--out", &out, "--set", &queries][..], &NO_PLANNER].concat(),
        &["reasoner.queries", "list.json begins as a JSON list and is none", "at line 3"],
    );
    let rows = write(
        &dir,
        "rows.jsonl",
        "{\"question\": \"Why?\", \"reply\": null}\n{\"question\": \"Why?\", \"failure\": \"planner\"}\n\
         {\"question\": \"Why?\", \"answer\": 3}\n",
    );
    refused(
        &["verify", "score", &rows, "--set", "verifier.model=/no/verifier"],
        &["rows.jsonl, line 3: has no \"reply\"", "--planner"],
    );
    assert_eq!(names(&dir), ["list.json", "rows.jsonl"]);
}

#[test]
fn verdicts_are_not_added_to_another_file() {
    let dir = tempfile::tempdir().unwrap();
    let notes = write(&dir, "notes.txt", "dear diary\n");
    let cache = format!("verifier.cache={notes}");
    let sets = ["--set", &cache, "--set", "verifier.model=/no/verifier"];
    refused(
        &[&["verify", "audit", "--rooms", "1"][..], &sets].concat(),
        &["verifier.cache", "notes.txt", "its first line is no verdict", "name a new file"],
    );
    let out = path(&dir, "run");
    refused(&[&["train-reasoner", "--out", &out][..], &sets].concat(), &["verifier.cache"]);
    assert_eq!(std::fs::read_to_string(notes).unwrap(), "dear diary\n");
}

#[test]
fn a_result_is_written_over_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let (notes, rows) = (write(&dir, "notes.jsonl", "{\"dear\": \"diary\"}\n"), path(&dir, "rows.jsonl"));
    let verifier = ["--set", "verifier.model=/no/verifier"];
    for args in [
        &["eval", "--n", "3"][..],
        &["eval", "--bench", "rooms-verifier", "--n", "3", "--scenes", "2"],
        &[&["verify", "audit", "--rooms", "1"][..], &verifier].concat()[..],
    ] {
        refused(
            &[args, &["--out", &notes][..]].concat(),
            &["--out", "notes.jsonl is there and is no earlier result"],
        );
    }
    assert_eq!(std::fs::read_to_string(notes).unwrap(), "{\"dear\": \"diary\"}\n");
    for n in ["3", "2"] {
        let args = ["eval", "--n", n, "--out", &rows];
        assert!(Command::new(env!("CARGO_BIN_EXE_valor")).args(args).output().unwrap().status.success());
        assert_eq!(std::fs::read_to_string(&rows).unwrap().lines().count().to_string(), n);
    }
    // Another command's result is none of this one's.
    refused(
        &[&["verify", "audit", "--rooms", "1", "--out", &rows][..], &verifier].concat(),
        &["rows.jsonl is there"],
    );
}

#[test]
fn a_model_that_sees_nothing_is_no_vlm() {
    let blind = "vlm.model=tests/fixtures/qwen3-tiny";
    refused(
        &[&["infer", DEMO, "How many?", "--set", blind][..], &NO_PLANNER].concat(),
        &["tests/fixtures/qwen3-tiny/config.json", "sees no pictures", "vlm.model"],
    );
}

#[test]
fn another_programs_folder_is_no_reasoners() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir, "thesis.txt", "dear");
    let out = dir.path().display().to_string();
    refused(
        &[&["train-reasoner", "--out", &out][..], &NO_PLANNER].concat(),
        &["--out", "is not empty and holds no run"],
    );
    assert_eq!(names(&dir), ["thesis.txt"]);
}

/// Whatever the environment asks for, an error is a line.
#[test]
fn no_stack_is_told_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir("data/embedded/planner").unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    write(&dir, "model.safetensors", "none");
    let planner = format!("planner.model={}", dir.path().display());
    let output = Command::new(env!("CARGO_BIN_EXE_valor"))
        .args(["infer", DEMO, "How many?", "--set", &planner])
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    let error = said.lines().last().unwrap_or_default();
    assert!(error.contains("not a readable safetensors file"), "{said}");
    assert!(!said.contains("candle_core::") && error.len() < 400, "{said}");
}

/// What made the rows is told in them; a file of rows is gone on with under the same settings.
#[test]
fn a_batch_is_not_gone_on_with_under_other_settings() {
    let dir = tempfile::tempdir().unwrap();
    let line =
        |image: &str| format!("{{\"image\": \"{image}\", \"question\": \"How many chairs are there?\"}}\n");
    let (batch, out) = (write(&dir, "ask.jsonl", &line("a.png")), path(&dir, "rows.jsonl"));
    std::fs::copy(DEMO, dir.path().join("a.png")).unwrap();
    let args = ["infer", "--batch", &batch, "--out", &out];
    let run = || Command::new(env!("CARGO_BIN_EXE_valor")).args(args).output().unwrap();
    let rows = || -> Vec<Value> {
        let text = std::fs::read_to_string(&out).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    };
    assert!(run().status.success());
    let first = rows().remove(0);
    let before = std::fs::read(&out).unwrap();
    // One whose picture comes later.
    write(&dir, "ask.jsonl", &[line("a.png"), line("b.png")].concat());
    for (more, parts) in [
        (&["--set", "detector.box_threshold=0.3"][..], "(detector)"),
        (&["--seed", "4", "--set", "sandbox.seconds=2"], "(sandbox, seed)"),
        (&["--samples", "3"], "(inference)"),
    ] {
        let parts = ["rows.jsonl, line 1: was answered with other settings", parts, "name a new file"];
        refused(&[&args[..], more].concat(), &parts);
    }
    assert_eq!(std::fs::read(&out).unwrap(), before);
    assert_eq!(run().status.code(), Some(1));
    assert_eq!(rows()[1]["error"]["kind"], "picture");
    assert_eq!((&rows()[0], &rows()[1]["settings"]), (&first, &first["settings"]));
    std::fs::copy(DEMO, dir.path().join("b.png")).unwrap();
    let done = run();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success() && said.contains("1 of 2 are answered, 1 failed for want of"), "{said}");
    assert_eq!((&rows()[0], &rows()[1]["answer"]), (&first, &first["answer"]));
    assert_eq!((rows().len(), &rows()[1]["index"]), (2, &json!(1)));
}
