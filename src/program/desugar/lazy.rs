//! `any`, `all` and `next` of a generator expression ask for no more items than Python's do. The interpreter
//! makes a list of the items first, which for a condition that calls a tool means calls that the program does
//! not make, and errors of items that it never comes to.
//!
//! `any(E for a in A if C for b in B)` becomes
//! `_v_any(lambda a, b: (E), A, (False, lambda a: (C)), (True, lambda a: (B)))`.

use ruff_python_ast::token::TokenKind;
use ruff_python_ast::visitor::{self, Visitor};
use ruff_python_ast::{Comprehension, Expr, ExprCall, ExprGenerator};
use ruff_text_size::{Ranged, TextRange, TextSize};

use super::OURS;
use super::rewrite::Rewriter;

/// Rewrites such a call; whether it was one.
pub(super) fn call(rewriter: &mut Rewriter, name: &str, call: &ExprCall) -> bool {
    let (generator, default) = match &*call.arguments.args {
        [Expr::Generator(g)] => (g, None),
        [Expr::Generator(g), default] if name == "next" && !default.is_starred_expr() => (g, Some(default)),
        _ => return false,
    };
    if !call.arguments.keywords.is_empty() || !plain(generator) {
        return false;
    }
    let one = TextSize::new(1);
    let within = TextRange::new(call.arguments.start() + one, call.arguments.end() - one);
    if generator.parenthesized && rewriter.parenthesized(generator.range, within) != generator.range {
        return false;
    }
    let Some(marks) = marks(rewriter, generator) else { return false };
    rewriter.edits.replace(call.func.range(), format!("{OURS}{name}"));
    let (start, end) = (generator.range.start(), generator.range.end());
    if generator.parenthesized {
        rewriter.edits.replace(TextRange::new(start, start + one), "");
        rewriter.edits.replace(TextRange::new(end - one, end), "");
    }
    let element = rewriter.parenthesized(generator.elt.range(), generator.range);
    let loops = &generator.generators;
    let (open, mut close) = lambda(rewriter, loops);
    rewriter.edits.open(element.start().to_usize(), open);
    let mut marks = marks.into_iter();
    for (at, part) in loops.iter().enumerate() {
        let Some(in_) = marks.next() else { return true };
        if at == 0 {
            rewriter.edits.replace(in_, format!("{close}, "));
            close.clear();
        } else {
            let (open, end) = lambda(rewriter, &loops[..at]);
            rewriter.edits.replace(in_, format!("{close}, (True, {open}"));
            close = format!("{end})");
        }
        for _ in &part.ifs {
            let Some(if_) = marks.next() else { return true };
            let (open, end) = lambda(rewriter, &loops[..=at]);
            rewriter.edits.replace(if_, format!("{close}, (False, {open}"));
            close = format!("{end})");
        }
    }
    let end = if generator.parenthesized { end - one } else { end };
    rewriter.edits.close(end.to_usize(), close);
    if let Some(default) = default {
        let whole = rewriter.parenthesized(default.range(), call.arguments.range);
        rewriter.edits.open(whole.start().to_usize(), "default=");
    }
    true
}

/// The stretches `for … in` and `if` of a generator expression, in their order.
fn marks(rewriter: &Rewriter, generator: &ExprGenerator) -> Option<Vec<TextRange>> {
    let mut marks = vec![];
    let mut at = generator.elt.end();
    // What is looked for is the first of its kind: only closing parentheses and comments come before it.
    let token = |from: TextSize, to: TextSize, kind: TokenKind| {
        let tokens = rewriter.tokens.in_range(TextRange::new(from, to));
        tokens.iter().find(|t| t.kind() == kind).map(Ranged::range)
    };
    for part in &generator.generators {
        let for_ = token(at, part.target.start(), TokenKind::For)?;
        let in_ = token(part.target.end(), part.iter.start(), TokenKind::In)?;
        marks.push(TextRange::new(for_.start(), in_.end()));
        at = part.iter.end();
        for test in &part.ifs {
            marks.push(token(at, test.start(), TokenKind::If)?);
            at = test.end();
        }
    }
    Some(marks)
}

/// What stands before and after the body of a function of the loops' variables.
fn lambda(rewriter: &mut Rewriter, loops: &[Comprehension]) -> (String, String) {
    let mut names = vec![];
    loops.iter().for_each(|part| targets(&part.target, &mut names));
    // Of equal names, `_` mostly, the last is the one that is read.
    let mut left = names.len();
    let mut fresh = |rewriter: &mut Rewriter, name: &str| {
        left -= 1;
        let later = &names[names.len() - left..];
        if later.contains(&name) { rewriter.temporary() } else { name.to_owned() }
    };
    let (mut parameters, mut open, mut close) = (vec![], String::new(), String::new());
    for part in loops {
        parameters.push(parameter(rewriter, &part.target, &mut fresh, &mut open, &mut close));
    }
    (format!("lambda {}: {open}(", parameters.join(", ")), format!("){close}"))
}

/// The parameter that a target becomes; what takes it apart goes into `open` and `close`.
fn parameter(
    rewriter: &mut Rewriter,
    target: &Expr,
    fresh: &mut impl FnMut(&mut Rewriter, &str) -> String,
    open: &mut String,
    close: &mut String,
) -> String {
    let parts = match target {
        Expr::Name(name) => return fresh(rewriter, name.id.as_str()),
        Expr::Tuple(t) => &t.elts[..],
        Expr::List(l) => &l.elts[..],
        _ => return String::new(),
    };
    let whole = rewriter.temporary();
    let (mut within, mut after) = (String::new(), String::new());
    let parts: Vec<String> =
        parts.iter().map(|part| parameter(rewriter, part, fresh, &mut within, &mut after)).collect();
    open.push_str(&format!("(lambda {}: {within}", parts.join(", ")));
    *close = format!("{after})(*{OURS}unpack({whole}, {})){close}", parts.len());
    whole
}

/// The names of a target, in the order in which [`parameter`] comes to them.
fn targets<'e>(target: &'e Expr, names: &mut Vec<&'e str>) {
    match target {
        Expr::Name(name) => names.push(name.id.as_str()),
        Expr::Tuple(t) => t.elts.iter().for_each(|e| targets(e, names)),
        Expr::List(l) => l.elts.iter().for_each(|e| targets(e, names)),
        _ => {}
    }
}

/// Are its targets names, alone or in tuples, and does nothing in it bind names of the function around it?
fn plain(generator: &ExprGenerator) -> bool {
    fn names_alone(target: &Expr) -> bool {
        match target {
            Expr::Name(_) => true,
            Expr::Tuple(t) => t.elts.iter().all(names_alone),
            Expr::List(l) => l.elts.iter().all(names_alone),
            _ => false,
        }
    }
    let mut binds = Binds(false);
    binds.visit_expr(&generator.elt);
    for part in &generator.generators {
        binds.visit_comprehension(part);
    }
    !binds.0 && generator.generators.iter().all(|part| !part.is_async && names_alone(&part.target))
}

/// Is there an assignment expression, or an `await`?
struct Binds(bool);

impl<'a> Visitor<'a> for Binds {
    fn visit_expr(&mut self, expr: &'a Expr) {
        // A function that is made there sees the variable as it is in the end.
        self.0 |= matches!(expr, Expr::Named(_) | Expr::Await(_) | Expr::Lambda(_));
        visitor::walk_expr(self, expr);
    }
}
