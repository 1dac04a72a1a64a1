//! `valor infer` beyond one plain question: many at once, stdin, pages, repair and votes.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::server::{Act, Server};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/demo/room.png");

fn infer(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_valor")).arg("infer").args(args).output().unwrap()
}

fn rows(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

#[test]
fn many_questions_are_answered_as_each_alone_and_not_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (batch, out) = (dir.path().join("ask.jsonl"), dir.path().join("out/rows.jsonl"));
    std::fs::copy(DEMO, dir.path().join("room.png")).unwrap();
    std::fs::write(dir.path().join("broken.png"), b"no picture").unwrap();
    let questions = ["How many chairs are there?", "Is there a table?", "What color is the lamp?"];
    let mut lines: Vec<Value> = questions
        .iter()
        .enumerate()
        .map(|(i, q)| json!({ "image": "room.png", "question": q, "id": format!("q{i}"), "seed": i + 3 }))
        .collect();
    lines.insert(1, json!({ "image": "broken.png", "question": "How many?" }));
    lines.push(json!({ "image": "none.png", "question": "How many?" }));
    let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
    std::fs::write(&batch, &text).unwrap();
    let args = ["--batch", batch.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let done = infer(&args);
    assert_eq!(done.status.code(), Some(1), "two have no picture: {}", stderr(&done));
    let all = rows(&out);
    assert_eq!(all.len(), 5);
    for (i, row) in all.iter().enumerate() {
        assert_eq!(row["index"], i);
        assert_eq!(row["question"], lines[i]["question"]);
        assert_eq!(row["id"], lines[i]["id"]);
    }
    for (i, name) in [(1, "broken.png"), (4, "none.png")] {
        assert_eq!(all[i]["error"]["kind"], "picture");
        assert!(all[i]["error"]["message"].as_str().unwrap().contains(name));
    }
    // Whatever came of it, a row has every key.
    let keys = |row: &Value| -> BTreeSet<String> { row.as_object().unwrap().keys().cloned().collect() };
    assert!(all.iter().all(|row| keys(row) == keys(&all[0])), "{:?} {:?}", keys(&all[0]), keys(&all[1]));
    assert_eq!((&all[1]["calls"], &all[1]["reply"]), (&json!([]), &Value::Null));
    for i in [0, 2, 3] {
        let seed = lines[i]["seed"].to_string();
        let alone = infer(&[DEMO, lines[i]["question"].as_str().unwrap(), "--seed", &seed, "--json"]);
        let alone: Value = serde_json::from_slice(&alone.stdout).unwrap();
        for key in ["answer", "program", "seed"] {
            assert_eq!(all[i][key], alone[key], "{key} of {i}");
        }
    }
    // Broken off in the middle of the third row: what is whole stays, the rest is answered.
    let whole = std::fs::read_to_string(&out).unwrap();
    let cut = whole.match_indices('\n').nth(1).unwrap().0 + 30;
    std::fs::write(&out, &whole[..cut]).unwrap();
    let again = infer(&args);
    assert!(stderr(&again).contains("1 of 5 are answered, 1 failed (left so)"), "{}", stderr(&again));
    let resumed = rows(&out);
    for (a, b) in all.iter().zip(&resumed) {
        assert_eq!((&a["answer"], &a["program"], &a["index"]), (&b["answer"], &b["program"], &b["index"]));
    }
    assert!(stderr(&infer(&args)).contains("3 of 5 are answered, 2 failed (left so)"));
    // A last row that lacks its line's end alone is one, and is given it.
    let whole = std::fs::read_to_string(&out).unwrap();
    std::fs::write(&out, whole.trim_end()).unwrap();
    assert!(stderr(&infer(&args)).contains("3 of 5 are answered, 2 failed (left so)"));
    assert_eq!(std::fs::read_to_string(&out).unwrap(), whole);
    let two = whole.match_indices('\n').nth(2).unwrap().0;
    std::fs::write(&out, &whole[..two]).unwrap();
    assert!(stderr(&infer(&args)).contains("2 of 5 are answered, 1 failed (left so)"));
    assert_eq!(rows(&out).len(), 5);
    // Another batch's rows are not mixed in.
    std::fs::write(&batch, text.replace("Is there a table?", "Is there a vase?")).unwrap();
    let mixed = infer(&args);
    assert_eq!(mixed.status.code(), Some(2));
    assert!(stderr(&mixed).contains("rows.jsonl, line 3: answers another question"), "{}", stderr(&mixed));
    assert_eq!(rows(&out).len(), 5, "nothing is lost");
}

#[test]
fn a_line_that_is_no_question_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (batch, out) = (dir.path().join("ask.jsonl"), dir.path().join("rows.jsonl"));
    for (text, want) in [
        ("", "holds no question"),
        (
            "{\"image\": \"a.png\", \"question\": \"Why?\"}\n{\"image\": \"a.png\"}\n",
            "ask.jsonl, line 2: expected",
        ),
        ("{\"image\": \"a.png\", \"question\": \" \"}", "line 1: the question is empty"),
        ("{\"image\": \"a.png\", \"question\": \"Why?\", \"sede\": 3}", "unknown field `sede`"),
    ] {
        std::fs::write(&batch, text).unwrap();
        let got = infer(&["--batch", batch.to_str().unwrap(), "--out", out.to_str().unwrap()]);
        assert_eq!(got.status.code(), Some(2));
        assert!(stderr(&got).contains(want) && stderr(&got).lines().count() == 1, "{}", stderr(&got));
    }
    let both = infer(&[DEMO, "Why?", "--batch", batch.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn a_picture_from_stdin_is_the_same_picture() {
    let question = "How many chairs are there?";
    let from_file = infer(&[DEMO, question, "--json"]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_valor"))
        .args(["infer", "-", question, "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&std::fs::read(DEMO).unwrap()).unwrap();
    let piped = child.wait_with_output().unwrap();
    let read = |out: &[u8]| -> Value { serde_json::from_slice(out).unwrap() };
    let (a, b) = (read(&from_file.stdout), read(&piped.stdout));
    assert_eq!((&a["answer"], &a["calls"][0]["value"]), (&b["answer"], &b["calls"][0]["value"]));
}

#[test]
fn a_page_and_an_overlay_are_written_beside_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let (page, overlay) = (dir.path().join("a/page.html"), dir.path().join("boxes.png"));
    let question = "How many chairs are there?";
    let out = infer(&[
        DEMO,
        question,
        "--report",
        page.to_str().unwrap(),
        "--save-overlay",
        overlay.to_str().unwrap(),
    ]);
    assert!(out.status.success(), "{}", stderr(&out));
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.contains(question) && html.matches("data:image/png;base64,").count() == 2);
    assert!(html.contains("gd_detect") && html.contains("found") && !html.contains("<script"));
    let (drawn, demo) = (image::open(&overlay).unwrap().to_rgb8(), image::open(DEMO).unwrap().to_rgb8());
    assert_eq!(drawn.dimensions(), demo.dimensions());
    assert_ne!(drawn, demo, "a box is drawn");
}

fn program(text: &str) -> Act {
    Act::Reply(format!("<plan>\np\n</plan>\n<answer>\n{text}\n</answer>"))
}

fn on_server(acts: Vec<Act>, more: &[&str]) -> (Option<i32>, Value, Vec<Value>, String) {
    let server = Server::start(acts);
    let url = format!("endpoints.s.base_url={}", server.url);
    let mut args = vec![DEMO, "How many?", "--json", "--set", &url, "--set", "endpoints.s.model=m"];
    args.extend(["--set", "planner.model=endpoint:s", "--set", "endpoints.s.concurrency=1"]);
    args.extend(more);
    let out = infer(&args);
    let heard = server.heard().into_iter().map(|h| h.body).collect();
    (out.status.code(), serde_json::from_slice(&out.stdout).unwrap_or_default(), heard, stderr(&out))
}

#[test]
fn a_failed_program_goes_back_to_the_planner_with_its_error_and_line() {
    let broken = || program("x = 1\nfinal_answer = [][3]");
    let (code, trace, heard, _) = on_server(vec![broken(), program("final_answer = 4")], &["--repair", "2"]);
    assert_eq!((code, &trace["answer"]), (Some(0), &json!(4)));
    assert_eq!(heard.len(), 2);
    let turns = heard[1]["messages"].as_array().unwrap();
    assert_eq!(turns.len(), 3);
    assert_eq!(turns[0], heard[0]["messages"][0]);
    assert!(turns[1]["content"].as_str().unwrap().contains("[][3]"));
    let error = turns[2]["content"].as_str().unwrap();
    assert!(error.contains("IndexError") && error.contains("line 2"), "{error}");
    assert_eq!(trace["repaired"].as_array().unwrap().len(), 1);
    // Twice at most, and not at all unless it is asked for.
    let (code, trace, heard, why) = on_server(vec![broken()], &["--repair", "2"]);
    assert_eq!((code, &trace["answer"], heard.len()), (Some(1), &Value::Null, 3), "{why}");
    let (code, _, heard, _) = on_server(vec![broken()], &[]);
    assert_eq!((code, heard.len()), (Some(1), 1));
    assert!(on_server(vec![broken()], &["--repair", "3"]).3.contains("inference.repairs: at most 2"));
}

/// What a program makes of its VLM's silence is no result, is not given back to the planner, and is asked for another
/// time.
#[test]
fn a_tools_silent_server_is_no_failure_of_the_program() {
    let looks = "try:\n    final_answer = vqa(img_pth, None, 'What color?')\nexcept Exception:\n    final_answer = 'none'";
    let busy = || Act::Status(503, "", "{}".into());
    let planner =
        Server::start([program("final_answer = vqa(img_pth, None, 'What color?')"), program(looks)]);
    let vlm = Server::start([busy(), busy(), Act::Reply("Red.".into())]);
    let sets: Vec<String> = [("s", &planner), ("v", &vlm)]
        .into_iter()
        .flat_map(|(name, server)| {
            let set = |key: &str, value: &str| format!("endpoints.{name}.{key}={value}");
            [set("base_url", &server.url), set("model", "m"), set("tries", "1"), set("concurrency", "1")]
        })
        .chain(["planner.model=endpoint:s".into(), "vlm.model=endpoint:v".into()])
        .flat_map(|set| ["--set".to_owned(), set])
        .collect();
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let alone = infer(&[&[DEMO, "What color is the bed?", "--json", "--repair", "2"][..], &sets].concat());
    let trace: Value = serde_json::from_slice(&alone.stdout).unwrap();
    assert_eq!((alone.status.code(), &trace["answer"]), (Some(1), &Value::Null), "{}", stderr(&alone));
    assert_eq!(trace["error"]["kind"], "no-reply");
    assert!(stderr(&alone).contains("no result: endpoint v (m)"), "{}", stderr(&alone));
    assert_eq!((planner.heard().len(), vlm.heard().len()), (1, 1));

    let dir = tempfile::tempdir().unwrap();
    let (batch, out) = (dir.path().join("ask.jsonl"), dir.path().join("rows.jsonl"));
    let line = |question: &str| format!("{}\n", json!({ "image": DEMO, "question": question }));
    std::fs::write(&batch, line("What color is the bed?") + &line("What color is the lamp?")).unwrap();
    let args = [&["--batch", batch.to_str().unwrap(), "--out", out.to_str().unwrap()][..], &sets].concat();
    let done = infer(&args);
    assert_eq!(done.status.code(), Some(1), "{}", stderr(&done));
    let first = rows(&out);
    assert_eq!((&first[0]["answer"], &first[1]["answer"]), (&Value::Null, &json!("red")));
    assert_eq!(first[0]["error"]["kind"], "no-reply");
    let done = infer(&args);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert!(stderr(&done).contains("1 of 2 are answered, 1 failed for want of a picture or a reply"));
    let second = rows(&out);
    assert_eq!((&second[0]["answer"], &second[1]), (&json!("red"), &first[1]));
    assert_eq!((planner.heard().len(), vlm.heard().len()), (4, 4), "only that row is asked again");
}

/// What a planner wrote before it was gone is paid for: it is run and written, and not asked for again.
#[test]
fn a_planner_that_answers_nothing_more_leaves_what_it_answered() {
    let number = |n: usize| program(&format!("final_answer = {n}"));
    let gone = || Act::Status(401, "", "{}".into());
    let broken = || program("final_answer = [][3]");
    // Gone at the third question of four; and at the repair of the first of three.
    for (questions, acts, more, answers, asked) in [
        (4, [number(1), number(2), gone(), number(3), number(4)], &[""; 0][..], &[Some(1), Some(2)][..], 3),
        (
            3,
            [broken(), number(2), number(3), gone(), number(1)],
            &["--repair", "1"],
            &[None, Some(2), Some(3)],
            4,
        ),
    ] {
        let server = Server::start(acts);
        let dir = tempfile::tempdir().unwrap();
        let (batch, out) = (dir.path().join("ask.jsonl"), dir.path().join("rows.jsonl"));
        let line =
            |i: usize| format!("{}\n", json!({ "image": DEMO, "question": format!("How many are {i}?") }));
        std::fs::write(&batch, (0..questions).map(line).collect::<String>()).unwrap();
        let url = format!("endpoints.s.base_url={}", server.url);
        let mut args =
            vec!["--batch", batch.to_str().unwrap(), "--out", out.to_str().unwrap(), "--set", &url];
        args.extend(["--set", "endpoints.s.model=m", "--set", "endpoints.s.concurrency=1"]);
        args.extend(["--set", "planner.model=endpoint:s"]);
        args.extend(more);
        let done = infer(&args);
        let said = stderr(&done);
        assert_eq!(done.status.code(), Some(1), "{said}");
        assert!(
            said.contains("refuses the key") && said.contains("the same command asks the rest"),
            "{said}"
        );
        let first = rows(&out);
        let given: Vec<Option<u64>> = first.iter().map(|row| row["answer"].as_u64()).collect();
        assert_eq!((given, server.heard().len()), (answers.to_vec(), asked));
        let silent = |row: &&Value| row["error"]["kind"] == "no-reply";
        assert_eq!(first.iter().filter(silent).count(), answers.iter().filter(|a| a.is_none()).count());
        // The same command asks for what is missing, and for nothing else.
        let done = infer(&args);
        assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
        let second = rows(&out);
        assert_eq!((second.len(), server.heard().len()), (questions, 5));
        for (i, row) in second.iter().enumerate() {
            assert_eq!((&row["index"], &row["answer"]), (&json!(i), &json!(i + 1)));
            assert!(first.get(i).is_none_or(|old| old["answer"].is_null() || old == row), "{row}");
        }
    }
}

#[test]
fn the_most_frequent_of_several_answers_counts() {
    let acts = vec![program("final_answer = 1"), program("final_answer = 2"), program("final_answer = 2.0")];
    let (code, trace, heard, _) = on_server(acts, &["--samples", "3"]);
    assert_eq!((code, &trace["answer"]), (Some(0), &json!(2)));
    assert_eq!(trace["votes"], json!([1, 2, 2.0]));
    let seeds: Vec<&Value> = heard.iter().map(|h| &h["seed"]).collect();
    assert!(seeds[0] != seeds[1] && seeds[1] != seeds[2], "{seeds:?}");
    assert_eq!(&trace["seed"], seeds[1]);
}

/// What the verifier would have chosen is not known while its server is silent.
#[test]
fn a_tie_that_a_silent_verifier_was_to_break_is_no_answer() {
    let tie = || vec![program("final_answer = 1"), program("final_answer = 2")];
    for (act, code, answer) in [
        (Act::Status(503, "", "{}".into()), Some(1), Value::Null),
        (Act::Reply("<answer>yes</answer>".into()), Some(0), json!(1)),
    ] {
        let verifier = Server::start([act]);
        let url = format!("endpoints.v.base_url={}", verifier.url);
        let sets = [
            &*url,
            "endpoints.v.model=m",
            "endpoints.v.tries=1",
            "verifier.model=endpoint:v",
            "inference.tie_break=verifier",
        ];
        let sets = sets.iter().flat_map(|set| ["--set", *set]);
        let more: Vec<&str> = ["--samples", "2"].into_iter().chain(sets).collect();
        let (got, trace, _, said) = on_server(tie(), &more);
        assert_eq!((got, &trace["answer"]), (code, &answer), "{trace} {said}");
        assert!(!verifier.heard().is_empty());
    }
}
