//! The plan's wording of a [`Recipe`], and its reading back.

use super::Colour;
use super::recipe::{Fallback, Find, Measure, Recipe, Then, VARS};
use super::spec::More;
use super::template::{fill, read};

const FIND: &str = "Detect \"{prompt}\" as {var}.";
const FIND_COLOUR: &str = "Detect \"{prompt}\" as {var} and keep the {colour} ones.";
const RANK: &str = "Detect {names} and measure the {measure} of each.";
const WHOLE: &str = "If anything is missing, ask \"{prompt}\" about the whole image.";
const OTHER: &str = "If one is missing, answer the other, \"{a}\" or \"{b}\".";
const PICK: &str = "Take the one of first with the {best} {measure}.";
const COUNT: &str = "Count first.";
const EXISTS: &str = "Answer \"yes\" if there is a first, else \"no\".";
const ASK: &str = "Ask \"{prompt}\" about it.";
const PAIR: &str = "Answer \"{yes}\" if its {measure} is {less} than that of second, else \"{no}\".";
const RATIO: &str = "Multiply {metres} by the {second} of second over the {first} of first.";
const COMPARE: &str = "Answer \"yes\" if first has {more} than second, else \"no\".";
const RANKED: &str = "Answer the one with the {best}.";
const COUNT_IF: &str = "Count those of first whose {measure} is {less} than that of second.";
const LITERAL: &str = "Answer {answer}.";

fn less(less: bool) -> String {
    if less { "smaller" } else { "larger" }.to_owned()
}

fn best(smallest: bool) -> String {
    if smallest { "smallest" } else { "largest" }.to_owned()
}

/// What a slot may hold. Prompts and names are free of quotes, which ends them.
fn accept(slot: &str, held: &str) -> bool {
    match slot {
        "var" => VARS.contains(&held),
        "colour" => Colour::from_word(held).is_some(),
        "measure" => Measure::parse(held).is_some(),
        "first" | "second" => Measure::parse(held).is_some(),
        "less" => matches!(held, "smaller" | "larger"),
        "best" => matches!(held, "smallest" | "largest"),
        "more" => More::parse(held).is_some(),
        "metres" => held.parse::<f64>().is_ok_and(f64::is_finite),
        "names" => held.starts_with('"') && held.ends_with('"') && held.len() > 2,
        "answer" => serde_json::from_str::<serde_json::Value>(held).is_ok(),
        _ => !held.contains('"'),
    }
}

/// The values of a line's slots, in order, if the line follows the template.
fn slots<'t>(template: &'static str, line: &'t str) -> Option<Vec<&'t str>> {
    // Rebound: `read` ties the template's lifetime to the text's.
    let template: &'t str = template;
    read(template, line, &accept).map(|slots| slots.into_iter().map(|(_, held)| held).collect())
}

impl Recipe {
    /// Numbered steps, one a line.
    pub fn plan(&self) -> String {
        let lines = self.steps();
        let numbered: Vec<String> =
            lines.iter().enumerate().map(|(i, l)| format!("{}. {l}", i + 1)).collect();
        numbered.join("\n")
    }

    fn steps(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (find, var) in self.finds.iter().zip(VARS) {
            let template = if find.colour.is_some() { FIND_COLOUR } else { FIND };
            lines.push(fill(template, |slot| match slot {
                "prompt" => find.prompt.clone(),
                "var" => var.to_owned(),
                _ => find.colour.map(|c| c.to_string()).unwrap_or_default(),
            }));
        }
        if let Then::Rank { names, measure, .. } = &self.then {
            let names: Vec<String> = names.iter().map(|n| format!("\"{n}\"")).collect();
            lines.push(fill(RANK, |slot| match slot {
                "names" => names.join(", "),
                _ => measure.name().to_owned(),
            }));
        }
        match &self.fallback {
            Some(Fallback::Whole { prompt }) => lines.push(fill(WHOLE, |_| prompt.clone())),
            Some(Fallback::Other { a, b }) => {
                lines.push(fill(OTHER, |slot| if slot == "a" { a.clone() } else { b.clone() }));
            }
            None => {}
        }
        if let Some((measure, smallest)) = self.pick {
            lines.push(fill(
                PICK,
                |slot| if slot == "best" { best(smallest) } else { measure.name().to_owned() },
            ));
        }
        lines.push(match &self.then {
            Then::Count => COUNT.to_owned(),
            Then::Exists => EXISTS.to_owned(),
            Then::Ask { prompt } => fill(ASK, |_| prompt.clone()),
            Then::Pair { measure, less: l, yes, no } => fill(PAIR, |slot| match slot {
                "yes" => yes.clone(),
                "no" => no.clone(),
                "less" => less(*l),
                _ => measure.name().to_owned(),
            }),
            Then::Ratio { first, second, metres } => fill(RATIO, |slot| match slot {
                "metres" => metres.to_string(),
                "first" => first.name().to_owned(),
                _ => second.name().to_owned(),
            }),
            Then::CompareCounts { more } => fill(COMPARE, |_| more.text().to_owned()),
            Then::Rank { smallest, .. } => fill(RANKED, |_| best(*smallest)),
            Then::CountIf { measure, less: l } => {
                fill(COUNT_IF, |slot| if slot == "less" { less(*l) } else { measure.name().to_owned() })
            }
            Then::Literal { answer } => fill(LITERAL, |_| answer.to_string()),
        });
        lines
    }

    /// Reads a plan that follows the wording of [`Self::plan`] to the letter; `None` for any
    /// other text.
    pub fn from_plan(plan: &str) -> Option<Self> {
        let mut recipe = Self { finds: Vec::new(), fallback: None, pick: None, then: Then::Count };
        let mut ranked: Option<(Vec<String>, Measure)> = None;
        let mut then = None;
        for (i, line) in plan.trim().lines().enumerate() {
            let line = line.trim().strip_prefix(&format!("{}. ", i + 1))?;
            if then.is_some() {
                return None;
            }
            if let Some(s) = slots(FIND, line).or_else(|| slots(FIND_COLOUR, line)) {
                if VARS.get(recipe.finds.len()) != Some(&s[1]) {
                    return None;
                }
                let colour = s.get(2).and_then(|c| Colour::from_word(c));
                recipe.finds.push(Find { prompt: s[0].to_owned(), colour });
            } else if let Some(s) = slots(RANK, line) {
                let names = s[0].trim_matches('"').split("\", \"").map(str::to_owned).collect();
                ranked = Some((names, Measure::parse(s[1])?));
            } else if let Some(s) = slots(WHOLE, line) {
                recipe.fallback = Some(Fallback::Whole { prompt: s[0].to_owned() });
            } else if let Some(s) = slots(OTHER, line) {
                recipe.fallback = Some(Fallback::Other { a: s[0].to_owned(), b: s[1].to_owned() });
            } else if let Some(s) = slots(PICK, line) {
                recipe.pick = Some((Measure::parse(s[1])?, s[0] == "smallest"));
            } else {
                then = Some(Self::last_step(line, ranked.take())?);
            }
        }
        recipe.then = then?;
        // The same plan in another order, or with steps that lead nowhere, is another plan.
        (recipe.plan() == plan.trim()).then_some(recipe)
    }

    fn last_step(line: &str, ranked: Option<(Vec<String>, Measure)>) -> Option<Then> {
        if let Some((names, measure)) = ranked {
            let s = slots(RANKED, line)?;
            return Some(Then::Rank { names, measure, smallest: s[0] == "smallest" });
        }
        Some(if line == COUNT {
            Then::Count
        } else if line == EXISTS {
            Then::Exists
        } else if let Some(s) = slots(ASK, line) {
            Then::Ask { prompt: s[0].to_owned() }
        } else if let Some(s) = slots(PAIR, line) {
            Then::Pair {
                yes: s[0].to_owned(),
                measure: Measure::parse(s[1])?,
                less: s[2] == "smaller",
                no: s[3].to_owned(),
            }
        } else if let Some(s) = slots(RATIO, line) {
            let (second, first) = (Measure::parse(s[1])?, Measure::parse(s[2])?);
            Then::Ratio { metres: s[0].parse().ok()?, first, second }
        } else if let Some(s) = slots(COMPARE, line) {
            Then::CompareCounts { more: More::parse(s[0])? }
        } else if let Some(s) = slots(COUNT_IF, line) {
            Then::CountIf { measure: Measure::parse(s[0])?, less: s[1] == "smaller" }
        } else {
            Then::Literal { answer: serde_json::from_str(slots(LITERAL, line)?[0]).ok()? }
        })
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::rooms::spec::{AnyNoun, Form, Spec};

    #[test]
    fn plans_read_back_and_nothing_else_does() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for form in Form::ALL {
            let mut read = 0;
            for _ in 0..50 {
                let mut supply = ChaCha8Rng::seed_from_u64(rand::Rng::random(&mut rng));
                let Some(spec) = Spec::draw(*form, &mut AnyNoun(&mut supply), &mut rng) else { continue };
                let recipe = spec.recipe();
                let plan = recipe.plan();
                assert_eq!(Recipe::from_plan(&plan).as_ref(), Some(&recipe), "{plan}");
                assert_eq!(Recipe::from_plan(&plan.replace("1. ", "2. ")), None);
                assert_eq!(Recipe::from_plan(&format!("{plan}\nThe answer is 2.")), None);
                read += 1;
            }
            assert!(read > 10, "{form:?}");
        }
        assert_eq!(Recipe::from_plan(""), None);
    }
}
