//! Of several runs of a question the one that counts.

use super::{Answered, Run};
use crate::config::{Config, Reward, TieBreak};
use crate::llm::{ChatError, ChatModels};
use crate::program::Sandbox;
use crate::verify::{Judge, JudgeError, Scored, Verification};
use serde_json::Value;

/// Chooses among answers that equally many runs gave: the verifier, by the reward of each one's reply.
pub struct Referee {
    judge: Judge,
    weights: Reward,
}

impl Referee {
    /// Does a configuration want one, and is anything voted on?
    pub fn is_wanted(config: &Config) -> bool {
        config.inference.samples > 1 && config.inference.tie_break == TieBreak::Verifier
    }

    /// `None` where none is wanted.
    ///
    /// # Errors
    /// If the verifier cannot be loaded.
    pub fn load(config: &Config, chats: &ChatModels) -> anyhow::Result<Option<Self>> {
        if !Self::is_wanted(config) {
            return Ok(None);
        }
        Ok(Some(Self::new(Judge::new(chats.verifier()?, &config.verifier)?, config.reward)))
    }

    pub fn new(judge: Judge, weights: Reward) -> Self {
        Self { judge, weights }
    }

    /// The run of these whose reply earns most; of equals the first, and what the verifier says nothing readable
    /// of earns nothing. Or why its server kept silent.
    fn best(
        &self,
        question: &str,
        runs: &[Run],
        among: &[usize],
        sandbox: &mut Sandbox,
    ) -> Result<Result<usize, String>, JudgeError> {
        let reply = |i: &usize| (question, runs[*i].reply.as_ref().map_or("", |r| r.text.as_str()));
        let cases: Vec<(&str, &str)> = among.iter().map(reply).collect();
        let verification = Verification { judge: &self.judge, weights: &self.weights };
        let scored = verification.score(&cases, sandbox, |_| ())?;
        if let Some(why) = scored.iter().find_map(Scored::silence) {
            return Ok(Err(why.to_owned()));
        }
        let earned = |i: usize| scored[i].reward.unwrap_or(0.);
        // `max_by` gives the last of equals.
        let best = (0..among.len()).rev().max_by(|&a, &b| earned(a).total_cmp(&earned(b)));
        Ok(Ok(among[best.unwrap_or(0)]))
    }
}

/// The run whose answer counts: the most frequent one, by its first run. Of equally frequent answers the
/// referee's choice, or without one the first. Where no run gave an answer, the first run. A vote in which a server
/// kept silent, the referee's too, is none: it is a run with that outage, which has no result.
///
/// # Errors
/// If the referee's model fails.
pub fn elect(
    referee: Option<&Referee>,
    question: &str,
    runs: &mut [Run],
    sandbox: &mut Sandbox,
) -> Result<usize, ChatError> {
    if let Some(silent) = runs.iter().position(|r| r.outage.is_some()) {
        return Ok(silent);
    }
    let leaders = leaders(runs.iter().map(|r| &r.answered));
    let (Some(referee), [first, _, ..]) = (referee, &leaders[..]) else {
        return Ok(leaders.first().copied().unwrap_or(0));
    };
    match referee.best(question, runs, &leaders, sandbox) {
        Ok(Ok(best)) => Ok(best),
        Ok(Err(silence)) => {
            runs[*first].outage = Some(format!("the verifier: {silence}"));
            Ok(*first)
        }
        Err(JudgeError::Model(e)) => Err(e),
        Err(other) => Err(ChatError::Closed(other.to_string())),
    }
}

/// The first runs of the answers that most runs gave, in their order.
fn leaders<'a>(runs: impl IntoIterator<Item = &'a Answered>) -> Vec<usize> {
    // As benches compare: a truth value is a word, words have no case, 3 is 3.0.
    let key = |v: &Value| match v {
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        Value::String(s) => s.trim().to_lowercase(),
        Value::Number(n) => n.as_f64().map_or_else(|| n.to_string(), |x| x.to_string()),
        other => other.to_string(),
    };
    let mut counts: Vec<(String, usize, usize)> = Vec::new();
    for (i, answer) in runs.into_iter().enumerate().filter_map(|(i, r)| Some((i, key(r.value()?)))) {
        match counts.iter_mut().find(|c| c.0 == answer) {
            Some(c) => c.2 += 1,
            None => counts.push((answer, i, 1)),
        }
    }
    let most = counts.iter().map(|c| c.2).max();
    counts.iter().filter(|c| Some(c.2) == most).map(|c| c.1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::Outcome;
    use crate::program::reply::ReplyError;
    use serde_json::json;

    fn run(answer: Option<Value>) -> Answered {
        let outcome = answer.ok_or(ReplyError::NoProgram.into()).map(|a| Outcome {
            result: Ok(a),
            calls: Vec::new(),
            stdout: String::new(),
            seconds: 0.,
            interpreter: crate::program::Interpreter::Embedded,
        });
        Answered { reply: None, outcome }
    }

    #[test]
    fn the_most_frequent_answer_wins_and_failures_do_not_vote() {
        let of =
            |answers: &[Option<Value>]| leaders(&answers.iter().cloned().map(run).collect::<Vec<Answered>>());
        let yes = || Some(json!("Yes"));
        assert_eq!(of(&[None, Some(json!(3)), yes(), Some(json!(true)), None, None]), [2]);
        assert_eq!(of(&[Some(json!(2)), Some(json!(3)), Some(json!(3.0)), Some(json!(2))]), [0, 1], "a tie");
        assert!(of(&[None, None]).is_empty());
    }
}
