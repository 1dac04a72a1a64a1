//! The rewriting itself, one visit of the tree.

use std::collections::HashSet;

use ruff_python_ast::token::{TokenKind, Tokens};
use ruff_python_ast::visitor::{self, Visitor};
use ruff_python_ast::{
    CmpOp, Expr, ExprCall, ExprContext, InterpolatedElement, InterpolatedStringElement, Operator, Stmt,
    UnaryOp,
};
use ruff_text_size::{Ranged, TextRange, TextSize};

use super::edits::Edits;
use super::facts::Facts;
use super::lazy::{self, Lazy};
use super::{LINE, OURS, REFUSE, classes, imports, indentation, line_of, matching, prelude};
use crate::program::ProgramError;
use crate::program::host::SIGNATURES;

/// Attributes that lead out of a value into the interpreter.
pub(in crate::program) const REFUSED_ATTRIBUTES: &[&str] = &[
    "__subclasses__",
    "__bases__",
    "__base__",
    "__mro__",
    "__globals__",
    "__builtins__",
    "__code__",
    "__closure__",
    "__loader__",
    "__spec__",
    "__import__",
    "__getattribute__",
    "__reduce__",
    "__reduce_ex__",
    "__self__",
    "f_back",
    "f_globals",
    "f_locals",
    "f_builtins",
    "gi_frame",
    "tb_frame",
    "tb_next",
    "cr_frame",
];

/// Methods that programs hand over, `key=counts.get` say; the interpreter can only call them.
const BOUND_METHODS: &[&str] = &["get", "count", "index", "append", "add", "__getitem__"];

/// Builtins that give no truth value.
const NO_TRUTH_VALUE: &[&str] = &["abs", "float", "int", "len", "list", "round", "str", "sum"];

/// Modules that the interpreter lacks: the library alone stands for them.
pub(super) const OUR_MODULES: &[&str] = &["numpy", "statistics", "copy", "operator"];

/// Methods of `str` that programs pass around unbound.
const STR_METHODS: &[&str] = &[
    "capitalize",
    "casefold",
    "endswith",
    "find",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "lower",
    "lstrip",
    "replace",
    "rstrip",
    "split",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
];

/// Lines, from 1, that hold one of [`REFUSED_ATTRIBUTES`] in whatever form.
pub(super) fn reaching_lines(source: &str) -> HashSet<u32> {
    let holds = |line: &str| line.contains("_") && REFUSED_ATTRIBUTES.iter().any(|name| line.contains(name));
    source.lines().zip(1..).filter(|(line, _)| holds(line)).map(|(_, at)| at).collect()
}

pub(super) fn rewrite(
    source: &str,
    tokens: &Tokens,
    facts: &Facts,
    body: &[Stmt],
    edits: &mut Edits,
) -> Result<(), ProgramError> {
    let mut rewriter = Rewriter {
        source,
        tokens,
        facts,
        edits,
        generator: vec![],
        methods: vec![],
        temporaries: 0,
        error: None,
    };
    rewriter.visit_body(body);
    rewriter.error.map_or(Ok(()), Err)
}

pub(super) struct Rewriter<'r, 'f> {
    pub source: &'r str,
    pub tokens: &'r Tokens,
    pub facts: &'r Facts<'f>,
    pub edits: &'r mut Edits,
    /// For each function around: does it yield?
    generator: Vec<bool>,
    pub methods: Vec<Method>,
    /// How many variables of our own there are so far.
    pub temporaries: usize,
    pub error: Option<ProgramError>,
}

/// A method around what is visited.
#[derive(Clone)]
pub(super) struct Method {
    pub class: String,
    /// The name of its first parameter.
    pub first: String,
    pub of_class: bool,
}

pub(super) fn range(start: TextSize, end: TextSize) -> TextRange {
    TextRange::new(start, end)
}

impl Rewriter<'_, '_> {
    pub fn text(&self, range: TextRange) -> &str {
        &self.source[range.start().to_usize()..range.end().to_usize()]
    }

    pub fn refuse(&mut self, at: TextRange, what: &str) {
        let line = line_of(self.source, at.start().to_usize());
        self.error
            .get_or_insert_with(|| ProgramError::unsupported(Some(line), format!("{what} is not supported")));
    }

    /// `inner` with the parentheses around it, as far as they are within `outer`.
    pub fn parenthesized(&self, inner: TextRange, outer: TextRange) -> TextRange {
        let trivia = |kind| matches!(kind, TokenKind::Comment | TokenKind::NonLogicalNewline);
        let before = self.tokens.in_range(range(outer.start(), inner.start()));
        let after = self.tokens.in_range(range(inner.end(), outer.end()));
        let opens = before.iter().rev().filter(|t| !trivia(t.kind()));
        let closes = after.iter().filter(|t| !trivia(t.kind()));
        let pairs = opens.zip(closes);
        let around = pairs.take_while(|(o, c)| (o.kind(), c.kind()) == (TokenKind::Lpar, TokenKind::Rpar));
        around.last().map_or(inner, |(open, close)| range(open.start(), close.end()))
    }

    /// An expression as it will be, to stand elsewhere: what it stands in place of is not to be visited.
    pub fn fragment(&mut self, expr: &Expr) -> String {
        let around = std::mem::take(self.edits);
        self.visit_expr(expr);
        std::mem::replace(self.edits, around).within(self.source, expr.range())
    }

    /// The operator's token between two operands.
    pub fn operator(&self, left: &Expr, right: &Expr) -> TextRange {
        let between = self.tokens.in_range(range(left.end(), right.start()));
        let skip = |kind| matches!(kind, TokenKind::Rpar | TokenKind::Comment | TokenKind::NonLogicalNewline);
        between.iter().find(|t| !skip(t.kind())).map_or(range(left.end(), left.end()), Ranged::range)
    }

    /// `left OP right` → `name(left, right)`.
    fn binary(&mut self, whole: TextRange, name: &str, left: &Expr, right: &Expr) {
        self.edits.wrap(whole, format!("{OURS}{name}("), ")");
        let operator = self.operator(left, right);
        self.edits.replace(operator, ",");
    }

    /// The byte before which a further argument goes, and what must stand before it.
    fn argument_slot(&self, call: &ExprCall) -> Option<(usize, &'static str)> {
        let close = call.arguments.end().to_usize().checked_sub(1)?;
        if call.arguments.is_empty() {
            return Some((close, ""));
        }
        if let [Expr::Generator(g)] = &*call.arguments.args
            && !g.parenthesized
        {
            return None;
        }
        let before = self.tokens.in_range(range(call.arguments.start(), TextSize::try_from(close).ok()?));
        let trivia = |kind| matches!(kind, TokenKind::Comment | TokenKind::NonLogicalNewline);
        let last = before.iter().rev().find(|t| !trivia(t.kind()))?;
        let comma = if last.kind() == TokenKind::Comma { "" } else { ", " };
        // Right after the last argument: a comment may follow it.
        Some((last.end().to_usize(), comma))
    }

    /// Whether the arguments are done with.
    fn call(&mut self, call: &ExprCall) -> bool {
        let has_key = call.arguments.find_keyword("key").is_some();
        match &*call.func {
            Expr::Name(name) => {
                let known = name.id.as_str();
                let tool = SIGNATURES.iter().any(|(tool, _)| *tool == known) && self.facts.builtin(known);
                if tool && let Some((at, comma)) = self.argument_slot(call) {
                    let line = line_of(self.source, call.range().start().to_usize());
                    self.edits.close(at, format!("{comma}{LINE}={line}"));
                }
                let ours = match known {
                    "min" | "max" | "sorted" => has_key,
                    // What they call may call a tool, which a builtin's callback cannot.
                    "map" | "filter" => true,
                    "isinstance" => !self.facts.classes.is_empty() || self.facts.numpy,
                    "len" | "abs" | "float" | "int" => self.facts.numpy,
                    "round" => self.facts.numpy || call.arguments.len() > 1,
                    "sum" | "callable" | "format" | "issubclass" | "ascii" => true,
                    "getattr" | "hasattr" => !self.facts.properties.is_empty(),
                    _ => false,
                };
                if ours && self.facts.builtin(known) {
                    // Of numbers alone, without what arrays need.
                    let known = if known == "round" && !self.facts.numpy { "nearest" } else { known };
                    self.edits.replace(name.range, format!("{OURS}{known}"));
                }
                let stops = matches!(known, "any" | "all" | "next") && self.facts.builtin(known);
                if stops {
                    match lazy::call(self, known, call) {
                        Lazy::Not => {}
                        Lazy::Arguments => return false,
                        Lazy::Done => return true,
                    }
                }
                if known == "next"
                    && let Some(Expr::Generator(g)) = call.arguments.args.first()
                    && !g.parenthesized
                {
                    self.edits.wrap(g.range, format!("{OURS}gen(["), "])");
                }
            }
            Expr::Attribute(attribute) if attribute.attr.as_str() == "sort" && has_key => {
                let value = self.parenthesized(attribute.value.range(), attribute.range);
                self.edits.open(value.start().to_usize(), format!("{OURS}sort("));
                let dot = range(value.end(), call.arguments.start() + TextSize::new(1));
                self.edits.replace(dot, ", ");
            }
            _ => {}
        }
        classes::call(self, call);
        false
    }

    /// Replaces an attribute by something else; whether it did. `called`: it is what a call calls.
    fn attribute(&mut self, expr: &Expr, called: bool) -> bool {
        let Expr::Attribute(attribute) = expr else { return false };
        let name = attribute.attr.as_str();
        if let Some(path) = self.facts.path(expr) {
            if let Some(ours) = prelude::for_path(&path) {
                self.edits.replace(attribute.range, ours);
                return true;
            }
            if OUR_MODULES.iter().any(|module| path.split('.').next() == Some(module)) {
                self.edits.replace(attribute.range, format!("{OURS}missing(\"{path}\")"));
                return true;
            }
            return false;
        }
        if attribute.ctx != ExprContext::Load {
            return false;
        }
        if REFUSED_ATTRIBUTES.contains(&name) {
            self.edits.replace(attribute.range, format!("{REFUSE}(\"{name}\")"));
            return true;
        }
        let unbound =
            matches!(&*attribute.value, Expr::Name(n) if n.id.as_str() == "str" && self.facts.builtin("str"));
        if self.facts.properties.contains(name)
            && !called
            && let Some(text) = classes::super_property(self, &attribute.value, name)
        {
            self.edits.replace(attribute.range, text);
            return true;
        }
        if unbound && STR_METHODS.contains(&name) {
            self.edits.replace(attribute.range, format!("(lambda s, *a: s.{name}(*a))"));
            return true;
        }
        let value = self.parenthesized(attribute.value.range(), attribute.range);
        let after = range(value.end(), attribute.range.end());
        let data = self.facts.fields.contains(name) || self.facts.properties.contains(name);
        if !called && !data && BOUND_METHODS.contains(&name) {
            self.edits.open(attribute.range.start().to_usize(), format!("(lambda *{OURS}a: "));
            let call = match name {
                "__getitem__" => format!("[{OURS}a[0]])"),
                _ => format!(".{name}(*{OURS}a))"),
            };
            self.edits.replace(after, call);
            return false;
        }
        if self.facts.properties.contains(name) {
            self.edits.open(attribute.range.start().to_usize(), format!("{OURS}getattr("));
            self.edits.replace(after, format!(", \"{name}\")"));
        } else if self.facts.numpy && name == "T" {
            self.edits.open(attribute.range.start().to_usize(), format!("{OURS}transpose("));
            self.edits.replace(after, ")");
        }
        false
    }

    pub fn temporary(&mut self) -> String {
        self.temporaries += 1;
        format!("{OURS}t{}", self.temporaries)
    }

    fn compare(&mut self, compare: &ruff_python_ast::ExprCompare) {
        if let ([op], [right]) = (&*compare.ops, &*compare.comparators)
            && self.facts.numpy
        {
            let name = match op {
                CmpOp::Lt => "lt",
                CmpOp::LtE => "le",
                CmpOp::Gt => "gt",
                CmpOp::GtE => "ge",
                CmpOp::Eq => "eq",
                CmpOp::NotEq => "ne",
                _ => return,
            };
            self.binary(compare.range, name, &compare.left, right);
        }
    }

    fn operation(&mut self, binary: &ruff_python_ast::ExprBinOp) {
        let number = |e: &Expr| e.is_number_literal_expr();
        if self.facts.numpy {
            let name = match binary.op {
                Operator::Add => "add",
                Operator::Sub => "sub",
                Operator::Mult => "mul",
                Operator::Div => "div",
                Operator::FloorDiv => "floordiv",
                Operator::Mod => "remainder",
                Operator::Pow => "pow",
                Operator::MatMult => "matmul",
                Operator::BitAnd => "and",
                Operator::BitOr => "or",
                Operator::BitXor => "xor",
                Operator::LShift | Operator::RShift => return,
            };
            self.binary(binary.range, name, &binary.left, &binary.right);
        } else if binary.op == Operator::Mod && !number(&binary.left) {
            self.binary(binary.range, "mod", &binary.left, &binary.right);
        } else if matches!(binary.op, Operator::Add | Operator::Sub | Operator::Mod) {
            // Beside a string or a list there is no truth value.
            let sides = [&*binary.left, &*binary.right];
            if !sides.into_iter().any(is_sequence) {
                sides.into_iter().for_each(|side| self.number(side));
            }
        } else if binary.op == Operator::Mult {
            let truth =
                |e: &Expr| e.is_compare_expr() || matches!(e, Expr::UnaryOp(u) if u.op == UnaryOp::Not);
            [&*binary.left, &*binary.right].into_iter().filter(|e| truth(e)).for_each(|e| self.number(e));
        }
    }

    /// What may be a truth value counts as a number: the interpreter adds none.
    pub fn number(&mut self, operand: &Expr) {
        let known = match operand {
            Expr::Name(_) | Expr::Attribute(_) | Expr::Subscript(_) | Expr::If(_) | Expr::Named(_) => false,
            Expr::Compare(_) | Expr::BoolOp(_) | Expr::BooleanLiteral(_) => false,
            Expr::UnaryOp(unary) => unary.op != UnaryOp::Not,
            Expr::BinOp(b) => !matches!(b.op, Operator::BitAnd | Operator::BitOr | Operator::BitXor),
            Expr::Call(call) => matches!(&*call.func, Expr::Name(name)
                if self.facts.builtin(name.id.as_str())
                    && NO_TRUTH_VALUE.contains(&name.id.as_str())),
            _ => true,
        };
        if !known {
            self.edits.wrap(operand.range(), format!("{OURS}num("), ")");
        }
    }

    /// A function that yields becomes one that collects and returns an iterator over what it
    /// collected: not lazy, but the same values.
    fn generator_body(&mut self, body: &[Stmt]) {
        let (Some(first), Some(last)) = (body.first(), body.last()) else { return };
        let at = first.start().to_usize();
        match indentation(self.source, self.facts, first) {
            Some(blanks) => {
                self.edits.open(at, format!("{OURS}out = []\n{blanks}"));
                self.edits.close(last.end().to_usize(), format!("\n{blanks}return {OURS}gen({OURS}out)"));
            }
            None => {
                self.edits.open(at, format!("{OURS}out = []; "));
                self.edits.close(last.end().to_usize(), format!("; return {OURS}gen({OURS}out)"));
            }
        }
    }
}

/// Is it written as text, or as a list of something?
fn is_sequence(expr: &Expr) -> bool {
    expr.is_string_literal_expr()
        || expr.is_f_string_expr()
        || expr.is_list_expr()
        || expr.is_list_comp_expr()
        || expr.is_tuple_expr()
}

/// Does a function's own body yield?
struct Yields(bool);

impl<'a> Visitor<'a> for Yields {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        if !matches!(stmt, Stmt::FunctionDef(_) | Stmt::ClassDef(_)) {
            visitor::walk_stmt(self, stmt);
        }
    }
    fn visit_expr(&mut self, expr: &'a Expr) {
        match expr {
            Expr::Yield(_) | Expr::YieldFrom(_) => self.0 = true,
            Expr::Lambda(_) => {}
            _ => visitor::walk_expr(self, expr),
        }
    }
}

impl<'a> Visitor<'a> for Rewriter<'_, '_> {
    fn visit_annotation(&mut self, _: &'a Expr) {}

    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        match stmt {
            Stmt::FunctionDef(function) => {
                let mut yields = Yields(false);
                yields.visit_body(&function.body);
                if yields.0 {
                    self.generator_body(&function.body);
                }
                self.generator.push(yields.0);
                visitor::walk_stmt(self, stmt);
                self.generator.pop();
                return;
            }
            Stmt::ClassDef(class) => return classes::class(self, class),
            Stmt::Match(m) => return matching::rewrite(self, m),
            Stmt::Delete(delete) => return self.delete(delete),
            Stmt::Import(_) | Stmt::ImportFrom(_) => return imports::rewrite(self, stmt),
            Stmt::AugAssign(assign) if self.aug_assign(assign) => return self.visit_expr(&assign.value),
            Stmt::Assign(assign) if self.assign(assign) => return self.visit_expr(&assign.value),
            Stmt::Expr(e) if self.facts.exits.contains(&e.range.start()) => {
                self.edits.replace(e.range, "return".to_owned());
                return;
            }
            Stmt::Return(r) if self.generator.last() == Some(&true) => {
                self.edits.replace(r.range, format!("return {OURS}gen({OURS}out)"));
                return;
            }
            _ => {}
        }
        visitor::walk_stmt(self, stmt);
    }

    fn visit_expr(&mut self, expr: &'a Expr) {
        match expr {
            Expr::Call(call) => {
                let done = self.call(call);
                if call.func.is_attribute_expr() {
                    if !self.attribute(&call.func, true) {
                        visitor::walk_expr(self, &call.func);
                    }
                } else {
                    self.visit_expr(&call.func);
                }
                if !done {
                    self.visit_arguments(&call.arguments);
                }
                return;
            }
            Expr::Attribute(a) if a.ctx == ExprContext::Store && classes::is_inherited(self.facts, a) => {
                return self.refuse(a.range, "storing to what other classes inherit");
            }
            Expr::Attribute(_) if self.attribute(expr, false) => return,
            Expr::BinOp(binary) => self.operation(binary),
            Expr::Compare(compare) => self.compare(compare),
            Expr::Subscript(subscript) => self.subscript(subscript),
            Expr::Slice(slice) if self.edits.touches(slice.range) => return,
            Expr::UnaryOp(unary) if self.facts.numpy && !unary.operand.is_number_literal_expr() => {
                let name = match unary.op {
                    UnaryOp::USub => "neg",
                    UnaryOp::Invert => "invert",
                    _ => "",
                };
                if !name.is_empty() {
                    let sign = range(unary.range.start(), unary.range.start() + TextSize::new(1));
                    self.edits.replace(sign, format!("{OURS}{name}("));
                    self.edits.close(unary.range.end().to_usize(), ")");
                }
            }
            Expr::Generator(g)
                if g.parenthesized
                    && !self.edits.touches(range(g.range.start(), g.range.start() + TextSize::new(1))) =>
            {
                let one = TextSize::new(1);
                self.edits.replace(range(g.range.start(), g.range.start() + one), format!("{OURS}gen(["));
                self.edits.replace(range(g.range.end() - one, g.range.end()), "])");
            }
            Expr::Yield(y) => {
                let start = y.range.start();
                match &y.value {
                    Some(value) => {
                        let whole = self.parenthesized(value.range(), y.range);
                        self.edits.replace(range(start, whole.start()), format!("{OURS}out.append("));
                        self.edits.close(y.range.end().to_usize(), ")");
                        if matches!(&**value, Expr::Tuple(t) if !t.parenthesized) {
                            self.edits.wrap(value.range(), "(", ")");
                        }
                    }
                    None => self.edits.replace(y.range, format!("{OURS}out.append(None)")),
                }
            }
            Expr::YieldFrom(y) => {
                let whole = self.parenthesized(y.value.range(), y.range);
                self.edits.replace(range(y.range.start(), whole.start()), format!("{OURS}out.extend("));
                self.edits.close(y.range.end().to_usize(), ")");
            }
            _ => {}
        }
        visitor::walk_expr(self, expr);
    }

    fn visit_interpolated_string_element(&mut self, element: &'a InterpolatedStringElement) {
        // `{x=}` prints its own text: leave that alone.
        if let InterpolatedStringElement::Interpolation(InterpolatedElement { debug_text: Some(_), .. }) =
            element
        {
            return;
        }
        visitor::walk_interpolated_string_element(self, element);
    }
}
