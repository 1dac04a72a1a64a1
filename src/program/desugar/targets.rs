//! What a program stores to, and subscripts: the interpreter has fewer targets than Python, and no arrays.

use ruff_python_ast::token::TokenKind;
use ruff_python_ast::{Expr, ExprContext, ExprSubscript, Operator, StmtAssign, StmtAugAssign, StmtDelete};
use ruff_text_size::{Ranged, TextSize};

use super::OURS;
use super::rewrite::{Rewriter, range};

impl Rewriter<'_, '_> {
    /// What stands between the brackets of a subscript, as a value.
    fn key(&mut self, key: &Expr) -> String {
        match key {
            Expr::Slice(slice) => {
                let mut bound = |e: &Option<Box<Expr>>| {
                    e.as_ref().map_or_else(|| "None".to_owned(), |e| self.fragment(e))
                };
                let bounds = [&slice.lower, &slice.upper, &slice.step].map(&mut bound);
                format!("slice({})", bounds.join(", "))
            }
            Expr::Tuple(tuple) if !tuple.elts.is_empty() => {
                let parts: Vec<String> = tuple.elts.iter().map(|part| self.key(part)).collect();
                format!("({},)", parts.join(", "))
            }
            one => format!("({})", self.fragment(one)),
        }
    }

    /// The statement that stores a value, a name of ours, in a target.
    fn store(&mut self, target: &Expr, value: &str) -> String {
        match target {
            Expr::Subscript(s) if self.facts.numpy || s.slice.is_slice_expr() => {
                let ours = if self.facts.numpy { "set" } else { "splice" };
                format!("{OURS}{ours}({}, {}, {value})", self.fragment(&s.value), self.key(&s.slice))
            }
            _ => format!("{} = {value}", self.fragment(target)),
        }
    }

    pub(super) fn subscript(&mut self, subscript: &ExprSubscript) {
        if self.facts.numpy && subscript.ctx == ExprContext::Load {
            self.edits.open(subscript.range.start().to_usize(), format!("{OURS}get("));
            self.keyed(subscript, ")");
        }
    }

    /// `value[key]` → `value, key` and then `end`.
    fn keyed(&mut self, subscript: &ExprSubscript, end_text: &str) {
        let ExprSubscript { value, slice, .. } = subscript;
        let tokens = self.tokens.in_range(range(value.end(), slice.start()));
        let Some(open) = tokens.iter().find(|t| t.kind() == TokenKind::Lsqb) else { return };
        let bare_tuple = matches!(&**slice, Expr::Tuple(t) if !t.parenthesized);
        self.edits.replace(open.range(), if bare_tuple { ", (" } else { ", " });
        let end = subscript.range.end();
        self.edits.replace(
            range(end - TextSize::new(1), end),
            format!("{}{end_text}", if bare_tuple { ")" } else { "" }),
        );
        let parts = match &**slice {
            Expr::Tuple(tuple) => &tuple.elts[..],
            one => std::slice::from_ref(one),
        };
        for part in parts {
            if part.is_slice_expr() {
                let text = self.key(part);
                self.edits.replace(part.range(), text);
            }
        }
    }

    /// What the interpreter cannot assign to: an item of an array, an attribute or item among several
    /// targets. Whether the targets are done with.
    pub(super) fn assign(&mut self, assign: &StmtAssign) -> bool {
        match assign.targets.as_slice() {
            [Expr::Subscript(target)] if self.facts.numpy || target.slice.is_slice_expr() => {
                let ours = if self.facts.numpy { "set" } else { "splice" };
                self.edits.open(assign.range.start().to_usize(), format!("{OURS}{ours}("));
                self.keyed(target, ", ");
                let between = self.tokens.in_range(range(target.end(), assign.value.start()));
                if let Some(equal) = between.iter().find(|t| t.kind() == TokenKind::Equal) {
                    self.edits.replace(equal.range(), "(");
                }
                self.edits.close(assign.range.end().to_usize(), "))");
                false
            }
            [Expr::Tuple(_) | Expr::List(_)] => {
                let mut leaves = vec![];
                collect_leaves(&assign.targets[0], &mut leaves);
                if leaves.iter().all(|leaf| leaf.is_name_expr()) {
                    return false;
                }
                let mut after = String::new();
                for leaf in leaves {
                    let temporary = self.temporary();
                    let store = self.store(leaf, &temporary);
                    after.push_str(&format!("; {store}"));
                    self.edits.replace(leaf.range(), temporary);
                }
                self.edits.close(assign.range.end().to_usize(), after);
                true
            }
            // Of several in a row, `m[0, 1] = m[1, 0] = 5.` say, each takes the value.
            targets @ [_, _, ..] if self.facts.numpy && targets.iter().any(Expr::is_subscript_expr) => {
                let temporary = self.temporary();
                let stores: Vec<String> =
                    targets.iter().map(|target| self.store(target, &temporary)).collect();
                let last = targets.last().expect("there are two").end();
                let value = self.parenthesized(assign.value.range(), range(last, assign.range.end()));
                self.edits.replace(range(assign.range.start(), value.start()), format!("{temporary} = "));
                self.edits.close(assign.range.end().to_usize(), format!("; {}", stores.join("; ")));
                true
            }
            _ => false,
        }
    }

    /// Whether the target is done with.
    pub(super) fn aug_assign(&mut self, assign: &StmtAugAssign) -> bool {
        let ours = match assign.op {
            _ if !self.facts.numpy => None,
            Operator::Add => Some("iadd"),
            Operator::Sub => Some("sub"),
            Operator::Mult => Some("mul"),
            Operator::Div => Some("div"),
            Operator::FloorDiv => Some("floordiv"),
            Operator::Mod => Some("remainder"),
            Operator::Pow => Some("pow"),
            _ => None,
        };
        let of_name = |target: &Expr| match target {
            Expr::Attribute(a) => a.value.is_name_expr(),
            target => target.is_name_expr(),
        };
        match (ours, &*assign.target) {
            (Some(ours), target) if of_name(target) => {
                let was = self.text(target.range()).to_owned();
                let operator = self.operator(target, &assign.value);
                self.edits.replace(operator, format!("= {OURS}{ours}({was}, "));
                self.edits.close(assign.value.end().to_usize(), ")");
            }
            // Not where a name would be bound to the function alone.
            (Some(ours), Expr::Subscript(s)) if !self.text(assign.value.range()).contains(":=") => {
                let (value, key) = (self.fragment(&s.value), self.key(&s.slice));
                let whole =
                    self.parenthesized(assign.value.range(), range(s.range.end(), assign.range.end()));
                let text = format!("{OURS}change({value}, {key}, lambda {OURS}a: {OURS}{ours}({OURS}a, ");
                self.edits.replace(range(assign.range.start(), whole.start()), text);
                self.edits.close(assign.range.end().to_usize(), "))");
                return true;
            }
            _ if matches!(assign.op, Operator::Add | Operator::Sub) => self.number(&assign.value),
            _ => {}
        }
        false
    }

    pub(super) fn delete(&mut self, delete: &StmtDelete) {
        let mut parts = vec![];
        for target in &delete.targets {
            match target {
                Expr::Name(name) => parts.push(format!("{} = None", name.id.as_str())),
                Expr::Subscript(s) if !s.slice.is_slice_expr() => {
                    parts.push(format!("{OURS}del({}, {})", self.fragment(&s.value), self.key(&s.slice)));
                }
                _ => return self.refuse(delete.range, "this form of del"),
            }
        }
        self.edits.replace(delete.range, parts.join("; "));
    }
}

/// The targets of an unpacking, in the order in which they are stored to.
fn collect_leaves<'e>(target: &'e Expr, leaves: &mut Vec<&'e Expr>) {
    match target {
        Expr::Tuple(t) => t.elts.iter().for_each(|e| collect_leaves(e, leaves)),
        Expr::List(l) => l.elts.iter().for_each(|e| collect_leaves(e, leaves)),
        Expr::Starred(s) => collect_leaves(&s.value, leaves),
        Expr::Attribute(_) | Expr::Subscript(_) | Expr::Name(_) => leaves.push(target),
        _ => {}
    }
}
