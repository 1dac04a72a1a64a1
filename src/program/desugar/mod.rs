//! From a program as planners write it to one that the interpreter runs: what monty's Python lacks
//! is rewritten, in the source, to calls of a small library of our own (`prelude/*.py`), of which only
//! the parts that a program uses are put before it. Every line of the result knows the line it came
//! from, so errors carry the program's own line numbers.
//!
//! Runs in the worker, on untrusted text that [`super::guard`] has bounded. It guarantees nothing
//! about safety: a program that slips through unrewritten only meets the interpreter's gaps.

mod classes;
mod edits;
mod facts;
mod imports;
mod lazy;
mod matching;
mod prelude;
mod rewrite;
mod targets;

use std::collections::{HashMap, HashSet};

use ruff_python_ast::token::{TokenKind, Tokens};
use ruff_python_ast::{ModModule, Stmt};
use ruff_python_parser::Parsed;
use ruff_text_size::Ranged;

use super::ProgramError;
use edits::Edits;
use facts::Facts;
#[cfg(target_os = "linux")]
pub(super) use {facts::REFUSED_MODULES, rewrite::REFUSED_ATTRIBUTES};

/// The function that a rewritten program calls to ask for what no program gets.
pub(super) const REFUSE: &str = "_refuse";
/// The keyword by which a call of a tool tells its line.
pub(super) const LINE: &str = "_line";
/// Names of the library start so.
const OURS: &str = "_v_";

/// A program ready to run.
#[derive(Debug)]
pub(super) struct Prepared {
    pub code: String,
    /// The source line of each line of `code`, 0 where it is not the program's.
    lines: Vec<u32>,
    /// Source lines that a `raise` of the program covers.
    raises: HashSet<u32>,
    /// It can end itself before its end.
    pub exits: bool,
    /// Source lines that name an attribute which no program gets.
    reaching: HashSet<u32>,
    /// The last line of `code`, which reads `final_answer`.
    tail: u32,
    /// Names that stand for modules no program gets.
    pub refused: HashSet<String>,
    /// The program's own exception classes, by the builtin that stands for each.
    exceptions: HashMap<String, String>,
}

impl Prepared {
    /// The program's line for a line of `code`.
    pub fn line(&self, line: u32) -> Option<u32> {
        let index = (line as usize).checked_sub(1)?;
        self.lines.get(index).copied().filter(|&source| source > 0)
    }

    /// Is there a `raise` of the program on that line of `code`?
    pub fn raises(&self, line: u32) -> bool {
        self.line(line).is_some_and(|source| self.raises.contains(&source))
    }

    /// Does that line of the program name an attribute which no program gets?
    pub fn reaches_out(&self, source_line: u32) -> bool {
        self.reaching.contains(&source_line)
    }

    pub fn is_tail(&self, line: u32) -> bool {
        line == self.tail
    }

    /// An exception's name as the program knows it.
    pub fn own_name(&self, builtin: &str) -> String {
        self.exceptions.get(builtin).map_or_else(|| builtin.to_owned(), Clone::clone)
    }
}

/// The line, from 1, of a byte offset.
pub(super) fn line_of(source: &str, offset: usize) -> u32 {
    1 + source.as_bytes()[..offset.min(source.len())].iter().filter(|&&b| b == b'\n').count() as u32
}

/// Parses text that [`super::guard::check`] has passed.
///
/// # Errors
/// A `SyntaxError` with its line.
pub(super) fn parse(source: &str) -> Result<Parsed<ModModule>, ProgramError> {
    ruff_python_parser::parse_module(source).map_err(|e| {
        let at = e.location.start().to_usize();
        // At the end of the text the last line is meant, not the one after it.
        let line = line_of(source, at.min(source.trim_end().len()));
        ProgramError::syntax(Some(line), e.error.to_string())
    })
}

/// Makes a program ready to run.
///
/// # Errors
/// A syntax error, or Python that the executor knows that it does not run.
pub(super) fn prepare(source: &str) -> Result<Prepared, ProgramError> {
    let parsed = parse(source)?;
    let body = parsed.suite();
    let facts = Facts::collect(source, body);
    let mut edits = Edits::default();
    rewrite::rewrite(source, parsed.tokens(), &facts, body, &mut edits)?;
    let wrap = facts.wrapped();
    if wrap {
        indent(source, parsed.tokens(), &mut edits);
    }

    let mut lines = Vec::new();
    let program = edits.apply(source, &mut lines);
    let mut code = String::new();
    if facts.implicit_math {
        code.push_str("import math\n");
    }
    prelude::add(&program, &facts.bound, &mut code);
    if wrap {
        // Everything that the program binds stays global, as it is without the wrapping: a closure's
        // `nonlocal` names are the exception.
        code.push_str("def _v_program():\n");
        let theirs = |n: &&str| !facts.nonlocals.contains(n) || facts.globals.contains(n);
        let mut names: Vec<&str> = facts.top.iter().copied().filter(theirs).collect();
        names.push("final_answer");
        names.sort_unstable();
        names.dedup();
        code.push_str(&format!(" global {}\n", names.join(", ")));
    }
    let mut all: Vec<u32> = vec![0; code.bytes().filter(|&b| b == b'\n').count()];
    code.push_str(&program);
    all.append(&mut lines);
    if wrap {
        code.push_str("\n pass\n_v_program()");
        all.extend([0, 0]);
    }
    code.push_str("\nfinal_answer\n");
    all.push(0);
    Ok(Prepared {
        tail: all.len() as u32,
        code,
        lines: all,
        raises: facts.raises,
        exits: !facts.exits.is_empty(),
        reaching: rewrite::reaching_lines(source),
        refused: facts.refused.iter().map(|name| (*name).to_owned()).collect(),
        exceptions: facts
            .exceptions
            .iter()
            .map(|(class, builtin)| ((*builtin).to_owned(), (*class).to_owned()))
            .collect(),
    })
}

/// One blank before each line, but not inside a string.
fn indent(source: &str, tokens: &Tokens, edits: &mut Edits) {
    let mut inside = vec![];
    let mut open = vec![];
    for token in tokens.iter() {
        match token.kind() {
            TokenKind::String => inside.push(token.range()),
            TokenKind::FStringStart | TokenKind::TStringStart => open.push(token.start()),
            TokenKind::FStringEnd | TokenKind::TStringEnd => {
                if let Some(start) = open.pop() {
                    inside.push(ruff_text_size::TextRange::new(start, token.end()));
                }
            }
            _ => {}
        }
    }
    inside.sort_by_key(|range| range.start());
    let mut strings = inside.iter().peekable();
    let mut at = 0;
    for line in source.split_inclusive('\n') {
        while strings.peek().is_some_and(|range| range.end().to_usize() <= at) {
            strings.next();
        }
        let within = strings.peek().is_some_and(|range| range.start().to_usize() < at);
        if !within && !line.trim().is_empty() {
            edits.indent(at);
        }
        at += line.len();
    }
}

/// The blanks before a statement as they will be, if nothing else stands before it on its line.
fn indentation(source: &str, facts: &Facts, stmt: &Stmt) -> Option<String> {
    let start = stmt.range().start().to_usize();
    let line = source[..start].rfind('\n').map_or(0, |at| at + 1);
    let before = &source[line..start];
    let margin = if facts.wrapped() { " " } else { "" };
    before.trim().is_empty().then(|| format!("{margin}{before}"))
}
