use std::collections::HashSet;
use std::path::{Path, PathBuf};

use candle_core::Device;

use super::*;
use crate::config::Head;
use crate::llm::engine::EngineOptions;
use crate::llm::local::LocalChat;
use crate::llm::{ChatModel, ChatRequest, Message, SamplingOptions};
use crate::rooms::demos::verifier_sample;
use crate::rooms::frames::skeleton;
use crate::rooms::questions::{Question, sample_questions};
use crate::rooms::spec::Form;
use crate::rooms::vqa::{CropAsk, parse_crop};
use crate::rooms::{Look, Split};
use crate::verify::parse_verdict;

fn short(o: fn(PathBuf) -> Options, dir: &Path) -> Options {
    Options { steps: 6, batch: 2, eval_every: 0, held_out: 3, ..o(dir.into()) }
}

fn reply(model: &Path, message: Message) -> String {
    let model = LocalChat::open(model, &Device::Cpu, EngineOptions::default()).unwrap();
    let request = ChatRequest { messages: vec![message], ..ChatRequest::user("", 1, 5) };
    let replies: Result<Vec<_>, _> =
        model.chat(&[request], &SamplingOptions::greedy(), None).into_iter().collect();
    let replies = replies.unwrap();
    assert!(replies[0].new_tokens > 0);
    replies[0].text.clone()
}

#[test]
fn held_out_sentences_are_in_no_text_of_planner_and_verifier() {
    let mut rng = stream(3, 0);
    let (mut lines, mut whole) = (HashSet::new(), 0);
    for _ in 0..4_000 {
        let case = verifier_sample(&mut rng);
        for (user, reply) in [planner::text(&mut rng), verifier::text(&case)] {
            lines.extend(user.lines().chain(reply.lines()).map(skeleton));
            whole += 1;
        }
    }
    assert_eq!(whole, 8_000);
    let questions = sample_questions(300, 17, Look::Studio, Split::Test, (160, 120));
    let (held, seen): (Vec<Question>, Vec<Question>) = questions.map(|(_, q)| q).partition(|q| q.held_out);
    let occurs = |q: &Question| {
        let skeleton = skeleton(&q.text);
        lines.iter().any(|l| l.contains(&skeleton))
    };
    assert!(held.iter().any(|q| q.form == Form::HELD_OUT));
    for q in &held {
        assert!(!occurs(q), "{}", q.text);
    }
    // Or the comparison would show nothing.
    assert!(seen.iter().filter(|q| occurs(q)).count() * 10 > seen.len() * 9);
}

#[test]
fn the_tokenizer_repeats_and_knows_the_words() {
    let json = tokenizer::train(5).unwrap();
    assert_eq!(json, tokenizer::train(5).unwrap());
    let t = Tokenizer::from_bytes(json.as_bytes()).unwrap();
    assert!(t.vocab_size() <= 2_048);
    for word in [" chair", " gd_detect", "final_answer", " farthest", "Question", "<|image_pad|>"] {
        assert_eq!(t.encode(word).unwrap().len(), 1, "{word}");
    }
    let mut rng = stream(5, 9);
    for _ in 0..20 {
        let text = planner::text(&mut rng).1;
        assert_eq!(t.decode(&t.encode(&text).unwrap()).unwrap(), text);
    }
}

#[test]
fn a_verdict_ends_every_reply_and_says_what_the_sample_says() {
    let mut rng = stream(4, 0);
    let (mut strays, mut consents) = (HashSet::new(), 0);
    for _ in 0..2_000 {
        let case = verifier_sample(&mut rng);
        let (_, reply) = verifier::text(&case);
        assert_eq!(parse_verdict(&reply), Some(case.verdict), "{reply}");
        let (reason, _) = reply.rsplit_once('\n').unwrap();
        // The reason and the verdict never disagree: there is a mark where something strays, and only there.
        let all = !reason.contains('!');
        if case.head == Head::Adherence {
            assert_eq!(all, case.verdict, "{case:?}\n{reply}");
            if all {
                assert_eq!(reason, case.program.trim_end(), "{case:?}");
            }
        } else {
            assert_eq!(all, case.plan == case.wanted, "{case:?}\n{reply}");
            assert!(case.verdict || !all, "{case:?}\n{reply}");
        }
        consents += usize::from(all);
        strays.extend(reason.split('!').skip(1).map(|s| s.split(' ').take(2).collect::<Vec<_>>().join(" ")));
    }
    assert!(consents > 300, "{consents}");
    // A word for another, a step too many, a plan that is none.
    for seen in [" width", " fewer", "It is", "The plan"] {
        assert!(strays.iter().any(|s| s.starts_with(seen)), "{seen}: {strays:?}");
    }
}

#[test]
fn planner_and_verifier_learn_and_their_exports_reply() {
    let dir = tempfile::tempdir().unwrap();
    let (planner, verifier) = (dir.path().join("planner"), dir.path().join("verifier"));
    let alone = verifier::train(&short(Options::verifier, &verifier), &planner).unwrap_err();
    assert!(alone.to_string().contains("make the planner first"), "{alone}");

    let o = short(Options::planner, &planner);
    let before = planner::train(&Options { steps: 0, ..o.clone() }).unwrap();
    let after = planner::train(&o).unwrap();
    let loss = |m: &Metrics| m["held_out_loss"].as_f64().unwrap();
    assert!(loss(&after) < loss(&before) - 0.1, "{before:?} {after:?}");

    let judged = verifier::train(&short(Options::verifier, &verifier), &planner).unwrap();
    assert!(judged.contains_key("unreadable"), "{judged:?}");
    assert!(loss(&judged) < loss(&before) - 0.1, "it starts from the planner: {judged:?}");
    for (run, export) in [(&planner, planner::export as fn(&Path, &Path) -> _), (&verifier, verifier::export)]
    {
        let out = run.join("out");
        export(run, &out).unwrap();
        reply(&out, Message::user("How many chairs are there?"));
    }
    let ids = |run: &Path| std::fs::read(run.join("tokenizer.json")).unwrap();
    assert_eq!(ids(&planner), ids(&verifier));
}

#[test]
fn the_vlm_learns_and_its_export_replies_about_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    let (run, out) = (dir.path().join("vlm"), dir.path().join("out"));
    let tower = dir.path().join("vision");
    let o = Options { batch: 4, ..short(Options::vlm, &run) };
    let alone = vlm::train(&o, &tower).unwrap_err();
    assert!(alone.to_string().contains("make it first"), "{alone}");
    let seen = vision::train(&Options { batch: 4, ..short(Options::vision, &tower) }).unwrap();
    assert!(seen["kind_right_studio"].as_f64().is_some(), "{seen:?}");
    let before = vlm::train(&Options { steps: 0, ..o.clone() }, &tower).unwrap();
    let after = vlm::train(&o, &tower).unwrap();
    for name in ["whole", "colour", "colour-from", "kind", "is-colour", "is-kind"] {
        let loss = |m: &Metrics| m[&format!("{name}_loss")].as_f64().unwrap();
        assert!(loss(&after) < loss(&before) - 0.1, "{name}: {before:?} {after:?}");
    }
    vlm::export(&run, &out).unwrap();
    for (w, h) in [(40, 30), (256, 192), (9, 60)] {
        let picture = image::RgbImage::from_pixel(w, h, image::Rgb([200, 20, 20]));
        reply(&out, Message::user("What color is it?").with_images(vec![picture]));
    }
}

#[test]
fn a_conversation_is_what_its_turns_are_prompted_with() {
    let format = text_format(&tokenizer::train(5).unwrap()).unwrap();
    let turns = [("What is it?", "chair"), ("What color is it?", "dark red"), ("Is it a bed?", "no")];
    let asked = turns.map(|(q, a)| (Message::user(q), a));
    let sample = crate::train::lm::Sample::conversation(&format, &asked).unwrap();
    assert_eq!(sample.replies.len(), 3);
    let mut messages = Vec::new();
    for ((question, reply), at) in asked.into_iter().zip(&sample.replies) {
        messages.push(question);
        assert_eq!(sample.ids[..at.start], format.prompt(&messages, &Device::Cpu).unwrap().ids);
        assert_eq!(sample.ids[at.clone()], format.reply(reply).unwrap());
        messages.push(Message::assistant(reply));
    }
    assert_eq!(sample.replies[2].end, sample.ids.len());
}

#[test]
fn no_turn_about_a_crop_asks_what_an_earlier_one_told() {
    let mut rng = stream(8, 0);
    let (mut turns, mut open_after_no) = (0, 0);
    for index in 0..12 {
        let (_, questions) = vlm::questions(5, index, &mut rng);
        let crops: Vec<_> = questions.iter().filter(|q| q.0.is_some()).collect();
        for asks in crops.chunk_by(|a, b| a.0 == b.0) {
            let order = vlm::untold(asks, &mut rng);
            assert!(!order.is_empty());
            turns += order.len();
            let told = |word: &str, before: &[&crate::rooms::vqa::VqaSample]| {
                let mut words = before.iter().flat_map(|q| q.1.split(' ').chain(q.2.split(' ')));
                words.any(|w| w.trim_matches(|c: char| !c.is_alphabetic()) == word)
            };
            let answer =
                |ask| asks.iter().find(|q| parse_crop(&q.1).as_ref() == Some(&ask)).unwrap().2.as_str();
            let (kind, colour) = (answer(CropAsk::Kind), answer(CropAsk::Colour));
            for (i, q) in order.iter().enumerate() {
                let secret = match parse_crop(&q.1).unwrap() {
                    CropAsk::Kind | CropAsk::IsKind(_) => kind,
                    _ => colour,
                };
                assert!(!told(secret, &order[..i]), "{order:?}");
                open_after_no += usize::from(i > 0 && q.2 == secret && order[i - 1].2 == "no");
            }
        }
        let whole: Vec<_> = questions.iter().filter(|q| q.0.is_none()).collect();
        let kept = vlm::unrelated(&whole);
        for kind in crate::rooms::Kind::ALL {
            let naming = kept.iter().filter(|q| q.1.to_lowercase().contains(kind.word())).count();
            assert!(naming <= 1, "{kept:?}");
        }
        assert!(whole.is_empty() || !kept.is_empty());
    }
    assert!(turns > 100 && open_after_no > 0, "{turns} {open_after_no}");
}

/// Ops work in blocks and chunks: what small shapes show need not hold at a training step's size.
#[test]
fn gradients_hold_at_the_size_of_a_training_step() {
    let format = text_format(&tokenizer::train(5).unwrap()).unwrap();
    let vocab = format.tokenizer.vocab_size();
    let params = crate::nn::Params::new(3);
    let network = planner::network(&params, vocab).unwrap();
    spread_embeddings(&params).unwrap();
    let mut rng = stream(6, 0);
    let samples: Vec<_> =
        (0..6).map(|_| planner::sample(&format, planner::text(&mut rng)).unwrap()).collect();
    let of: Vec<_> = samples.iter().collect();
    let loss = || crate::train::lm::reply_log_probs(&network, &of).unwrap().mean_all().unwrap();
    let grads = loss().backward().unwrap();
    for (name, var) in params.named() {
        let g = grads.get(&var).unwrap();
        let norm = g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt() as f64;
        let start = var.as_tensor().copy().unwrap();
        let size = start.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt() as f64;
        let step = 0.002 * size;
        let at = |by: f64| -> f64 {
            var.set(&(&start + (g * (by / norm)).unwrap()).unwrap()).unwrap();
            loss().to_dtype(candle_core::DType::F64).unwrap().to_scalar::<f64>().unwrap()
        };
        let slope = (at(step) - at(-step)) / (2. * step);
        var.set(&start).unwrap();
        // A fiftieth for curvature, and what f32 cannot tell of a loss of about 8.
        let tolerance = 0.02 * norm + 4e-6 / step;
        assert!((slope - norm).abs() < tolerance, "{name}: slope {slope} norm {norm}");
    }
}

#[test]
fn a_judge_says_where_a_plan_strays_and_with_what() {
    use crate::rooms::mistakes::{Mistake, demonstration};
    let question = "Are there more chairs than red boxes?";
    let Some((spec, _)) = crate::rooms::frames::parse(question) else { panic!("a question of the grammar") };
    let judged = |head, mistakes: &[Mistake], change: &dyn Fn(&str) -> String| {
        let reply = demonstration(&spec, mistakes);
        let (plan, program) = match head {
            Head::Adherence => (reply.plan, change(&reply.program)),
            _ => (change(&reply.plan), reply.program),
        };
        let labels = crate::rooms::mistakes::judge(&spec, &plan, &program).of(head);
        let case = crate::rooms::demos::VerifierSample {
            head,
            question: question.into(),
            wanted: spec.recipe().plan(),
            plan,
            program,
            verdict: labels.ok,
            applies: labels.applies,
        };
        verifier::text(&case).1
    };
    let same = |text: &str| text.to_owned();
    let right = spec.recipe();
    assert_eq!(judged(Head::Logic, &[], &same), format!("{}\n<answer>yes</answer>", right.plan()));
    assert_eq!(judged(Head::Adherence, &[], &same), format!("{}\n<answer>yes</answer>", right.program()));
    let turned = judged(Head::Logic, &[Mistake::WrongComparison], &same);
    assert!(turned.contains(" more! fewer") && turned.matches('!').count() == 1, "{turned}");
    // The step that is missing strays from the one in its place, which is then met by its own.
    let missing = judged(Head::Logic, &[Mistake::NoFallback], &same);
    assert_eq!(missing.matches('!').count(), 1, "{missing}");
    assert_eq!(missing.lines().count(), right.plan().lines().count() + 1, "{missing}");
    let more = judged(Head::Logic, &[], &|plan| format!("{plan}\n9. Go home."));
    assert!(more.contains("\n!Go home.\n<answer>no"), "{more}");
    let short = judged(Head::Adherence, &[], &|program| program.rsplit_once('\n').unwrap().0.to_owned());
    assert!(right.program().starts_with(short.split_once('!').unwrap().0.trim_end()), "{short}");
    let digits = judged(Head::Adherence, &[], &|program| program.replace("second", "first"));
    let marks = right.program().matches("second").count();
    assert!(digits.contains("second!first") && digits.matches('!').count() == marks, "{digits}");
    assert!(digits.ends_with("\n<answer>no</answer>"), "{digits}");
    // The words of a line that is longer have no counterparts.
    let longer = judged(Head::Adherence, &[], &|program| program.replacen("first = ", "first = not ", 1));
    assert!(
        longer.starts_with("first =") && longer.contains("\n<answer>no") && longer.len() < 60,
        "{longer}"
    );
}
