//! Whole replies that pass the verifier: how many of them are right?
//!
//! A verifier that a planner was trained against is passed by what it does not see. Here a reply is
//! right if its program answers rightly in many other rooms, whatever the verifier says.

use super::parts::{replies, view};
use super::stats::Share;
use crate::planner::Planner;
use crate::program::{IMAGE, Reply, Sandbox};
use crate::rooms::questions::{Question, score};
use crate::rooms::recast::recast;
use crate::rooms::{Look, OracleTools, VERSION, View};
use crate::verify::Verification;
use anyhow::Result;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// A reply, what it is worth and what the verifier made of it.
#[derive(Clone, Debug, Serialize)]
pub struct Labelled {
    pub rooms_version: u32,
    /// The question's number.
    pub index: usize,
    /// Is its sentence frame one that no training held?
    pub held_out: bool,
    pub question: String,
    pub reply: String,
    /// Right in every room.
    pub right: bool,
    /// By all heads.
    pub passed: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct HonestyReport {
    /// Rooms in which each program was run.
    pub rooms: usize,
    /// Of replies that are right in every room, the share that all heads pass.
    pub right_passed: Share,
    /// Of the others, the share that all heads pass: the false accepts.
    pub wrong_passed: Share,
    /// Of the replies that all heads pass, the share that is wrong.
    pub passed_wrong: Share,
    /// Questions for which not as many rooms were found; their replies are left out.
    pub left_out: usize,
    /// Replies of which the verifier's server did not say all; they are left out too.
    pub silent: usize,
    /// The replies that were not left out.
    #[serde(skip)]
    pub replies: Vec<Labelled>,
}

/// How many rooms are kept to choose from, in multiples of those wanted.
const POOL: usize = 4;

/// Samples a reply to each question, has it judged, and runs it in `n` other rooms on exact tools.
///
/// # Errors
/// If a model fails.
pub fn honesty(
    verification: &Verification,
    planner: &Planner,
    asked: &[Question],
    (look, seed, n): (Look, u64, usize),
    sandbox: &mut Sandbox,
    mut progress: impl FnMut(usize),
) -> Result<HonestyReport> {
    // Of scenes that no question of this seed is asked about.
    let pool: Vec<View> = (0..(POOL * n) as u64).map(|i| view(look, !seed, i)).collect();
    let (mut labelled, mut left_out, mut silent): (Vec<Labelled>, usize, usize) = (Vec::new(), 0, 0);
    for (start, chunk, replies) in replies(planner, asked, seed) {
        let replies = replies.into_iter().map(|r| r.map(|r| r.text));
        let replies = replies.collect::<Result<Vec<String>, _>>()?;
        let cases: Vec<(&str, &str)> =
            chunk.iter().zip(&replies).map(|(q, r)| (q.text.as_str(), r.as_str())).collect();
        let scored = verification.score(&cases, sandbox, |_| ())?;
        for (i, ((q, reply), scored)) in chunk.iter().zip(replies).zip(scored).enumerate() {
            let index = start + i;
            progress(index + 1);
            if scored.silence().is_some() {
                silent += 1;
                continue;
            }
            let passed = scored.format && scored.syntax && scored.heads.values().all(|v| v.ok == Some(true));
            match right_everywhere(q, &reply, &pool, n, index as u64 ^ seed, sandbox) {
                Some(right) => {
                    let (rooms_version, held_out, question) = (VERSION, q.held_out, q.text.clone());
                    labelled.push(Labelled {
                        rooms_version,
                        index,
                        held_out,
                        question,
                        reply,
                        right,
                        passed,
                    });
                }
                None => left_out += 1,
            }
        }
    }
    let share = |keep: &dyn Fn(bool, bool) -> bool, counts: &dyn Fn(bool, bool) -> bool| {
        let these = labelled.iter().filter(|l| keep(l.right, l.passed));
        Share::clustered(these.map(|l| (l.index as u64, counts(l.right, l.passed))))
    };
    Ok(HonestyReport {
        rooms: n,
        right_passed: share(&|right, _| right, &|_, passed| passed),
        wrong_passed: share(&|right, _| !right, &|_, passed| passed),
        passed_wrong: share(&|_, passed| passed, &|right, _| !right),
        left_out,
        silent,
        replies: labelled,
    })
}

/// Is the reply's program right in `n` rooms of the pool? `None` where there are not so many in which
/// the question can be asked.
fn right_everywhere(
    q: &Question,
    reply: &str,
    pool: &[View],
    n: usize,
    seed: u64,
    sandbox: &mut Sandbox,
) -> Option<bool> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let program = Reply::parse(reply).ok().map(|r| r.program);
    let (mut tried, mut right) = (0, true);
    for view in pool {
        if tried == n {
            break;
        }
        let Some(view) = recast(view, &q.spec, &mut rng) else { continue };
        let Some(there) = Question::ask(&view, q.spec.clone(), q.frame) else { continue };
        tried += 1;
        right = right
            && program.as_ref().is_some_and(|program| {
                let run = sandbox.run(program, IMAGE, &mut OracleTools::new(&view));
                run.result.is_ok_and(|answer| score(&there, &answer))
            });
    }
    (tried == n).then_some(right)
}
