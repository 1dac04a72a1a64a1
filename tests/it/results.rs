//! Stored results: the tables in `data/results` say what the stored samples say.

use std::path::Path;

use serde_json::Value;
use valor::eval::stats::Share;

/// Accuracy of the samples that `keep` keeps, as tables have it.
fn share(samples: &[Value], keep: impl Fn(&Value) -> bool) -> String {
    let of = |s: &Value| (s["scene"].as_u64().unwrap(), s["correct"].as_bool().unwrap());
    Share::clustered(samples.iter().filter(|s| keep(s)).map(of)).to_string().trim().to_owned()
}

#[test]
fn the_table_of_rooms_is_what_its_samples_say() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/results");
    let table = std::fs::read_to_string(dir.join("rooms.md")).unwrap();
    let mut rows = 0;
    for line in table.lines().filter(|l| l.starts_with("| [")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let file = cells[0].split("](").nth(1).unwrap().trim_end_matches(')');
        let text = std::fs::read_to_string(dir.join(file)).unwrap();
        let samples: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        for (i, s) in samples.iter().enumerate() {
            assert_eq!(s["index"], i, "{file}");
            // Words and whole numbers are right if they are the truth's; lengths may be a tenth off.
            if !s["truth"].is_f64() {
                let word = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_lowercase);
                assert!(s["correct"] == false || word(&s["answer"]) == word(&s["truth"]), "{file}: {s}");
            }
        }
        let said = [share(&samples, |_| true), share(&samples, |s| s["held_out"] == false)];
        let unseen = share(&samples, |s| s["held_out"] == true);
        assert_eq!(cells[1..4], [&*said[0], &*said[1], &*unseen], "{file}");
        rows += 1;
    }
    assert!(rows >= 4, "{rows}");
}
