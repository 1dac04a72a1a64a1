//! `match` as a chain of conditions: captures become assignment expressions inside them.

use ruff_python_ast::visitor::Visitor;
use ruff_python_ast::{Pattern, Singleton, StmtMatch};
use ruff_text_size::{Ranged, TextRange};

use super::rewrite::Rewriter;

pub(super) fn rewrite(rewriter: &mut Rewriter, stmt: &StmtMatch) {
    let subject = rewriter.temporary();
    // `match x:` → `if [subject := (x)]:`, a list that is never empty, around the chain.
    let whole = rewriter.parenthesized(stmt.subject.range(), stmt.range);
    let before = TextRange::new(stmt.range.start(), whole.start());
    rewriter.edits.replace(before, format!("if [{subject} := ("));
    rewriter.edits.close(whole.end().to_usize(), ")]");
    rewriter.visit_expr(&stmt.subject);
    for (at, case) in stmt.cases.iter().enumerate() {
        let Some(mut test) = condition(rewriter, &case.pattern, &subject) else {
            return rewriter.refuse(case.pattern.range(), "this pattern");
        };
        if case.guard.is_some() {
            test.push_str(" and ");
        }
        let word = if at == 0 { "if" } else { "elif" };
        if let Some(guard) = &case.guard {
            let whole = rewriter.parenthesized(guard.range(), case.range);
            let head = TextRange::new(case.range.start(), whole.start());
            rewriter.edits.replace(head, format!("{word} {test}("));
            rewriter.edits.close(whole.end().to_usize(), ")");
            rewriter.visit_expr(guard);
        } else {
            let whole = rewriter.parenthesized(case.pattern.range(), case.range);
            let head = TextRange::new(case.range.start(), whole.end());
            rewriter.edits.replace(head, format!("{word} {test}"));
        }
        rewriter.visit_body(&case.body);
    }
}

/// An expression that is true if `pattern` matches `subject`, and binds what it captures.
fn condition(rewriter: &Rewriter, pattern: &Pattern, subject: &str) -> Option<String> {
    let all = |parts: Vec<String>| format!("({})", parts.join(" and "));
    Some(match pattern {
        Pattern::MatchValue(p) => format!("({subject} == ({}))", rewriter.text(p.value.range())),
        Pattern::MatchSingleton(p) => {
            let value = match p.value {
                Singleton::None => "None",
                Singleton::True => "True",
                Singleton::False => "False",
            };
            format!("({subject} is {value})")
        }
        Pattern::MatchAs(p) => {
            let inner = match &p.pattern {
                Some(inner) => condition(rewriter, inner, subject)?,
                None => "True".to_owned(),
            };
            match &p.name {
                Some(name) => format!("({inner} and [{} := {subject}])", name.as_str()),
                None => format!("({inner})"),
            }
        }
        Pattern::MatchOr(p) => {
            let parts: Option<Vec<_>> = p.patterns.iter().map(|p| condition(rewriter, p, subject)).collect();
            format!("({})", parts?.join(" or "))
        }
        Pattern::MatchSequence(p) => {
            let star = p.patterns.iter().position(Pattern::is_match_star);
            let fixed = p.patterns.len() - usize::from(star.is_some());
            let compare = if star.is_some() { ">=" } else { "==" };
            let mut parts = vec![
                format!("isinstance({subject}, (list, tuple))"),
                format!("len({subject}) {compare} {fixed}"),
            ];
            for (at, inner) in p.patterns.iter().enumerate() {
                match inner {
                    Pattern::MatchStar(inner) => {
                        let after = p.patterns.len() - at - 1;
                        if let Some(name) = &inner.name {
                            let end = format!("len({subject}) - {after}");
                            parts.push(format!("[{} := list({subject}[{at}:{end}])]", name.as_str()));
                        }
                    }
                    inner => {
                        let from_end = star.is_some_and(|star| at > star);
                        let index =
                            if from_end { format!("-{}", p.patterns.len() - at) } else { at.to_string() };
                        parts.push(condition(rewriter, inner, &format!("{subject}[{index}]"))?);
                    }
                }
            }
            all(parts)
        }
        Pattern::MatchMapping(p) => {
            if p.rest.is_some() {
                return None;
            }
            let mut parts = vec![format!("isinstance({subject}, dict)")];
            for (key, inner) in p.keys.iter().zip(&p.patterns) {
                let key = rewriter.text(key.range());
                parts.push(format!("({key}) in {subject}"));
                parts.push(condition(rewriter, inner, &format!("{subject}[{key}]"))?);
            }
            all(parts)
        }
        Pattern::MatchClass(p) => {
            let mut parts = vec![format!("isinstance({subject}, {})", rewriter.text(p.cls.range()))];
            match p.arguments.patterns.as_slice() {
                [] => {}
                // `str(x)` and the like match the value itself.
                [inner] => parts.push(condition(rewriter, inner, subject)?),
                _ => return None,
            }
            for keyword in &p.arguments.keywords {
                parts.push(condition(
                    rewriter,
                    &keyword.pattern,
                    &format!("{subject}.{}", keyword.attr.as_str()),
                )?);
            }
            all(parts)
        }
        Pattern::MatchStar(_) => return None,
    })
}
