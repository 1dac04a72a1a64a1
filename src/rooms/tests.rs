//! What must hold between the parts: held-out questions, correct programs, balance, labels.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::demos::{planner_sample, verifier_sample};
use super::frames::{frames, sentence, skeleton};
use super::mistakes::{Mistake, base_mistakes, habits, judge, labels, recipes};
use super::oracle::OracleTools;
use super::questions::{
    AnswerType, Question, Split, mean_relative_accuracy, relative_accuracy, sample_questions, score,
};
use super::recipe::{Recipe, Then};
use super::spec::{AnyNoun, Dim, Family, Form, Most, Near, Noun, Side, Spec};
use super::{Camera, Colour, Kind, Look, Thing, View};
use crate::config::Head;
use crate::program::Reply;
use crate::sight::Tools;

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
        texts.push(reply);
        let sample = verifier_sample(&mut rng);
        seen.insert(skeleton(&sample.question));
        texts.push(sample.plan + &sample.program);
    }
    // Replies quote questions, as prompts: they count too.
    let replies: HashSet<String> = texts.iter().flat_map(|t| t.lines().map(skeleton)).collect();
    let held_out: Vec<Question> =
        questions(500, Split::Test).into_iter().map(|(_, q)| q).filter(|q| q.held_out).collect();
    assert!(held_out.len() > 80, "{}", held_out.len());
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
fn demonstrations_are_read_though_some_are_not_of_the_form() {
    let mut rng = rng(6);
    let n = 3000;
    let sloppy = (0..n)
        .filter(|_| {
            let (_, text) = planner_sample(&mut rng);
            let read = Reply::parse(&text).unwrap();
            assert!(read.plan.is_some() && !read.program.trim().is_empty(), "{text}");
            Reply::parse_strict(&text).is_err()
        })
        .count();
    let share = sloppy as f64 / f64::from(n);
    assert!((0.1..0.14).contains(&share), "{share}");
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
        notice!("{look:?}: {views} views, {unseen} unseen, {per_family:?}, no/yes {yes:?}");
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
    for (view, question) in questions(600, Split::Test) {
        let mistakes: Vec<Mistake> = habits(&question.spec);
        let (_, program) = recipes(&question.spec, &mistakes);
        let found = program.run(&mut OracleTools::new(&view)).unwrap_or(Value::Null);
        let counts = right.entry(question.family).or_default();
        counts[0] += usize::from(score(&question, &found));
        counts[1] += 1;
    }
    let rate = |[right, all]: [usize; 2]| right as f64 / all as f64;
    let total = right.values().fold([0, 0], |t, c| [t[0] + c[0], t[1] + c[1]]);
    let told = |(family, counts): (&Family, &[usize; 2])| {
        format!("{:<15} {:.2} of {}\n", family.text(), rate(*counts), counts[1])
    };
    let rates: String = right.iter().map(told).collect();
    notice!("{rates}total           {:.3} of {}", rate(total), total[1]);
    // Wrong on a family is who fails more than a quarter of its questions: were it nearly all of them,
    // looking at the picture would no longer pay (see `habit`).
    let wrong = right.values().filter(|counts| rate(**counts) < 0.75).count();
    assert!(wrong >= 4, "wrong on {wrong} families, right in:\n{rates}");
    // Of one who imitates perfectly; a trained planner slips besides (63.6 % where this is 70 %), and
    // its own figure, by `eval --bench rooms --planner base`, is to be below 70 %.
    assert!((0.45..0.75).contains(&rate(total)), "{total:?}");
    let mut r = rng(2);
    let n = 4000;
    let with_mistake =
        (0..n).filter(|_| !base_mistakes(&super::demos::training_question(&mut r).0, &mut r).is_empty());
    let share = with_mistake.count() as f64 / f64::from(n);
    notice!("demonstrations with a mistake: {share:.3}");
    assert!((0.28..0.45).contains(&share), "{share}");
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
    notice!("objections and consents by head: {counts:?}");
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
fn verifier_samples_hold_slips_of_copying_with_exact_labels() {
    let mut rng = rng(7);
    let (mut number, mut noun, mut program_alone, mut loose) = (0, 0, 0, 0);
    for _ in 0..6000 {
        let s = verifier_sample(&mut rng);
        let Some((spec, _)) = super::frames::parse(&s.question) else {
            loose += 1;
            continue;
        };
        let label = judge(&spec, &s.plan, &s.program);
        assert_eq!((label.of(s.head).ok, label.of(s.head).applies), (s.verdict, s.applies));
        let (right, held) = (spec.recipe(), Recipe::from_plan(&s.plan));
        if let (Spec::Size { metres, .. }, Some(held)) = (&spec, &held)
            && let Then::Ratio { metres: told, .. } = held.then
        {
            number += usize::from(told != *metres && !label.logic.ok);
        }
        if let Some(held) = held.filter(|h| h.finds.len() == right.finds.len()) {
            let other = held.finds.iter().zip(&right.finds).any(|(a, b)| a.prompt != b.prompt);
            noun += usize::from(other && !label.logic.ok);
        }
        program_alone += usize::from(label.logic.ok && label.spatial.ok && !label.adherence.ok);
    }
    assert!(number > 20 && noun > 100 && program_alone > 200, "{number} {noun} {program_alone}");
    // Questions as people put them, of which the words alone do not tell the frame.
    assert!((4000..5500).contains(&loose), "{loose}");
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
    // An error that is a threshold is not below it.
    for (error, accuracy) in [(1. / 20., 0.9), (3. / 20., 0.7), (3. / 10., 0.4), (0., 1.), (0.5, 0.)] {
        assert_eq!(relative_accuracy(error), accuracy, "{error}");
    }
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

/// A picture of boxes: kind, colour, box, metres away, width and height in metres.
type Block = (Kind, Colour, [f64; 4], f64, [f64; 2]);

fn painted(blocks: &[Block]) -> View {
    let (width, height) = (200u32, 100u32);
    let mut view = View {
        seed: 0,
        look: Look::Studio,
        width,
        height,
        camera: Camera { fov_x: 60., height: 1.5, tilt: 0. },
        rgb: vec![0; (width * height * 3) as usize],
        depth: vec![9.; (width * height) as usize],
        ids: vec![0; (width * height) as usize],
        things: Vec::new(),
    };
    for (i, &(kind, colour, bbox, z, [w, h])) in blocks.iter().enumerate() {
        let id = i as u16 + 1;
        for y in bbox[1] as usize..bbox[3] as usize {
            for x in bbox[0] as usize..bbox[2] as usize {
                view.depth[y * width as usize + x] = z as f32;
                view.ids[y * width as usize + x] = id;
            }
        }
        view.things.push(Thing {
            id,
            kind,
            colour,
            size: [w, h, 0.5],
            centre: [0., 0., z],
            bbox,
            full_bbox: bbox,
            visible_pixels: ((bbox[2] - bbox[0]) * (bbox[3] - bbox[1])) as u32,
            visible_fraction: 1.,
            truncated: false,
        });
    }
    view
}

#[test]
fn nothing_is_asked_within_the_margins() {
    let (chair, sofa) = (Noun::new(Kind::Chair, None), Noun::new(Kind::Sofa, None));
    let block = |kind, x: f64, z: f64| -> Block {
        // 20 × 40 pixels at a focal length of 100 pixels.
        (kind, Colour::Red, [x, 30., x + 20., 70.], z, [0.2 * z, 0.4 * z])
    };
    let left = Spec::Position { a: chair, b: sofa, side: Side::Left };
    let closer = Spec::Depth { a: chair, b: sofa, near: Near::Closer };
    let apart = painted(&[block(Kind::Chair, 20., 2.), block(Kind::Sofa, 100., 3.)]);
    assert_eq!(left.truth(&apart), Some(json!("yes")));
    assert_eq!(closer.truth(&apart), Some(json!("chair")));
    let beside = painted(&[block(Kind::Chair, 20., 2.), block(Kind::Sofa, 30., 2.2)]);
    assert_eq!(left.truth(&beside), None);
    assert_eq!(closer.truth(&beside), None);

    // Two of a kind: neither is "the chair", but they can be counted, unless one is half hidden.
    let mut two = painted(&[block(Kind::Chair, 20., 2.), block(Kind::Chair, 80., 3.)]);
    assert_eq!(Spec::Colour { of: Kind::Chair }.truth(&two), None);
    assert_eq!(Spec::Count { of: chair }.truth(&two), Some(json!(2)));
    two.things[1].visible_fraction = 0.27;
    assert!(two.things[1].is_clear());
    assert_eq!(Spec::Count { of: chair }.truth(&two), None);
    two.things[1].visible_fraction = 0.1;
    assert_eq!(Spec::Count { of: chair }.truth(&two), None);
    assert_eq!(Spec::Exists { of: sofa }.truth(&two), Some(json!("no")));

    // A size is asked where pixels and depth tell it, not where they mislead.
    let tall = Spec::Size {
        reference: chair,
        reference_dim: Dim::Height,
        metres: 0.8,
        target: sofa,
        dim: Dim::Height,
    };
    assert_eq!(tall.truth(&apart), Some(json!(1.2)));
    let mut leaning = apart.clone();
    leaning.things[1].size[1] *= 1.08;
    assert_eq!(tall.truth(&leaning), None);
    let mut cut = apart.clone();
    cut.things[0].truncated = true;
    assert_eq!(tall.truth(&cut), None);
    // Nor is a reference told that is not the true one.
    assert_eq!(tall.with_true_metres(&beside).truth(&apart), Some(json!(1.2)));
    let wrong = Spec::Superlative { of: [Kind::Chair, Kind::Sofa, Kind::Bed], most: Most::Leftmost };
    assert_eq!(wrong.truth(&apart), None);
}

#[test]
fn oracle_tools_know_what_is_asked_and_no_more() {
    let view = painted(&[
        (Kind::Chair, Colour::Red, [20., 30., 40., 70.], 2., [0.4, 0.8]),
        (Kind::Chair, Colour::Blue, [80., 30., 100., 70.], 3., [0.6, 1.2]),
        (Kind::Lamp, Colour::Red, [150., 10., 170., 90.], 4., [0.8, 3.2]),
    ]);
    let mut tools = OracleTools::new(&view);
    let mut boxes = |prompt: &str| -> Vec<f64> {
        tools.gd_detect(prompt).unwrap().into_iter().map(|d| d.bbox[0]).collect()
    };
    assert_eq!(boxes("Chairs"), [20., 80.]);
    assert_eq!(boxes("blue chair"), [80.]);
    assert_eq!(boxes("leftmost chair"), [20., 80.]);
    assert_eq!(boxes("lamp, red chair, lamp"), [150., 20.]);
    assert!(boxes("sofa").is_empty() && boxes("").is_empty());
    assert_eq!(tools.depth([80., 30., 100., 70.]), Ok(3.));
    let near_the_blue = Some([78., 28., 101., 66.]);
    let mut ask = |bbox, prompt: &str| tools.vqa(bbox, prompt).unwrap();
    assert_eq!(ask(near_the_blue, "what colour is it"), "blue");
    assert_eq!(ask(near_the_blue, "Is it red?"), "no");
    assert_eq!(ask(near_the_blue, "What is this?"), "chair");
    assert_eq!(ask(near_the_blue, "Is it a blue chair?"), "yes");
    assert_eq!(ask(near_the_blue, "Who painted it?"), "unknown");
    assert_eq!(ask(None, "How many chairs are there?"), "2");
    assert_eq!(ask(None, "Is there a sofa?"), "no");
    assert_eq!(ask(None, "How tall is the lamp in meters?"), "3.20");
    assert_eq!(ask(None, "Is the red chair to the left of the lamp?"), "yes");
    assert_eq!(ask(None, "What color is the sofa?"), "unknown");
}

#[test]
fn vlm_samples_are_answered_by_the_grammar_itself() {
    let mut rng = rng(8);
    for seed in 0..10 {
        let view = super::generate(seed, Look::LivedIn, SIZE.0, SIZE.1);
        let mut tools = OracleTools::new(&view);
        let samples = super::vqa::vqa_samples(&view, &mut rng);
        assert!(samples.iter().any(|s| s.0.is_none()) && samples.iter().any(|s| s.0.is_some()));
        for (bbox, prompt, answer) in samples {
            assert_eq!(tools.vqa(bbox, &prompt).unwrap(), answer.to_lowercase(), "{prompt}");
        }
    }
}
