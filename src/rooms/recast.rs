//! Other rooms for a question: the things of a room change names and colours among one another, so that
//! what the question names is there.
//!
//! The picture then shows a chair where a sofa is called for; to [`super::OracleTools`] that is a room
//! like any other, and a program that is right for every room is right for it.

use super::spec::{Noun, Spec};
use super::truth::truth_size;
use super::{Colour, Kind, Thing, View};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};

/// How often things are picked in one room before it is given up.
const TRIES: usize = 30;

/// The room with names changed so that the question is well posed in it, if that can be had.
pub fn recast(view: &View, spec: &Spec, rng: &mut impl Rng) -> Option<View> {
    (0..TRIES).find_map(|_| once(view, spec, rng))
}

fn once(view: &View, spec: &Spec, rng: &mut impl Rng) -> Option<View> {
    let wanted = wishes(spec, rng);
    let things: Vec<&Thing> = view.things.choose_multiple(rng, wanted.len()).collect();
    if things.len() < wanted.len() {
        return None;
    }
    let pairs = || things.iter().zip(&wanted);
    let kinds = exchange(Kind::ALL, pairs().map(|(t, n)| (t.kind, n.kind)), rng)?;
    let named = pairs().filter_map(|(t, n)| Some((t.colour, n.colour?)));
    let colours = exchange(Colour::ALL, named, rng)?;
    let mut view = view.clone();
    for thing in &mut view.things {
        thing.kind = follow(&kinds, thing.kind);
        thing.colour = follow(&colours, thing.colour);
    }
    if let Spec::Size { reference, reference_dim, metres, .. } = spec {
        let own = truth_size(view.the(*reference)?, *reference_dim);
        scale(&mut view, metres / own);
    }
    spec.truth(&view).map(|_| view)
}

/// The nouns of a question; where it is about a colour, one that makes for an answer.
fn wishes(spec: &Spec, rng: &mut impl Rng) -> Vec<Noun> {
    match spec {
        Spec::IsColour { of, colour } => vec![Noun::new(*of, rng.random_bool(0.5).then_some(*colour))],
        Spec::ColourOptions { of, options } => vec![Noun::new(*of, options.choose(rng).copied())],
        // It may be that there is none.
        Spec::Count { .. } | Spec::Exists { .. } if rng.random_bool(0.4) => Vec::new(),
        _ => spec.nouns(),
    }
}

/// A permutation of `all` that holds these pairs, if there is one; the rest is left to chance.
fn exchange<T: Copy + PartialEq>(
    all: &'static [T],
    pairs: impl Iterator<Item = (T, T)>,
    rng: &mut impl Rng,
) -> Option<Vec<(T, T)>> {
    let mut held: Vec<(T, T)> = Vec::new();
    for (from, to) in pairs {
        match held.iter().find(|(f, t)| *f == from || *t == to) {
            Some(known) if *known == (from, to) => (),
            Some(_) => return None,
            None => held.push((from, to)),
        }
    }
    let from: Vec<T> = all.iter().copied().filter(|x| held.iter().all(|(f, _)| f != x)).collect();
    let mut to: Vec<T> = all.iter().copied().filter(|x| held.iter().all(|(_, t)| t != x)).collect();
    to.shuffle(rng);
    held.extend(from.into_iter().zip(to));
    Some(held)
}

fn follow<T: Copy + PartialEq>(pairs: &[(T, T)], x: T) -> T {
    pairs.iter().find(|(from, _)| *from == x).map_or(x, |(_, to)| *to)
}

/// Everything larger or smaller, which the picture does not tell.
fn scale(view: &mut View, by: f64) {
    view.camera.height *= by;
    view.depth.iter_mut().for_each(|d| *d = (f64::from(*d) * by) as f32);
    for thing in &mut view.things {
        thing.size.iter_mut().chain(&mut thing.centre).for_each(|x| *x *= by);
    }
}

#[cfg(test)]
mod tests {
    use super::super::questions::{Question, Split, scene_seed};
    use super::super::spec::{AnyNoun, Form};
    use super::super::{Look, generate};
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn every_form_finds_rooms_with_different_answers() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let views: Vec<View> =
            (0..40).map(|i| generate(scene_seed(Split::Test, 5, i), Look::Studio, 256, 192)).collect();
        for &form in Form::ALL {
            let (mut all, mut answers) = (0, Vec::new());
            for _ in 0..6 {
                let spec = loop {
                    let mut supply = ChaCha8Rng::from_rng(&mut rng);
                    if let Some(spec) = Spec::draw(form, &mut AnyNoun(&mut supply), &mut rng) {
                        break spec;
                    }
                };
                let own = answers.len();
                for view in &views {
                    let Some(view) = recast(view, &spec, &mut rng) else { continue };
                    // And its correct program finds the answer there.
                    if let Some(question) = Question::ask(&view, spec.clone(), 0) {
                        all += 1;
                        answers.push(question.answer);
                    }
                }
                answers[own..].sort_by_key(ToString::to_string);
                answers.dedup();
            }
            assert!(all >= 48, "{form:?}: {all} of 240");
            assert!(answers.len() >= 9, "{form:?}: {answers:?}");
        }
    }
}
