//! `valor tune-grounding`, run as a user would: to its end, killed, misused, with verifiers of all kinds.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use valor::data::odvg::Boxes;

use crate::server::{Act, Server};

const SMALL: [&str; 10] = [
    "detector.model=embedded-base",
    "grounding.pictures=6",
    "grounding.mining.together=2",
    "grounding.training.epochs=2",
    "grounding.training.batch=2",
    "grounding.training.eval_every=0",
    "grounding.training.save_every=1",
    "grounding.training.ema=0.9",
    "grounding.mining.confidence=0.5",
    "grounding.mining.box_threshold=0.14",
];

fn command(out: &Path, sets: &[&str], more: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_valor"));
    c.arg("tune-grounding").arg("--out").arg(out).args(more);
    for set in SMALL.iter().chain(sets) {
        c.args(["--set", set]);
    }
    c.stdout(Stdio::piped()).stderr(Stdio::piped());
    c
}

fn run(out: &Path, sets: &[&str], more: &[&str]) -> Output {
    command(out, sets, more).output().unwrap()
}

fn stderr(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// The lines of a run's metrics without what clocks say.
fn metrics(out: &Path) -> Vec<Value> {
    let mut all = lines(&out.join("metrics.jsonl"));
    all.iter_mut().for_each(|v| {
        for timed in ["seconds", "unix"] {
            v.as_object_mut().unwrap().remove(timed);
        }
    });
    all
}

/// Starts a command over and over, each time killed somewhat later, until it reaches its end.
fn with_kills(mut make: impl FnMut() -> Command) -> usize {
    for (session, wait) in (1..).zip((0..).map(|i| Duration::from_millis(300 + 300 * i))) {
        assert!(session < 80, "it does not come to an end");
        let mut child = make().spawn().unwrap();
        std::thread::sleep(wait);
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            return session;
        }
    }
    unreachable!()
}

#[test]
fn a_killed_tuning_goes_on_as_if_it_had_not_been() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    let o = run(&whole, &[], &[]);
    assert!(o.status.success(), "{}", stderr(&o));
    assert_eq!(String::from_utf8_lossy(&o.stdout).trim(), whole.join("model").display().to_string());
    assert!(stderr(&o).contains("precision"), "{}", stderr(&o));
    for file in ["mined/report.html", "mined/precision.json", "mined/label_map.json", "model/tokenizer.json"]
    {
        assert!(whole.join(file).is_file(), "{file}");
    }
    let mined = lines(&whole.join("mined/pictures.jsonl"));
    assert_eq!(mined.len(), 6);
    let found: usize = mined.iter().map(|r| r["found"].as_array().unwrap().len()).sum();
    assert!(found > 20, "thresholds are low: {found}");
    for r in &mined {
        for f in r["found"].as_array().unwrap() {
            assert!(r["nouns"].as_array().unwrap().contains(&f["label"]), "nobody asked for {f}");
        }
    }

    assert!(with_kills(|| command(&killed, &[], &["--stage", "mine"])) > 1);
    for file in ["mined/pictures.jsonl", "mined/odvg.jsonl", "mined/label_map.json"] {
        let read = |d: &Path| std::fs::read_to_string(d.join(file)).unwrap();
        assert_eq!(read(&killed), read(&whole), "{file}");
    }
    assert!(with_kills(|| command(&killed, &[], &["--stage", "train", "--resume"])) > 1);
    assert_eq!(metrics(&killed), metrics(&whole));
    let weights = |d: &Path| std::fs::read(d.join("model/model.safetensors")).unwrap();
    assert_eq!(weights(&killed), weights(&whole));

    // It is a detector like any other.
    let picture = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/demo/room.png");
    let o = Command::new(env!("CARGO_BIN_EXE_valor"))
        .arg("infer")
        .arg(picture)
        .args(["What color does the bed have?", "--set"])
        .arg(format!("detector.model={}", whole.join("model").display()))
        .output()
        .unwrap();
    assert!(o.status.success(), "{}", stderr(&o));

    // What was mined with other settings is not gone on with, and a run is not begun over another.
    let o = run(&whole, &["grounding.mining.box_threshold=0.2"], &["--stage", "mine"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(stderr(&o).contains("box_threshold was 0.14, is 0.2"), "{}", stderr(&o));
    let o = run(&whole, &[], &["--stage", "train"]);
    assert_eq!(o.status.code(), Some(2));
    assert!(stderr(&o).contains("--resume"), "{}", stderr(&o));

    // A person's word counts, and ids stay where they were.
    let before = std::fs::read_to_string(whole.join("mined/label_map.json")).unwrap();
    let first = mined.iter().find(|r| r["found"].as_array().is_some_and(|f| !f.is_empty())).unwrap();
    let word = serde_json::json!({ "image": first["image"], "index": 0, "keep": first["found"][0]["dropped"].is_string() });
    let file = dir.path().join("overrule.jsonl");
    std::fs::write(&file, format!("{word}\n")).unwrap();
    let odvg = std::fs::read_to_string(whole.join("mined/odvg.jsonl")).unwrap();
    let o = run(&whole, &[], &["--stage", "mine", "--overrule", file.to_str().unwrap()]);
    assert!(o.status.success(), "{}", stderr(&o));
    assert_ne!(std::fs::read_to_string(whole.join("mined/odvg.jsonl")).unwrap(), odvg);
    let after = std::fs::read_to_string(whole.join("mined/label_map.json")).unwrap();
    let pairs = |t: &str| serde_json::from_str::<Value>(t).unwrap().as_object().unwrap().clone();
    assert!(pairs(&before).iter().all(|(id, name)| pairs(&after)[id] == *name));
}

/// No model could be loaded, and nothing is mined.
#[test]
fn wrong_files_and_settings_are_met_first() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    // And a dry run approves of none of them.
    let refused_by = |dry: &[&[&str]], out: &Path, sets: &[&str], more: &[&str], parts: &[&str]| {
        for dry in dry {
            let o = run(
                out,
                &[&["planner.model=/no/such", "grounding.mining.model=/no/such"][..], sets].concat(),
                &[more, *dry].concat(),
            );
            let said = stderr(&o);
            assert_eq!(o.status.code(), Some(2), "{dry:?}: {said}");
            assert!(o.stdout.is_empty(), "{dry:?}");
            for part in parts {
                assert!(said.contains(part), "{dry:?}: no {part:?} in: {said}");
            }
            assert!(!out.join("mined/settings.json").exists());
        }
    };
    let refused = |out: &Path, sets: &[&str], more: &[&str], parts: &[&str]| {
        refused_by(&[&["--dry-run"], &[]], out, sets, more, parts);
    };
    refused(&out, &["grounding.truth=/no/truth.json"], &[], &["grounding.truth", "/no/truth.json"]);
    let replay = "grounding.training.replay=/no/replay.jsonl";
    refused(&out, &[replay], &[], &["grounding.training.replay", "/no/replay.jsonl"]);
    let freeze = "grounding.training.freeze=[\"bert.\"]";
    refused(&out, &[freeze], &[], &["grounding.training.freeze", "\"bert.\""]);
    refused(
        &out,
        &["grounding.mining.prompts=/no/prompts"],
        &[],
        &["grounding.mining.prompts", "/no/prompts"],
    );
    refused(&out, &["planner.prompt=/no/prompt"], &[], &["planner.prompt", "/no/prompt"]);
    refused(&out, &[], &["--stage", "train"], &["mined/odvg.jsonl is missing: mine first"]);
    let broken = file("broken.jsonl", "{\"image\": \"000000.png\"}\n");
    refused(&out, &[], &["--overrule", &broken], &["--overrule", "broken.jsonl, line 1: expected"]);
    assert!(!out.exists());
    let judge = "grounding.mining.model=endpoint:judge";
    let server = ["endpoints.judge.base_url=http://127.0.0.1:1", "endpoints.judge.model=m", judge];
    let keyed = [&server[..], &["endpoints.judge.key_env=VALOR_NO_SUCH_KEY"]].concat();
    // A dry run is planned without it.
    let why = ["endpoints.judge.key_env: the environment has no VALOR_NO_SUCH_KEY"];
    refused_by(&[&[]], &out, &keyed, &[], &why);
    let strange = file("strange.jsonl", "{\"image\": \"a.png\", \"index\": 0, \"keep\": true}\n");
    // Of rooms that are yet to be rendered it cannot know.
    refused_by(
        &[&[]],
        &out,
        &[],
        &["--overrule", &strange],
        &["strange.jsonl, line 1: \"a.png\" is none of the pictures"],
    );
    let truth = file(
        "truth.json",
        r#"{"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}], "annotations": [], "categories": []}"#,
    );
    let of_rooms = format!("grounding.truth={truth}");
    refused_by(&[&[]], &out, &[&of_rooms], &[], &["truth.json", "none of the pictures"]);

    // Another's log is not written over.
    let foreign = dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("metrics.jsonl"), "{\"step\": 9}\n").unwrap();
    refused(&foreign, &[], &[], &["foreign is not empty and holds no run"]);
    assert_eq!(std::fs::read_to_string(foreign.join("metrics.jsonl")).unwrap(), "{\"step\": 9}\n");

    // A training that has begun is neither overruled nor begun anew.
    let begun = dir.path().join("begun");
    std::fs::create_dir_all(begun.join("checkpoints/step-000001")).unwrap();
    std::fs::create_dir(begun.join("mined")).unwrap();
    refused(
        &begun,
        &[],
        &["--resume", "--overrule", &strange],
        &["--overrule", "begun on its boxes as they are"],
    );
    refused(&begun, &[], &[], &["begun holds a training: give --resume"]);
    // And where nothing has begun, nothing is gone on with.
    let nowhere = dir.path().join("nowhere");
    let none = ["no run in ", "/nowhere; check --out, or leave out --resume"];
    for stage in ["all", "train", "mine"] {
        refused(&nowhere, &[], &["--resume", "--stage", stage], &none);
    }
    assert!(!nowhere.exists());
}

/// A mining whose verifier is a server that always does the same.
fn judged_by(act: Act, granularity: &str) -> (Output, tempfile::TempDir, Vec<Value>) {
    let server = Server::start([act]);
    let dir = tempfile::tempdir().unwrap();
    let sets = [
        "grounding.pictures=2".to_owned(),
        "grounding.mining.box_threshold=0.1".into(),
        format!("endpoints.judge.base_url={}", server.url),
        "endpoints.judge.model=judge".into(),
        "endpoints.judge.tries=1".into(),
        "endpoints.judge.seconds=2".into(),
        "grounding.mining.model=endpoint:judge".into(),
        format!("grounding.mining.granularity={granularity}"),
    ];
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let o = run(&dir.path().join("run"), &sets, &["--stage", "mine"]);
    let records = dir.path().join("run/mined/pictures.jsonl");
    let records = if records.exists() { lines(&records) } else { Vec::new() };
    (o, dir, records)
}

#[test]
fn a_verifier_that_drops_everything_or_nothing_is_told_of() {
    let (o, dir, records) = judged_by(Act::Reply("no".into()), "box");
    assert_eq!((o.status.code(), records.len()), (Some(1), 2), "{}", stderr(&o));
    assert!(stderr(&o).contains("kept none"), "{}", stderr(&o));
    assert!(!dir.path().join("run/mined/odvg.jsonl").exists(), "labels are never silently empty");
    assert!(dir.path().join("run/mined/report.html").exists());
    let (o, dir, records) = judged_by(Act::Reply("Yes.".into()), "box");
    assert!(o.status.success(), "{}", stderr(&o));
    // It says of pairs that they are one thing, too: of boxes that overlap one stays, and no noun is denied.
    let by = |stage: &str| {
        let found = records.iter().flat_map(|r| r["found"].as_array().unwrap());
        found.filter(|f| f["dropped"] == stage).count()
    };
    assert!(by("coarse") == 0 && by("crop") == 0 && by("dedupe") > 0, "{records:?}");
    assert!(records.iter().all(|r| r["denied"].as_array().unwrap().is_empty()));
    let boxes = Boxes::open(&dir.path().join("run/mined/odvg.jsonl")).unwrap();
    assert_eq!(boxes.check(), [], "it stands by itself, pictures and all");
}

#[test]
fn a_noun_that_the_verifier_denies_becomes_a_hard_negative() {
    const DENIED: [&str; 6] = ["chair", "stool", "lamp", "plant", "fridge", "box"];
    // Of what is denied it also says that no box shows one.
    let verdict = |text: &str| match text.split(|c: char| !c.is_alphabetic()).any(|w| DENIED.contains(&w)) {
        true => "no",
        false => "yes",
    };
    let (o, dir, records) = judged_by(Act::Judge(verdict), "box");
    assert!(o.status.success(), "{}", stderr(&o));
    let odvg = lines(&dir.path().join("run/mined/odvg.jsonl"));
    let mut negatives = 0;
    for r in &records {
        let names = |v: &Value| -> Vec<String> {
            v.as_array().into_iter().flatten().map(|n| n.as_str().unwrap().to_owned()).collect()
        };
        let found = |n: &String| r["found"].as_array().unwrap().iter().any(|f| f["label"] == **n);
        let is_denied = |n: &String| DENIED.contains(&n.rsplit(' ').next().unwrap());
        let asked: Vec<String> =
            names(&r["nouns"]).into_iter().filter(|n| found(n) && is_denied(n)).collect();
        let (said, drawn): (Vec<String>, Vec<String>) = names(&r["denied"]).into_iter().partition(&found);
        assert_eq!(said, asked, "{r}");
        assert!(drawn.iter().all(is_denied), "{drawn:?}");
        // A picture about which nothing is known has no line.
        let of =
            |l: &&Value| Path::new(l["filename"].as_str().unwrap()).ends_with(r["image"].as_str().unwrap());
        let line = odvg.iter().find(of).unwrap_or(&Value::Null);
        assert_eq!(names(&line["detection"]["hard_negatives"]), asked, "{line}");
        assert_eq!(names(&line["detection"]["absent"]), drawn, "{line}");
        negatives += asked.len();
    }
    assert!(negatives > 0, "{records:?}");
}

#[test]
fn a_verifier_that_answers_wrong_numbers_or_goes_away_costs_no_wrong_label() {
    let (o, _, records) = judged_by(Act::Reply(r#"{"keep": [99], "drop": []}"#.into()), "pass");
    assert_eq!((o.status.code(), records.len()), (Some(1), 2), "{}", stderr(&o));
    for act in [Act::Status(503, "", "{}".into()), Act::Close, Act::Hang] {
        let (o, dir, records) = judged_by(act, "box");
        assert_eq!((o.status.code(), records.len()), (Some(1), 0), "{}", stderr(&o));
        assert!(stderr(&o).contains("could not be mined"), "{}", stderr(&o));
        assert!(!dir.path().join("run/mined/odvg.jsonl").exists());
    }
}

#[test]
fn the_published_settings_are_planned_without_models() {
    let dir = tempfile::tempdir().unwrap();
    let queries = dir.path().join("q.jsonl");
    let lines: String =
        (0..40).map(|i| format!("{{\"image\": \"{i}.jpg\", \"question\": \"How many?\"}}\n")).collect();
    std::fs::write(&queries, lines).unwrap();
    let o = Command::new(env!("CARGO_BIN_EXE_valor"))
        .args(["tune-grounding", "--dry-run", "--config", "configs/paper-grounding.toml", "--set"])
        .arg(format!("grounding.queries={}", queries.display()))
        .env_remove("OPENAI_API_KEY")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&o.stdout).into_owned();
    assert!(o.status.success(), "{}", stderr(&o));
    for part in [
        "the environment has no OPENAI_API_KEY",
        "40 of",
        "200 of 2 pictures (10 epochs of 40)",
        "1e-5, from 1e-6 over 20 steps, cosine to 1e-6",
        "[480, 512",
        "longest 1333",
        "model.text_backbone.",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn average_precision_on_files_is_that_of_the_same_rooms() {
    let dir = tempfile::tempdir().unwrap();
    let valor = |args: &[&str]| {
        let o = Command::new(env!("CARGO_BIN_EXE_valor")).args(args).output().unwrap();
        assert!(o.status.success(), "{}", stderr(&o));
        String::from_utf8(o.stdout).unwrap()
    };
    let rooms = dir.path().join("rooms");
    let out = rooms.to_str().unwrap();
    valor(&[
        "rooms", "render", "--seed", "7", "-n", "8", "--split", "test", "--size", "256x192", "--out", out,
    ]);
    let ap50 = |args: &[&str]| {
        let report: Value = serde_json::from_str(&valor(&[&["eval", "--json"], args].concat())).unwrap();
        assert_eq!(report["n"], 8, "pictures");
        report["figures"]["ap50"].as_f64().unwrap()
    };
    let drawn = ap50(&["--bench", "rooms-detector", "--seed", "7", "--n", "8"]);
    assert!(drawn > 0.5, "{drawn}");
    for file in ["coco.json", "odvg.jsonl"] {
        let path = rooms.join(file);
        let read = ap50(&["--bench", "detection", "--data", path.to_str().unwrap()]);
        // Of a picture the best 300 detections count.
        assert!((read - drawn).abs() < 0.03, "{file}: {read}, not {drawn}");
    }
    let o =
        Command::new(env!("CARGO_BIN_EXE_valor")).args(["eval", "--bench", "detection"]).output().unwrap();
    assert_eq!(o.status.code(), Some(2));
    assert!(stderr(&o).contains("--data"), "{}", stderr(&o));
}
