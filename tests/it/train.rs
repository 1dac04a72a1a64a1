//! `valor train-reasoner`, run as a user would: to its end, killed, misused, with a verifier that fails.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::server::{Act, Server};

/// Four steps of two questions with three rollouts each.
const SMALL: [&str; 8] = [
    "planner.model=embedded-base",
    "reasoner.questions=8",
    "reasoner.batch=2",
    "reasoner.group=3",
    "reasoner.epochs=1",
    "reasoner.held_out=2",
    "reasoner.eval_every=2",
    "reasoner.lr=1e-3",
];

fn command(out: &Path, sets: &[&str], more: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_valor"));
    c.arg("train-reasoner").arg("--out").arg(out).args(more);
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

/// The lines of a run's metrics without what clocks say.
fn metrics(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let line = |l: &str| {
        let mut v: Value = serde_json::from_str(l).unwrap();
        for timed in ["seconds", "unix", "rollout_tokens_per_second", "trained_tokens_per_second"] {
            v.as_object_mut().unwrap().remove(timed);
        }
        v
    };
    text.lines().map(line).collect()
}

fn weights(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model/model.safetensors")).unwrap()
}

#[test]
fn a_run_leaves_a_planner_and_what_it_did() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let o = run(&out, &[], &[]);
    assert!(o.status.success(), "{}", stderr(&o));
    let said = String::from_utf8_lossy(&o.stdout);
    assert_eq!(said.trim(), out.join("model").display().to_string());
    let lines = metrics(&out);
    let steps: Vec<&Value> = lines.iter().filter(|l| l.get("reward").is_some()).collect();
    assert_eq!(steps.len(), 4);
    for s in &steps {
        for key in
            ["reward", "logic", "kl", "entropy", "clipped", "missing", "grad_norm", "sampler_mismatch_most"]
        {
            assert!(s[key].is_number(), "{key}: {s}");
        }
        let distinct = s["distinct_programs"].as_object().unwrap();
        assert!(!distinct.is_empty() && distinct.values().all(|v| (0.0..=1.).contains(&v.as_f64().unwrap())));
        // The engine that samples and the network that learns are one.
        assert!(s["sampler_mismatch_most"].as_f64().unwrap() < 1e-3, "{s}");
    }
    assert_eq!(lines.iter().filter(|l| l.get("held_out_reward").is_some()).count(), 3, "steps 0, 2, 4");
    for file in [
        "config.toml",
        "best/config.json",
        "rollouts/000001.jsonl",
        "model/adapter/adapter_config.json",
        "report.html",
        "held_out/000004.jsonl",
    ] {
        assert!(out.join(file).is_file(), "{file}");
    }
    // It is a planner like any other, whole or as an adapter on what it began as.
    let picture = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/demo/room.png");
    let answer = |model: &str| {
        let o = Command::new(env!("CARGO_BIN_EXE_valor"))
            .arg("infer")
            .arg(&picture)
            .args(["How many chairs are there?", "--set"])
            .arg(format!("planner.model={}", out.join(model).display()))
            .output()
            .unwrap();
        assert!(o.status.success(), "{}", stderr(&o));
        o.stdout
    };
    assert_eq!(answer("model"), answer("model/adapter"));
}

/// How a run goes on that may have been killed before there was anything of it.
fn resumed(out: &Path) -> &'static [&'static str] {
    if out.join("config.toml").exists() { &["--resume"] } else { &[] }
}

#[test]
fn a_killed_run_goes_on_as_if_it_had_not_been() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    assert!(run(&whole, &[], &[]).status.success());
    let mut sessions = 0;
    // Each session is killed somewhat later than the one before, until one reaches the end.
    for wait in (0..).map(|i| Duration::from_millis(400 + 350 * i)) {
        sessions += 1;
        assert!(sessions < 60, "it does not come to an end");
        let mut child = command(&killed, &[], resumed(&killed)).spawn().unwrap();
        std::thread::sleep(wait);
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            break;
        }
    }
    assert!(sessions > 2);
    assert_eq!(metrics(&killed), metrics(&whole));
    assert_eq!(weights(&killed), weights(&whole));
}

/// Twenty runs, each killed once, at a moment drawn anew each time, and resumed to the end.
#[test]
#[ignore = "three minutes; the test above is its short form"]
fn killed_at_any_of_twenty_random_moments_a_run_ends_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let begun = std::time::Instant::now();
    assert!(run(&whole, &[], &[]).status.success());
    let took = begun.elapsed();
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let mut moment = ChaCha8Rng::seed_from_u64(seed);
    let mut before_the_end = 0;
    for i in 0..20 {
        let killed = dir.path().join(format!("killed-{i}"));
        let wait = took.mul_f64(moment.random());
        let mut child = command(&killed, &[], &[]).spawn().unwrap();
        std::thread::sleep(wait);
        child.kill().unwrap();
        before_the_end += usize::from(!child.wait().unwrap().success());
        let steps = std::fs::read_dir(killed.join("checkpoints")).map_or(0, |d| d.count());
        eprintln!("killed after {wait:.2?} of {took:.2?}, {steps} checkpoints kept");
        let o = run(&killed, &[], resumed(&killed));
        assert!(o.status.success(), "{wait:?}: {}", stderr(&o));
        assert_eq!(metrics(&killed), metrics(&whole), "{wait:?}");
        assert_eq!(weights(&killed), weights(&whole), "{wait:?}");
    }
    assert!(before_the_end > 10, "{before_the_end}");
}

/// What a kill leaves between any two files of a save.
#[test]
fn a_save_that_was_cut_off_anywhere_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    assert!(run(&whole, &["reasoner.keep=9"], &[]).status.success());
    let files = ["trained.safetensors", "optimiser.safetensors", "state.json", "manifest.json"];
    let third = whole.join("checkpoints/step-000003");
    let mut held: Vec<String> =
        std::fs::read_dir(&third).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    held.sort();
    let mut expected = files.map(str::to_owned).to_vec();
    expected.sort();
    assert_eq!(held, expected);
    // Any number of them in the temporary folder, the last one half; or all in place, but the last half.
    for (count, in_place) in (0..=files.len()).map(|n| (n, false)).chain([(files.len(), true)]) {
        let cut = dir.path().join(format!("cut-{count}-{in_place}"));
        std::fs::create_dir_all(cut.join("checkpoints")).unwrap();
        for file in ["metrics.jsonl", "config.toml"] {
            std::fs::copy(whole.join(file), cut.join(file)).unwrap();
        }
        let copy = |from: &Path, to: &Path, count: usize, half: bool| {
            std::fs::create_dir(to).unwrap();
            for (i, file) in files[..count].iter().enumerate() {
                let bytes = std::fs::read(from.join(file)).unwrap();
                let end = if half && i + 1 == count { bytes.len() / 2 } else { bytes.len() };
                std::fs::write(to.join(file), &bytes[..end]).unwrap();
            }
        };
        let checkpoints = cut.join("checkpoints");
        copy(&whole.join("checkpoints/step-000002"), &checkpoints.join("step-000002"), files.len(), false);
        let third_is = if in_place { "step-000003" } else { ".unfinished-3" };
        copy(&third, &checkpoints.join(third_is), count, true);
        let o = run(&cut, &["reasoner.keep=9"], &["--resume"]);
        assert!(o.status.success(), "{count} {in_place}: {}", stderr(&o));
        assert_eq!(metrics(&cut), metrics(&whole), "{count} {in_place}");
        assert_eq!(weights(&cut), weights(&whole), "{count} {in_place}");
    }
}

#[cfg(unix)]
#[test]
fn a_stopped_run_saves_its_step() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let child = command(&out, &["reasoner.questions=400", "reasoner.save_every=1000"], &[]).spawn().unwrap();
    while std::fs::read_to_string(out.join("metrics.jsonl")).is_ok_and(|t| t.lines().count() < 3)
        || !out.join("metrics.jsonl").exists()
    {
        std::thread::sleep(Duration::from_millis(50));
    }
    // SAFETY: a signal to a process of ours.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let o = child.wait_with_output().unwrap();
    assert_eq!(o.status.code(), Some(1), "{}", stderr(&o));
    assert!(stderr(&o).contains("go on with --resume"), "{}", stderr(&o));
    let saved = std::fs::read_dir(out.join("checkpoints")).unwrap().count();
    assert_eq!(saved, 1);
}

#[test]
fn a_folder_with_a_run_and_other_settings_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    assert!(run(&out, &["reasoner.questions=2"], &[]).status.success());
    for dry in [&["--dry-run"][..], &[]] {
        let o = run(&out, &["reasoner.questions=2"], dry);
        assert_eq!(o.status.code(), Some(2));
        assert!(stderr(&o).contains("--resume"), "{}", stderr(&o));
        let sets = ["reasoner.questions=2", "reasoner.objective.kl=0.5"];
        let o = run(&out, &sets, &[&["--resume"][..], dry].concat());
        assert_eq!(o.status.code(), Some(2));
        assert!(stderr(&o).contains("reasoner.objective.kl was 0.01, is 0.5"), "{}", stderr(&o));
    }
}

#[test]
fn nothing_is_not_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("none");
    for dry in [&["--dry-run"][..], &[]] {
        let o = run(&out, &["planner.model=/no/planner"], &[&["--resume"][..], dry].concat());
        assert_eq!((o.status.code(), &*o.stdout), (Some(2), &b""[..]), "{}", stderr(&o));
        let why = format!("valor: no run in {}; check --out, or leave out --resume\n", out.display());
        assert_eq!(stderr(&o), why);
    }
    assert!(!out.exists());
    // One that was killed before its first checkpoint begins anew.
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("config.toml"), "").unwrap();
    let o = run(&out, &["planner.model=/no/planner"], &["--resume"]);
    assert!(stderr(&o).contains("/no/planner"), "{}", stderr(&o));
}

#[test]
fn next_token_training_learns_from_good_rollouts_only() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let o = run(&out, &["reasoner.algorithm=sft", "reasoner.threshold=0.95"], &[]);
    assert!(o.status.success(), "{}", stderr(&o));
    for s in metrics(&out).iter().filter(|l| l.get("reward").is_some()) {
        let share_of_best = s["learnt"].as_f64().unwrap() / s["rollouts"].as_f64().unwrap();
        assert!(share_of_best <= s["logic"].as_f64().unwrap() + 1e-9, "{s}");
    }
}

#[test]
fn a_dry_run_counts_and_does_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let o = run(&out, &[], &["--dry-run"]);
    let said = String::from_utf8_lossy(&o.stdout).into_owned();
    assert!(o.status.success() && said.contains("4 of 2 questions × 3 rollouts"), "{said}");
    assert!(!out.exists());
}

#[test]
fn a_dry_run_refuses_what_the_run_would() {
    let dir = tempfile::tempdir().unwrap();
    let (out, notes) = (dir.path().join("run"), dir.path().join("notes.txt"));
    std::fs::write(&notes, "dear diary\n").unwrap();
    let cache = format!("verifier.cache={}", notes.display());
    // Whether it would load the models or, with a server, not.
    let server = ["endpoints.judge.base_url=http://127.0.0.1:1", "endpoints.judge.model=m"];
    let server = [&server[..], &["verifier.model=endpoint:judge"]].concat();
    for verifier in [&server[..], &[]] {
        for (out, set, parts) in [
            (&out, "planner.prompt=/no/prompt", &["planner.prompt", "/no/prompt"][..]),
            (&out, "planner.model=/no/planner", &["/no/planner"]),
            (&out, "planner.model=tests/fixtures/gguf-qwen3/model.gguf", &["a GGUF file is for inference"]),
            (&out, cache.as_str(), &["verifier.cache", "its first line is no verdict"]),
            (&notes.join("below"), "reasoner.lr=1e-3", &["--out", "is no folder"]),
            (&dir.path().to_path_buf(), "reasoner.lr=1e-3", &["is not empty and holds no run"]),
        ] {
            for dry in [&["--dry-run"][..], &[]] {
                let o = run(out, &[verifier, &[set]].concat(), dry);
                assert_eq!(
                    (o.status.code(), &*o.stdout),
                    (Some(2), &b""[..]),
                    "{set} {dry:?}: {}",
                    stderr(&o)
                );
                parts
                    .iter()
                    .for_each(|p| assert!(stderr(&o).contains(p), "{dry:?}: no {p:?} in: {}", stderr(&o)));
            }
        }
    }
    assert!(!out.exists());
    // What is not here yet, and no mistake, is planned without.
    let home = dir.path().join("home");
    let o = command(&out, &["planner.model=qwen3-8b"], &["--dry-run"]).env("HF_HOME", home).output().unwrap();
    let said = String::from_utf8_lossy(&o.stdout).into_owned();
    assert!(o.status.success() && said.contains("the planner is not here"), "{said}{}", stderr(&o));
}

/// The hub's cache with one model in it, of these files.
fn cache_with(home: &Path, files: &[(&str, &str)]) {
    let repo = home.join("hub/models--acme--planner");
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::create_dir_all(repo.join("snapshots/c0ffee")).unwrap();
    std::fs::write(repo.join("refs/main"), "c0ffee").unwrap();
    for (name, text) in files {
        std::fs::write(repo.join("snapshots/c0ffee").join(name), text).unwrap();
    }
}

/// What a pull has yet to bring is planned without; what is here and broken is no such thing.
#[test]
fn a_dry_run_refuses_a_model_that_is_here_and_broken() {
    let server = ["endpoints.judge.base_url=http://127.0.0.1:1", "endpoints.judge.model=m"];
    let server = [&server[..], &["verifier.model=endpoint:judge"]].concat();
    let config = ("config.json", "{\"model_type\": \"qwen3\"}");
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#;
    for (model, files, parts) in [
        ("hub:acme/planner", &[("adapter_config.json", "{")][..], &["adapter_config.json"][..]),
        ("hub:acme/planner#q.gguf", &[("q.gguf", "none")], &["q.gguf"]),
        ("hub:acme/planner", &[("tokenizer.json", "{}")], &["config.json: is missing"]),
        ("hub:acme/planner", &[config], &["c0ffee: holds neither model.safetensors"]),
        (
            "hub:acme/planner",
            &[config, ("model.safetensors", "none")],
            &["c0ffee: not a readable safetensors"],
        ),
        (
            "hub:acme/planner",
            &[config, ("model.safetensors.index.json", index)],
            &["index.json: shard model-00001-of-00002.safetensors is missing"],
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (out, home) = (dir.path().join("run"), dir.path().join("home"));
        cache_with(&home, files);
        let model = format!("planner.model={model}");
        for dry in [&["--dry-run"][..], &[]] {
            let mut c = command(&out, &[&server[..], &[model.as_str()]].concat(), dry);
            let o = c.env("HF_HOME", &home).env_remove("HF_HUB_CACHE").output().unwrap();
            assert_eq!((o.status.code(), &*o.stdout), (Some(2), &b""[..]), "{model} {dry:?}: {}", stderr(&o));
            parts
                .iter()
                .for_each(|p| assert!(stderr(&o).contains(p), "{dry:?}: no {p:?} in: {}", stderr(&o)));
        }
    }
}

/// Nothing is asked of a server, but that it could be.
#[test]
fn a_dry_run_looks_for_a_servers_key_and_at_what_would_be_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let server = Server::start([Act::Reply("<answer>yes</answer>".into())]);
    let of_server = judged_by(&server);
    let sets: Vec<&str> = of_server
        .iter()
        .map(String::as_str)
        .chain(["reasoner.held_out=0", "endpoints.judge.seconds=20"])
        .collect();
    let keyed = [&sets[..], &["endpoints.judge.key_env=VALOR_TEST_JUDGE_KEY"]].concat();
    let why = "the environment has no VALOR_TEST_JUDGE_KEY";
    let o = run(&out, &keyed, &[]);
    assert_eq!((o.status.code(), &*o.stdout), (Some(2), &b""[..]), "{}", stderr(&o));
    assert!(stderr(&o).contains(&format!("endpoints.judge.key_env: {why}")), "{}", stderr(&o));
    // It is planned without one.
    let o = run(&out, &keyed, &["--dry-run"]);
    let said = String::from_utf8_lossy(&o.stdout).into_owned();
    assert!(o.status.success() && said.contains(why), "{said}{}", stderr(&o));
    let planned = |out: &Path, sets: &[&str]| {
        let mut c = command(out, sets, &[&["--dry-run"][..], resumed(out)].concat());
        c.env("VALOR_TEST_JUDGE_KEY", "sk-very-secret-0123456789").output().unwrap()
    };
    let o = planned(&out, &keyed);
    let said = String::from_utf8_lossy(&o.stdout).into_owned();
    assert!(o.status.success() && said.contains("VALOR_TEST_JUDGE_KEY of the environment"), "{}", stderr(&o));
    assert!(
        !said.contains("missing") && !said.contains("secret") && !stderr(&o).contains("secret"),
        "{said}"
    );
    assert!(server.heard().is_empty() && !out.exists());
    let o = run(&out, &sets, &[]);
    assert!(o.status.success(), "{}", stderr(&o));
    let heard = server.heard().len();
    let o = planned(&out, &sets);
    assert!(o.status.success(), "{}", stderr(&o));
    let said = String::from_utf8_lossy(&o.stdout).into_owned();
    assert!(said.contains("goes on          at step 1\n"), "{said}");
    for (set, parts) in [
        ("reasoner.objective.kl=0.5", "reasoner.objective.kl was 0.01, is 0.5"),
        ("endpoints.judge.model=other", "verifier was \"m\", is \"other\""),
    ] {
        let o = planned(&out, &[&sets[..], &[set]].concat());
        assert_eq!((o.status.code(), &*o.stdout), (Some(2), &b""[..]), "{}", stderr(&o));
        assert!(stderr(&o).contains(parts), "{}", stderr(&o));
    }
    assert_eq!(server.heard().len(), heard);
}

fn judged_by(server: &Server) -> Vec<String> {
    let url = format!("endpoints.judge.base_url={}", server.url);
    let keys = ["model=m", "tries=1", "seconds=1", "concurrency=1"];
    std::iter::once(url)
        .chain(keys.iter().map(|k| format!("endpoints.judge.{k}")))
        .chain(["verifier.model=endpoint:judge".to_owned(), "reasoner.questions=2".to_owned()])
        .collect()
}

#[test]
fn missing_verdicts_are_counted_and_not_learnt_from() {
    // Every third call fails, in every way there is; what is asked again fails again now and then.
    let faults = [
        Act::Status(500, "", "no".into()),
        Act::Cut,
        Act::Close,
        Act::Hang,
        Act::Body("garbage".into()),
        Act::Status(429, "", "busy".into()),
        Act::Reply("<answer>perhaps</answer>".into()),
    ];
    let yes = || Act::Reply("<answer>yes</answer>".into());
    let server = Server::start(faults.into_iter().cycle().take(70).flat_map(|f| [f, yes(), yes()]));
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    // Of a planner whose replies are all of the form.
    let more = ["planner.model=embedded", "reasoner.missing_limit=1", "reasoner.held_out=0"];
    let sets = [judged_by(&server), more.map(str::to_owned).to_vec()].concat();
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let o = run(&out, &sets, &[]);
    assert!(o.status.success(), "{}", stderr(&o));
    let step = metrics(&out).into_iter().find(|l| l.get("reward").is_some()).unwrap();
    let (missing, reward) = (step["missing"].as_f64().unwrap(), step["reward"].as_f64().unwrap());
    assert!(missing > 0. && step["learnt"].as_f64().unwrap() < 6., "{step}");
    assert!(reward > 0.8, "a missing reward is no zero: {step}");
    assert!(step["verifier"]["failed"].as_u64().unwrap() > 0, "{step}");
}

#[test]
fn a_verifier_that_is_gone_stops_the_run_and_keeps_it() {
    let server = Server::start([Act::Status(500, "", "no".into())]);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let sets = [judged_by(&server), vec!["reasoner.held_out=0".into()]].concat();
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let o = run(&out, &sets, &[]);
    assert_eq!(o.status.code(), Some(1));
    let said = stderr(&o);
    assert!(said.contains("rewards are missing") && said.contains("--resume"), "{said}");
}

/// What is done is not lost with the verifier: it is saved, whenever the next save would have been.
#[test]
fn an_outage_takes_no_step_along_that_is_done() {
    let yes = || Act::Reply("<answer>yes</answer>".into());
    // Enough for the first step, of six rollouts and four heads, and not for all.
    let server = Server::start((0..30).map(|_| yes()).chain([Act::Status(500, "", "no".into())]));
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let go = |server: &Server, more: &[&str]| {
        let own = ["planner.model=embedded", "reasoner.questions=8", "reasoner.save_every=25"];
        let sets = [judged_by(server), own.map(str::to_owned).to_vec()].concat();
        let sets: Vec<&str> = sets.iter().map(String::as_str).chain(["reasoner.held_out=0"]).collect();
        run(&out, &sets, more)
    };
    let o = go(&server, &[]);
    assert_eq!(o.status.code(), Some(1), "{}", stderr(&o));
    assert!(stderr(&o).contains(" is saved"), "{}", stderr(&o));
    let done = metrics(&out).len() as u64;
    assert!((1..4).contains(&done), "{done} steps");
    // The server is another one now, and its page is a folder, which ends nothing.
    let _ = std::fs::remove_file(out.join("report.html"));
    std::fs::create_dir(out.join("report.html")).unwrap();
    let o = go(&Server::start([yes()]), &["--resume"]);
    assert!(o.status.success(), "{}", stderr(&o));
    assert!(stderr(&o).contains(&format!("going on at step {done} of 4")), "{}", stderr(&o));
    assert!(stderr(&o).contains("no page of curves"), "{}", stderr(&o));
    let steps: Vec<u64> = metrics(&out).iter().map(|m| m["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 2, 3, 4]);
}

/// To begin anew would destroy what may yet be rescued.
#[test]
fn a_run_whose_checkpoints_are_all_broken_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    assert!(run(&out, &[], &[]).status.success());
    for entry in std::fs::read_dir(out.join("checkpoints")).unwrap() {
        std::fs::write(entry.unwrap().path().join("optimiser.safetensors"), "spoilt").unwrap();
    }
    let before = (metrics(&out), weights(&out), std::fs::read(out.join("best/held_out.json")).unwrap());
    let o = run(&out, &[], &["--resume"]);
    assert_eq!(o.status.code(), Some(2), "{}", stderr(&o));
    assert!(stderr(&o).contains("is whole (") && stderr(&o).contains("put a copy back"), "{}", stderr(&o));
    let after = (metrics(&out), weights(&out), std::fs::read(out.join("best/held_out.json")).unwrap());
    assert!(before == after, "something was touched");
}

fn make_queries(images: &Path, out: &Path, server: &Server, n: usize) -> Output {
    Command::new(env!("CARGO_BIN_EXE_valor"))
        .arg("make-queries")
        .arg("--images")
        .arg(images)
        .arg("--out")
        .arg(out)
        .args(["--n", &n.to_string()])
        .args(["--set", &format!("endpoints.eye.base_url={}", server.url), "--set", "endpoints.eye.model=m"])
        .args(["--set", "endpoints.eye.tries=1", "--set", "vlm.model=endpoint:eye"])
        .output()
        .unwrap()
}

/// `valor make-queries --from` on the training fixtures; what it wrote.
fn draw_queries(dir: &Path, sets: &str, n: usize) -> (Output, Vec<(String, String)>) {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/benches/training");
    let out = dir.join("q.jsonl");
    let o = Command::new(env!("CARGO_BIN_EXE_valor"))
        .args(["make-queries", "--from", sets, "--n", &n.to_string(), "--data"])
        .arg(&data)
        .arg("--out")
        .arg(&out)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let text = std::fs::read_to_string(&out).unwrap_or_default();
    let read = |l: &str| {
        let q: serde_json::Value = serde_json::from_str(l).unwrap();
        (q["image"].as_str().unwrap().to_owned(), q["question"].as_str().unwrap().to_owned())
    };
    (o, text.lines().map(read).collect())
}

#[test]
fn questions_of_training_splits_come_with_their_pictures_and_without_the_tests() {
    let dir = tempfile::tempdir().unwrap();
    let (o, all) = draw_queries(dir.path(), "omni3d-bench", 600);
    assert_eq!(o.status.code(), Some(1), "{}", stderr(&o));
    assert!(stderr(&o).contains("row 450"), "{}", stderr(&o));
    let numbers: std::collections::BTreeSet<usize> =
        all.iter().map(|(_, q)| q["What is in row ".len()..q.len() - 1].parse().unwrap()).collect();
    assert_eq!(numbers, (101..501).filter(|i| *i != 450).collect());
    let pictures: std::collections::BTreeSet<&String> = all.iter().map(|(p, _)| p).collect();
    assert_eq!(pictures.len(), 5);
    assert!(pictures.iter().all(|p| image::open(dir.path().join(p)).is_ok()));

    // Of Omni3D-Bench with fewer rows nothing is left beside its test.
    let o = Command::new(env!("CARGO_BIN_EXE_valor"))
        .args(["make-queries", "--from", "omni3d-bench", "--data", "tests/fixtures/benches", "--out"])
        .arg(dir.path().join("none.jsonl"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert_eq!(o.status.code(), Some(2));
    assert!(stderr(&o).contains("9 rows, of which none is for training"), "{}", stderr(&o));

    // Questions and pictures in files of their own; pictures that are none or cut off, and one that is missing.
    let dir = tempfile::tempdir().unwrap();
    let (o, all) = draw_queries(dir.path(), "gqa,tallyqa,gqa", 14);
    let said = stderr(&o);
    assert_eq!((o.status.code(), all.len()), (Some(1), 5 + 4), "{said}");
    assert!(said.contains("the picture n2 is missing"), "{said}");
    assert!(said.contains("tallyqa, row 4") && said.contains("tallyqa, row 5"), "{said}");
    // What one set lacks the other gives.
    let two = tempfile::tempdir().unwrap();
    assert_eq!(draw_queries(two.path(), "tallyqa,gqa", 9).0.status.code(), Some(0));
    let own: Vec<&str> = all.iter().filter(|(_, q)| q.ends_with(", 3?")).map(|(p, _)| p.as_str()).collect();
    let first: Vec<&str> = all.iter().filter(|(_, q)| q.ends_with(", 0?")).map(|(p, _)| p.as_str()).collect();
    assert!(own.len() == 1 && own == first, "both are about n0: {all:?}");

    // A file that is there is not written over; what is not there is an error.
    let (o, _) = draw_queries(dir.path(), "gqa", 1);
    assert!(o.status.code() == Some(2) && stderr(&o).contains("name a new file"), "{}", stderr(&o));
    std::fs::remove_file(dir.path().join("q.jsonl")).unwrap();
    let (o, _) = draw_queries(dir.path(), "vsr", 1);
    assert!(o.status.code() == Some(2) && stderr(&o).contains("vsr: there is no folder"), "{}", stderr(&o));
}

#[test]
fn questions_about_pictures_are_new_ones_and_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("pictures");
    std::fs::create_dir(&images).unwrap();
    let room = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/demo/room.png");
    for name in ["a.png", "b.png"] {
        std::fs::copy(&room, images.join(name)).unwrap();
    }
    std::fs::write(images.join("c.png"), "no picture").unwrap();
    let reply = |questions: &str| Act::Reply(format!("{{\"questions\": [{questions}]}}"));
    let server = Server::start([
        // One of them twice, and one that is no question.
        reply("\"How many chairs are there?\", \"How many chairs are there\", \"<b>What</b> is it?\""),
        Act::Reply("Sure! Here they are.".into()),
        reply("\"Which lamp is nearest to the bed?\""),
        reply("\"How many beds are there?\", \"How wide is the sofa if the bed is 2 m wide?\""),
    ]);
    let out = dir.path().join("q.jsonl");
    let o = make_queries(&images, &out, &server, 6);
    // The third picture's share cannot be had.
    assert_eq!(o.status.code(), Some(1), "{}", stderr(&o));
    assert!(stderr(&o).contains("passed over") && stderr(&o).contains("c.png"), "{}", stderr(&o));
    let questions = || -> Vec<(String, String)> {
        let text = std::fs::read_to_string(&out).unwrap();
        let read = |l: &str| {
            let v: Value = serde_json::from_str(l).unwrap();
            let image = v["image"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
            (image, v["question"].as_str().unwrap().to_owned())
        };
        text.lines().map(read).collect()
    };
    let first = questions();
    let of_a: Vec<&str> = first.iter().filter(|q| q.0 == "a.png").map(|q| q.1.as_str()).collect();
    assert_eq!(of_a, ["How many chairs are there?", "Which lamp is nearest to the bed?"]);
    assert_eq!(first.len(), 4, "{first:?}");
    // What is there is told, so that it is not written again.
    assert!(server.heard().iter().any(|h| h.body.to_string().contains("there already")), "no request tells");
    // A line that was not written to its end is dropped, the rest stays, and nothing is asked twice.
    std::fs::remove_file(images.join("c.png")).unwrap();
    let text = std::fs::read_to_string(&out).unwrap();
    std::fs::write(&out, format!("{text}{{\"image\": \"a")).unwrap();
    let before = server.heard().len();
    let o = make_queries(&images, &out, &server, 4);
    assert!(o.status.success(), "{}", stderr(&o));
    assert_eq!(questions(), first);
    assert_eq!(server.heard().len(), before);
}
