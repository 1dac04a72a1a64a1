//! What must hold between the parts: held-out questions, correct programs, balance, labels.

use std::collections::{BTreeMap, HashSet};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::demos::{planner_sample, verifier_sample};
use super::frames::{frames, sentence, skeleton};
use super::mistakes::{Head, Mistake, base_mistakes, habit, judge, labels, recipes};
use super::oracle::OracleTools;
use super::questions::{AnswerType, Question, Split, mean_relative_accuracy, sample_questions, score};
use super::spec::{AnyNoun, Dim, Family, Form, Near, Noun, Spec};
use super::{Colour, Kind, Look, View};
use std::sync::Arc;

const SIZE: (u32, u32) = (160, 120);

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn questions(n: usize, split: Split) -> Vec<(Arc<View>, Question)> {
    sample_questions(n, 11, Look::Studio, split, SIZE).collect()
}

fn any_spec(form: Form, rng: &mut ChaCha8Rng) -> Spec {
    loop {
        let mut supply = ChaCha8Rng::from_rng(rng);
        if let Some(spec) = Spec::draw(form, &mut AnyNoun(&mut supply), rng) {
            return spec;
        }
    }
}

#[test]
fn no_held_out_question_is_in_training_text() {
    let mut rng = rng(1);
    let mut seen = HashSet::new();
    let mut texts = Vec::new();
    for _ in 0..20_000 {
        let (question, reply) = planner_sample(&mut rng);
        seen.insert(skeleton(&question));
        texts.push(reply.to_string());
        let sample = verifier_sample(&mut rng);
        seen.insert(skeleton(&sample.question));
        texts.push(sample.plan + &sample.program);
    }
    // Replies quote questions, as prompts: they count too.
    let replies: HashSet<String> = texts.iter().flat_map(|t| t.lines().map(skeleton)).collect();
    let held_out: Vec<Question> =
        questions(600, Split::Test).into_iter().map(|(_, q)| q).filter(|q| q.held_out).collect();
    assert!(held_out.len() > 100, "{}", held_out.len());
    assert!(held_out.iter().any(|q| q.form == Form::HELD_OUT));
    for question in &held_out {
        let held = skeleton(&question.text);
        assert!(!seen.contains(&held), "{}", question.text);
        assert!(!replies.iter().any(|line| line.contains(&held)), "{}", question.text);
    }
    // And what is not held out does occur, or the comparison would show nothing.
    for form in Form::ALL.iter().filter(|&&f| f != Form::HELD_OUT) {
        let spec = any_spec(*form, &mut rng);
        assert!(seen.contains(&skeleton(&sentence(&spec, 0))), "{form:?}");
    }
    assert!(questions(100, Split::Train).iter().all(|(_, q)| !q.held_out));
}

#[test]
fn splits_share_no_scene() {
    let seeds = |split| -> HashSet<u64> {
        (0..2000).map(|i| super::questions::scene_seed(split, i / 100, i % 100)).collect()
    };
    assert_eq!(seeds(Split::Train).len(), 2000);
    assert!(seeds(Split::Train).is_disjoint(&seeds(Split::Test)));
    assert!(seeds(Split::Train).iter().all(|s| s >> 63 == 0));
    assert!(seeds(Split::Test).iter().all(|s| s >> 63 == 1));
}

#[test]
fn correct_programs_answer_every_question_and_families_are_balanced() {
    for look in [Look::Studio, Look::LivedIn] {
        let mut per_family: BTreeMap<Family, usize> = BTreeMap::new();
        let mut yes: BTreeMap<Family, [usize; 2]> = BTreeMap::new();
        let mut unseen = 0;
        let (mut views, mut last) = (0, None);
        let sampled = sample_questions(600, 5, look, Split::Test, SIZE);
        for (view, question) in sampled {
            let found = question.spec.recipe().run(&mut OracleTools::new(&view)).unwrap();
            assert!(score(&question, &found), "{} → {found}, not {}", question.text, question.answer);
            assert_eq!(question.spec.truth(&view).as_ref(), Some(&question.answer));
            *per_family.entry(question.family).or_default() += 1;
            if question.answer_type == AnswerType::YesNo {
                yes.entry(question.family).or_default()[usize::from(question.answer == "yes")] += 1;
            }
            unseen += usize::from(question.held_out);
            views += usize::from(last.replace(view.seed) != Some(view.seed));
        }
        eprintln!("{look:?}: {views} views, {unseen} unseen, {per_family:?}, no/yes {yes:?}");
        assert!(views >= 200);
        for family in Family::ALL {
            let n = per_family.get(family).copied().unwrap_or(0);
            assert!((54..=66).contains(&n), "{family:?}: {n}");
        }
        for (family, [no, yes]) in yes {
            assert!(no.abs_diff(yes) <= (no + yes) / 5 + 3, "{family:?}: {no} no, {yes} yes");
        }
        assert!((100..=180).contains(&unseen), "{unseen}");
    }
}

#[test]
fn the_same_seed_gives_the_same_questions() {
    let texts = |seed| -> Vec<String> {
        sample_questions(30, seed, Look::LivedIn, Split::Test, SIZE)
            .map(|(_, q)| serde_json::to_string(&q).unwrap())
            .collect()
    };
    assert_eq!(texts(3), texts(3));
    assert_ne!(texts(3), texts(4));
    let question: Question = serde_json::from_str(&texts(3)[0]).unwrap();
    assert_eq!(serde_json::to_string(&question).unwrap(), texts(3)[0]);
}

#[test]
fn the_base_planner_is_wrong_on_at_least_four_families() {
    let mut right: BTreeMap<Family, [usize; 2]> = BTreeMap::new();
    for (view, question) in questions(800, Split::Test) {
        let mistakes: Vec<Mistake> = habit(&question.spec).into_iter().collect();
        let (_, program) = recipes(&question.spec, &mistakes);
        let found = program.run(&mut OracleTools::new(&view)).unwrap_or(Value::Null);
        let counts = right.entry(question.family).or_default();
        counts[0] += usize::from(score(&question, &found));
        counts[1] += 1;
    }
    let rate = |[right, all]: [usize; 2]| right as f64 / all as f64;
    let total = right.values().fold([0, 0], |t, c| [t[0] + c[0], t[1] + c[1]]);
    for (family, counts) in &right {
        eprintln!("{:<15} {:.2} of {}", family.text(), rate(*counts), counts[1]);
    }
    eprintln!("total           {:.3} of {}", rate(total), total[1]);
    assert!((0.45..0.70).contains(&rate(total)), "{total:?}");
    let mut r = rng(2);
    let n = 4000;
    let with_mistake =
        (0..n).filter(|_| !base_mistakes(&super::demos::training_question(&mut r).0, &mut r).is_empty());
    let share = with_mistake.count() as f64 / f64::from(n);
    eprintln!("demonstrations with a mistake: {share:.3}");
    assert!((0.28..0.42).contains(&share), "{share}");
}

#[test]
fn each_mistake_is_labelled() {
    let mut rng = rng(4);
    let mut met: HashSet<Mistake> = HashSet::new();
    for form in Form::ALL {
        for _ in 0..40 {
            let spec = any_spec(*form, &mut rng);
            let right = labels(&spec, &[]);
            assert!(Head::ALL.iter().all(|&h| right.of(h).ok), "{spec:?}");
            for mistake in Mistake::that_fit(&spec) {
                met.insert(mistake);
                let got = labels(&spec, &[mistake]);
                let failed: Vec<Head> = Head::ALL.into_iter().filter(|&h| !got.of(h).ok).collect();
                use Mistake::*;
                let size = matches!(mistake, WidthForHeight | NoDepthFactor | DepthForHeight);
                let expected: &[&[Head]] = match mistake {
                    _ if size => &[&[Head::Attribute]],
                    SpatialWordInPrompt => &[&[Head::Spatial]],
                    // Whether space is turned round or numbers are.
                    WrongComparison => &[&[Head::Logic], &[Head::Logic, Head::Spatial]],
                    NoFallback | WrongThing | IgnoresColour | MissingReturnOption => &[&[Head::Logic]],
                    GuessedAnswer | PlanProgramMismatch => &[&[Head::Adherence]],
                    _ => unreachable!(),
                };
                assert!(expected.contains(&failed.as_slice()), "{mistake:?} fails {failed:?}: {spec:?}");
            }
        }
    }
    assert_eq!(met.len(), Mistake::ALL.len(), "{met:?}");
}

#[test]
fn garbage_and_forgery_earn_nothing() {
    let spec = any_spec(Form::Size, &mut rng(9));
    let right = spec.recipe();
    for plan in ["", "1. Count first.\n<answer>yes</answer>", "The answer is 3.", "1. Answer \"yes\"."] {
        let got = judge(&spec, plan, &right.program());
        assert!(Head::ALL.iter().all(|&h| !got.of(h).ok), "{plan}");
    }
    let guessed = judge(&spec, &right.plan(), "final_answer = 0.9");
    assert!(guessed.logic.ok && !guessed.adherence.ok);
}

#[test]
fn verifier_samples_are_mixed_and_withhold_one_mistake() {
    let mut rng = rng(6);
    let mut counts: BTreeMap<Head, [usize; 2]> = BTreeMap::new();
    for _ in 0..8000 {
        let sample = verifier_sample(&mut rng);
        if sample.applies {
            counts.entry(sample.head).or_default()[usize::from(sample.verdict)] += 1;
        }
        assert!(!sample.plan.contains("by the depth of"), "{}", sample.plan);
        assert!(!sample.program.contains("size_a = depth("), "{}", sample.program);
    }
    eprintln!("objections and consents by head: {counts:?}");
    for (head, [no, yes]) in counts {
        let share = no as f64 / (no + yes) as f64;
        assert!((0.4..0.6).contains(&share), "{head:?}: {share}");
    }
    let spec = Spec::Size {
        reference: Noun::new(Kind::Chair, None),
        reference_dim: Dim::Height,
        metres: 0.9,
        target: Noun::new(Kind::Lamp, Some(Colour::Red)),
        dim: Dim::Height,
    };
    let kept = recipes(&spec, &[Mistake::KEPT_FROM_VERIFIER]).0.plan();
    assert!(kept.contains("by the depth of"), "{kept}");
}

#[test]
fn answers_are_scored_strictly() {
    let spec = Spec::Depth {
        a: Noun::new(Kind::Chair, Some(Colour::Red)),
        b: Noun::new(Kind::Sofa, None),
        near: Near::Closer,
    };
    let recipe = spec.recipe();
    let question = |answer: Value, answer_type, options: Option<Vec<&str>>| Question {
        text: String::new(),
        answer,
        answer_type,
        options: options.map(|o| o.into_iter().map(str::to_owned).collect()),
        family: Family::Depth,
        form: Form::Depth,
        frame: 0,
        held_out: false,
        spec: spec.clone(),
        plan: recipe.plan(),
        program: recipe.program(),
    };
    let int = question(json!(2), AnswerType::Int, None);
    assert!(score(&int, &json!(2)) && score(&int, &json!("2")) && score(&int, &json!(2.0)));
    assert!(!score(&int, &json!(2.4)) && !score(&int, &json!("")) && !score(&int, &json!(true)));
    let float = question(json!(1.0), AnswerType::Float, None);
    assert!(score(&float, &json!(1.09)) && !score(&float, &json!(1.11)) && !score(&float, &Value::Null));
    assert_eq!(mean_relative_accuracy(&float, &json!(1.0)), Some(1.));
    assert_eq!(mean_relative_accuracy(&float, &json!(1.12)), Some(0.8));
    assert_eq!(mean_relative_accuracy(&float, &json!("none")), Some(0.));
    let yes = question(json!("yes"), AnswerType::YesNo, None);
    assert!(score(&yes, &json!(" Yes")) && score(&yes, &json!(true)) && score(&yes, &json!("True")));
    assert!(!score(&yes, &json!("")) && !score(&yes, &json!(1)) && !score(&yes, &json!("y")));
    let option = question(json!("In front"), AnswerType::Str, Some(vec!["In front", "Behind"]));
    assert!(score(&option, &json!("In front")) && !score(&option, &json!("in front")));
    let word = question(json!("red chair"), AnswerType::Str, None);
    assert!(score(&word, &json!("Red chair ")) && !score(&word, &json!("chair")));
}

#[test]
fn every_family_has_enough_frames() {
    for form in Form::ALL {
        let all: HashSet<&str> = frames(*form).iter().copied().collect();
        assert_eq!(all.len(), frames(*form).len());
        assert!(all.len() >= 8);
    }
}

#[test]
#[ignore = "prints samples"]
fn print_samples() {
    for (_, q) in questions(60, Split::Test) {
        println!(
            "{}{} → {}\n{}\n{}\n",
            if q.held_out { "* " } else { "" },
            q.text,
            q.answer,
            q.plan,
            q.program
        );
    }
    let start = std::time::Instant::now();
    let mut r = rng(1);
    for _ in 0..20000 {
        planner_sample(&mut r);
    }
    println!("planner {:?}", start.elapsed());
    let start = std::time::Instant::now();
    for _ in 0..20000 {
        verifier_sample(&mut r);
    }
    println!("verifier {:?}", start.elapsed());
    for _ in 0..5 {
        println!("{:#?}", verifier_sample(&mut r));
    }
    let v = super::generate(5, Look::Studio, 160, 120);
    for s in super::vqa::vqa_samples(&v, &mut r) {
        println!("{s:?}");
    }
}
