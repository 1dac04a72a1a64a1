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

/// What became of a call.
pub(super) enum Lazy {
    /// It is none of such.
    Not,
    /// It is rewritten around its arguments, which are still to be visited.
    Arguments,
    Done,
}

/// Rewrites such a call.
pub(super) fn call(rewriter: &mut Rewriter, name: &str, call: &ExprCall) -> Lazy {
    let (generator, default) = match &*call.arguments.args {
        [Expr::Generator(g)] => (g, None),
        [Expr::Generator(g), default] if name == "next" && !default.is_starred_expr() => (g, Some(default)),
        _ => return Lazy::Not,
    };
    let one = TextSize::new(1);
    let within = TextRange::new(call.arguments.start() + one, call.arguments.end() - one);
    if !call.arguments.keywords.is_empty()
        || (generator.parenthesized && rewriter.parenthesized(generator.range, within) != generator.range)
    {
        return Lazy::Not;
    }
    match binds(generator) {
        Binds { awaits: true, .. } | Binds { functions: true, .. } => return Lazy::Not,
        Binds { names: true, .. } => return flagged(rewriter, name, call, generator, default),
        _ if !plain(generator) => return Lazy::Not,
        _ => {}
    }
    let Some(marks) = marks(rewriter, generator) else { return Lazy::Not };
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
        let Some(in_) = marks.next() else { return Lazy::Arguments };
        if at == 0 {
            rewriter.edits.replace(in_, format!("{close}, "));
            close.clear();
        } else {
            let (open, end) = lambda(rewriter, &loops[..at]);
            rewriter.edits.replace(in_, format!("{close}, (True, {open}"));
            close = format!("{end})");
        }
        for _ in &part.ifs {
            let Some(if_) = marks.next() else { return Lazy::Arguments };
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
    Lazy::Arguments
}

/// One that binds names of the function around it, `any((found := x) > 3 for x in xs)`, which a function of its own
/// would keep to itself: `bool([1 for t in [[]] for x in xs if not t if (found := x) > 3 and not t.append(1)])`,
/// where `t` is filled by the item that decides, after which nothing is evaluated.
fn flagged(
    rewriter: &mut Rewriter,
    name: &str,
    call: &ExprCall,
    generator: &ExprGenerator,
    default: Option<&Expr>,
) -> Lazy {
    let t = rewriter.temporary();
    let element = rewriter.fragment(&generator.elt);
    let (before, first, last) = match name {
        "any" => ("bool([", "1".to_owned(), format!(" if ({element}) and not {t}.append(1)])")),
        "all" => ("(not [", "1".to_owned(), format!(" if not ({element}) and not {t}.append(1)])")),
        _ => ("next(iter([", format!("({element})"), format!(" if not {t}.append(1)])")),
    };
    let mut text = format!("{before}{first} for {t} in [[]]");
    for part in &generator.generators {
        let (target, items) = (rewriter.fragment(&part.target), rewriter.fragment(&part.iter));
        text.push_str(&format!(" for {target} in ({items}) if not {t}"));
        for test in &part.ifs {
            let test = rewriter.fragment(test);
            text.push_str(&format!(" if ({test})"));
        }
    }
    text.push_str(&last);
    if name == "next" {
        let default = default.map(|default| rewriter.fragment(default));
        text.push_str(&default.map_or(")".to_owned(), |default| format!(", {default})")));
    }
    rewriter.edits.replace(call.range(), text);
    Lazy::Done
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

/// Are its targets names, alone or in tuples?
fn plain(generator: &ExprGenerator) -> bool {
    fn names_alone(target: &Expr) -> bool {
        match target {
            Expr::Name(_) => true,
            Expr::Tuple(t) => t.elts.iter().all(names_alone),
            Expr::List(l) => l.elts.iter().all(names_alone),
            _ => false,
        }
    }
    generator.generators.iter().all(|part| names_alone(&part.target))
}

/// What a generator expression does that a function of its own could not.
#[derive(Default)]
struct Binds {
    /// Names of the function around it.
    names: bool,
    /// Makes functions, which see the variables as they are in the end.
    functions: bool,
    awaits: bool,
}

fn binds(generator: &ExprGenerator) -> Binds {
    let mut binds = Binds::default();
    binds.visit_expr(&generator.elt);
    for part in &generator.generators {
        binds.awaits |= part.is_async;
        binds.visit_comprehension(part);
    }
    binds
}

impl<'a> Visitor<'a> for Binds {
    fn visit_expr(&mut self, expr: &'a Expr) {
        self.names |= expr.is_named_expr();
        self.functions |= expr.is_lambda_expr();
        self.awaits |= expr.is_await_expr();
        visitor::walk_expr(self, expr);
    }
}
