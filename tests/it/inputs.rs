//! What `infer` is given by hand or by a script: it is answered, or one line says what is wrong with it.

use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::refused;

const DEMO: &str = "data/demo/room.png";
const QUESTION: &str = "What color does the bed have?";

/// A folder with the embedded planner's files, whose `config.json` is of other sizes; and what is wrong.
fn misshapen_planner(dir: &TempDir) -> (String, String) {
    let to = dir.path().join("planner");
    std::fs::create_dir(&to).unwrap();
    for entry in std::fs::read_dir("data/embedded/planner").unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    let file = to.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let size = |key: &str| config[key].as_u64().unwrap();
    let (inner, width) = (size("intermediate_size"), size("hidden_size"));
    let other = inner - 32;
    config["intermediate_size"] = json!(other);
    std::fs::write(&file, config.to_string()).unwrap();
    let wrong = format!("mlp.gate_proj.weight has shape [{inner}, {width}], expected [{other}, {width}]");
    (to.display().to_string(), wrong)
}

#[test]
fn what_cannot_be_used_is_told_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let whole = std::fs::read(DEMO).unwrap();
    let (cut, notes) = (write("cut.png", &whole[..whole.len() / 2]), write("notes.jpg", b"Dear diary,\n"));
    let (folder, wrong) = misshapen_planner(&dir);
    let planner = format!("planner.model={folder}");
    let no_picture = "is not a picture that can be read";
    for (args, parts) in [
        (&[&*cut, QUESTION][..], &[&*cut, no_picture][..]),
        (&[&*notes, QUESTION], &[&*notes, no_picture]),
        (&[DEMO, " "], &["the question is empty"]),
        (
            &[DEMO, QUESTION, "--set", "planner.temprature=0"],
            &["--set planner.temprature=0: unknown key", "did you mean `planner.temperature`?"],
        ),
        (&[DEMO, QUESTION, "--set", &*planner], &[&*folder, &*wrong]),
    ] {
        refused(&[&["infer"][..], args].concat(), parts);
    }
}

/// There is nothing to see in them, but that is no fault of theirs.
#[test]
fn pictures_of_odd_sizes_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    for (width, height) in [(1, 1), (20_000, 300)] {
        let picture = dir.path().join("grey.png").display().to_string();
        image::RgbImage::from_pixel(width, height, image::Rgb([120; 3])).save(&picture).unwrap();
        // The plan for this question, which is made without a look at the picture, is known to be sound.
        let done = Command::new(env!("CARGO_BIN_EXE_valor"))
            .args(["infer", &*picture, QUESTION, "--greedy"])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let (answer, told) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert_eq!(done.status.code(), Some(0), "{width}×{height}: {told}");
        assert!(answer.ends_with('\n') && answer.lines().count() == 1, "{width}×{height}: {answer:?}");
    }
}
