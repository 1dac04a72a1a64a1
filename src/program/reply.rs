//! The planner's reply: a plan, then a program (method.md 2 and 3).
//!
//! [`Reply::parse_strict`] is the format head of the reward: exactly one plan block, then exactly one
//! answer block, nothing else but blanks. [`Reply::parse`] also takes the near misses that inference,
//! evaluation and mining accept, and says in [`Reply::flags`] what was irregular. Both read the text
//! once, by tag; nothing in it is interpreted.

use serde::{Deserialize, Serialize};

/// Longest reply that is read, bytes; 16,384 tokens are about 80 KB.
pub const MAX_REPLY: usize = 1 << 20;

/// A parsed reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reply {
    pub plan: Option<String>,
    /// Python source, without its fence.
    pub program: String,
    /// What was irregular; empty for a reply that the format head accepts.
    pub flags: Vec<Flag>,
}

/// An irregularity that the lenient form forgives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flag {
    /// There is no plan block.
    NoPlan,
    /// The plan block is not closed.
    PlanNotClosed,
    /// There is no answer block: the program is the one code fence.
    NoAnswerBlock,
    /// The answer block is not closed.
    AnswerNotClosed,
    /// The code fence is not closed.
    FenceNotClosed,
    /// Text stands outside the blocks.
    TextOutside,
}

/// Why a reply holds no program that could be run, or is not in the strict form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    #[error("the reply is longer than {MAX_REPLY} bytes")]
    TooLong,
    #[error("the reply holds no <answer> block and no code fence")]
    NoProgram,
    #[error("the reply's program is empty")]
    EmptyProgram,
    #[error("the reply holds more than one <{0}> block")]
    Several(&'static str),
    #[error("the reply holds several code fences and no <answer> block")]
    SeveralFences,
    #[error("the reply has no {0}")]
    Missing(&'static str),
    #[error("text stands outside the two blocks")]
    TextOutside,
    #[error("the plan comes after the answer")]
    Order,
    #[error("the plan is empty")]
    EmptyPlan,
    #[error("the code fence is not closed")]
    FenceNotClosed,
}

const PLAN: (&str, &str) = ("<plan>", "</plan>");
const ANSWER: (&str, &str) = ("<answer>", "</answer>");

fn count(text: &str, tag: &str) -> usize {
    text.matches(tag).count()
}

impl Reply {
    /// The format head: exactly one plan block, then exactly one answer block, each with something
    /// in it, and nothing outside but blanks. Tags are counted in the whole reply: a second one
    /// inside a block is a duplicate too (method.md 10.5).
    ///
    /// # Errors
    /// The first way in which the reply is not of that form.
    pub fn parse_strict(text: &str) -> Result<Self, ReplyError> {
        if text.len() > MAX_REPLY {
            return Err(ReplyError::TooLong);
        }
        for (tag, name) in [(PLAN.0, "plan"), (PLAN.1, "plan"), (ANSWER.0, "answer"), (ANSWER.1, "answer")] {
            match count(text, tag) {
                0 => {
                    return Err(ReplyError::Missing(if tag.starts_with("</") {
                        closing(name)
                    } else {
                        opening(name)
                    }));
                }
                1 => {}
                _ => return Err(ReplyError::Several(name)),
            }
        }
        let (before, rest) = text.split_once(PLAN.0).ok_or(ReplyError::Missing("plan"))?;
        let (plan, rest) = rest.split_once(PLAN.1).ok_or(ReplyError::Order)?;
        let (between, rest) = rest.split_once(ANSWER.0).ok_or(ReplyError::Order)?;
        let (answer, after) = rest.split_once(ANSWER.1).ok_or(ReplyError::Order)?;
        if plan.contains(ANSWER.0) || plan.contains(ANSWER.1) {
            return Err(ReplyError::Order);
        }
        if [before, between, after].iter().any(|part| !part.trim().is_empty()) {
            return Err(ReplyError::TextOutside);
        }
        if plan.trim().is_empty() {
            return Err(ReplyError::EmptyPlan);
        }
        let (program, fence) = unfence(answer);
        match fence {
            Fence::Open => return Err(ReplyError::FenceNotClosed),
            Fence::TextAround => return Err(ReplyError::TextOutside),
            Fence::None | Fence::Closed => {}
        }
        if program.trim().is_empty() {
            return Err(ReplyError::EmptyProgram);
        }
        Ok(Self { plan: Some(plan.trim().to_owned()), program, flags: vec![] })
    }

    /// The strict form, and also: an answer block or one code fence without a plan, a missing
    /// closing tag, text outside. What was irregular is in [`Reply::flags`].
    ///
    /// # Errors
    /// If there is no program, or more than one that could be meant.
    pub fn parse(text: &str) -> Result<Self, ReplyError> {
        if text.len() > MAX_REPLY {
            return Err(ReplyError::TooLong);
        }
        if let Ok(reply) = Self::parse_strict(text) {
            return Ok(reply);
        }
        for (tag, name) in [(PLAN.0, "plan"), (ANSWER.0, "answer"), (ANSWER.1, "answer")] {
            if count(text, tag) > 1 {
                return Err(ReplyError::Several(name));
            }
        }
        let mut flags = vec![];
        let (head, body, mut outside) = match text.split_once(ANSWER.0) {
            Some((head, rest)) => match rest.split_once(ANSWER.1) {
                Some((body, after)) => (head, body, !after.trim().is_empty()),
                None => {
                    flags.push(Flag::AnswerNotClosed);
                    (head, rest, false)
                }
            },
            None => {
                flags.push(Flag::NoAnswerBlock);
                let (head, fenced, after) = only_fence(text)?;
                (head, fenced, !after.trim().is_empty())
            }
        };
        let plan = match head.split_once(PLAN.0) {
            None => {
                flags.push(Flag::NoPlan);
                outside |= !head.trim().is_empty();
                None
            }
            Some((before, rest)) => {
                let (plan, after) = rest.split_once(PLAN.1).unwrap_or_else(|| {
                    flags.push(Flag::PlanNotClosed);
                    (rest, "")
                });
                outside |= !before.trim().is_empty() || !after.trim().is_empty();
                Some(plan.trim().to_owned())
            }
        };
        let (program, fence) = unfence(body);
        match fence {
            Fence::Open => flags.push(Flag::FenceNotClosed),
            Fence::TextAround => outside = true,
            Fence::None | Fence::Closed => {}
        }
        if outside {
            flags.push(Flag::TextOutside);
        }
        if program.trim().is_empty() {
            return Err(ReplyError::EmptyProgram);
        }
        Ok(Self { plan, program, flags })
    }
}

fn opening(name: &str) -> &'static str {
    if name == "plan" { "<plan>" } else { "<answer>" }
}

fn closing(name: &str) -> &'static str {
    if name == "plan" { "</plan>" } else { "</answer>" }
}

enum Fence {
    None,
    Closed,
    Open,
    TextAround,
}

/// Byte ranges of the lines that are Markdown code fences: at most three blanks, three backticks, a
/// word.
fn fence_lines(text: &str) -> Vec<(usize, usize)> {
    let mut found = vec![];
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let bare = line.trim_end();
        let indent = bare.len() - bare.trim_start_matches(' ').len();
        let word = bare[indent..].strip_prefix("```");
        if indent < 4 && word.is_some_and(|word| word.chars().all(|c| c.is_alphanumeric())) {
            found.push((at, at + line.len()));
        }
        at += line.len();
    }
    found
}

/// The program inside an answer block: without its fence if it has one around it.
fn unfence(body: &str) -> (String, Fence) {
    let lines = fence_lines(body);
    let clean = |text: &str| text.trim_matches('\n').trim_end().to_owned();
    match lines.as_slice() {
        [] => (clean(body), Fence::None),
        [open, rest @ ..] => {
            let blank = |text: &str| text.trim().is_empty();
            let (end, fence) = match rest {
                [] => (body.len(), if blank(&body[..open.0]) { Fence::Open } else { Fence::TextAround }),
                [.., close] => {
                    let alone = rest.len() == 1 && blank(&body[..open.0]) && blank(&body[close.1..]);
                    // Of several fences only the first holds the program.
                    (rest[0].0, if alone { Fence::Closed } else { Fence::TextAround })
                }
            };
            (clean(&body[open.1..end]), fence)
        }
    }
}

/// A reply without answer tags: what stands before, in (with its lines) and after its one fence.
fn only_fence(text: &str) -> Result<(&str, &str, &str), ReplyError> {
    let lines = fence_lines(text);
    match lines.as_slice() {
        [] => Err(ReplyError::NoProgram),
        [open] => Ok((&text[..open.0], &text[open.0..], "")),
        [open, close] => Ok((&text[..open.0], &text[open.0..close.1], &text[close.1..])),
        _ => Err(ReplyError::SeveralFences),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "<plan>\n1. look\n</plan>\n<answer>\n```python\nfinal_answer = 1\n```\n</answer>\n";

    #[test]
    fn the_strict_form() {
        let reply = Reply::parse_strict(GOOD).unwrap();
        assert_eq!(reply.plan.as_deref(), Some("1. look"));
        assert_eq!(reply.program, "final_answer = 1");
        assert_eq!(Reply::parse(GOOD).unwrap(), reply);
        let bare = GOOD.replace("```python\n", "").replace("```\n", "");
        assert_eq!(Reply::parse_strict(&bare).unwrap().program, "final_answer = 1");
    }

    /// Text outside the blocks and duplicate blocks are seen, and fail the format head.
    #[test]
    fn defect_10_5_text_outside_and_duplicates() {
        use ReplyError as E;
        let cases = [
            (format!("Sure! {GOOD}"), E::TextOutside),
            (format!("{GOOD} Hope it helps."), E::TextOutside),
            (GOOD.replace("</plan>", "</plan> so"), E::TextOutside),
            (format!("{GOOD}{GOOD}"), E::Several("plan")),
            (format!("{GOOD}<answer>x = 1</answer>"), E::Several("answer")),
            (GOOD.replace("1. look", "<answer>"), E::Several("answer")),
            (GOOD.replace("<plan>", ""), E::Missing("<plan>")),
            (GOOD.replace("</answer>", ""), E::Missing("</answer>")),
            (GOOD.replace("1. look", " "), E::EmptyPlan),
            (GOOD.replace("final_answer = 1", ""), E::EmptyProgram),
            (GOOD.replace("\n```\n", "\n"), E::FenceNotClosed),
            (GOOD.replace("```python", "Here:\n```python"), E::TextOutside),
            ("<answer>x</answer><plan>y</plan>".to_owned(), E::Order),
        ];
        for (text, error) in cases {
            assert_eq!(Reply::parse_strict(&text), Err(error), "{text}");
        }
    }

    #[test]
    fn the_lenient_form_says_what_was_irregular() {
        use Flag as F;
        let cases: [(&str, &[Flag]); 6] = [
            ("<answer>x = 1</answer>", &[F::NoPlan]),
            ("```py\nx = 1\n```", &[F::NoAnswerBlock, F::NoPlan]),
            ("Well:\n```\nx = 1", &[F::NoAnswerBlock, F::NoPlan, F::FenceNotClosed, F::TextOutside]),
            ("<plan>p</plan><answer>\nx = 1\n", &[F::AnswerNotClosed]),
            ("<plan>p<answer>\nx = 1\n</answer>", &[F::PlanNotClosed]),
            ("ok <plan>p</plan><answer>x = 1</answer>", &[F::TextOutside]),
        ];
        for (text, flags) in cases {
            let reply = Reply::parse(text).unwrap();
            assert_eq!((reply.program.as_str(), reply.flags.as_slice()), ("x = 1", flags), "{text}");
        }
        for text in [
            "",
            "no program",
            "<answer></answer>",
            "```\na\n```\n```\nb\n```",
            "<answer>a</answer><answer>b</answer>",
        ] {
            assert!(Reply::parse(text).is_err(), "{text}");
        }
        assert_eq!(Reply::parse(&"x".repeat(MAX_REPLY + 1)), Err(ReplyError::TooLong));
    }

    #[test]
    fn a_fence_inside_a_string_of_the_program_is_left_alone() {
        let text = "<plan>p</plan><answer>x = '``` a b'\ny = 2</answer>";
        assert_eq!(Reply::parse_strict(text).unwrap().program, "x = '``` a b'\ny = 2");
    }
}
