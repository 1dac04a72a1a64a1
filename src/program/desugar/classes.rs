//! Classes: inheritance between the program's own, `super()`, properties, static and class methods,
//! empty exception classes. Members are copied from base to heir by name, at the head of the body;
//! a property is a method under another name, read through a function of the library.

use ruff_python_ast::visitor::{self, Visitor};
use ruff_python_ast::{Expr, ExprAttribute, ExprCall, Stmt, StmtClassDef, StmtFunctionDef};
use ruff_text_size::{Ranged, TextRange, TextSize};

use super::facts::Facts;
use super::rewrite::{Method, Rewriter};
use super::{OURS, indentation};

pub(super) fn class(rewriter: &mut Rewriter, class: &StmtClassDef) {
    let name = class.name.as_str();
    if let Some(stand_in) = rewriter.facts.exceptions.get(name) {
        rewriter.edits.replace(class.range, format!("{name} = {stand_in}"));
        return;
    }
    let ancestors = rewriter.facts.ancestors(name);
    if let Some(arguments) = &class.arguments {
        let known = arguments.keywords.is_empty()
            && arguments.args.iter().all(|base| match base {
                Expr::Name(base) => {
                    let base = base.id.as_str();
                    base == "object"
                        || rewriter.facts.classes.get(name).is_some_and(|c| c.bases.contains(&base))
                }
                _ => false,
            });
        if !known {
            return rewriter.refuse(class.range, "this kind of base class");
        }
        rewriter.edits.replace(arguments.range, "");
    }
    if !ancestors.is_empty() {
        let mut taken: Vec<&str> =
            rewriter.facts.classes.get(name).map_or_else(Vec::new, |c| c.members.clone());
        let mut lines = vec![format!("{OURS}bases = ({},)", ancestors.join(", "))];
        for base in &ancestors {
            for member in rewriter.facts.classes.get(base).into_iter().flat_map(|c| &c.members) {
                if !taken.contains(member) {
                    taken.push(member);
                    let stored = stored_name(rewriter, member);
                    lines.push(format!("{stored} = {base}.{stored}"));
                }
            }
        }
        if let Some(first) = class.body.first() {
            let between = indentation(rewriter.source, rewriter.facts, first)
                .map_or("; ".to_owned(), |blanks| format!("\n{blanks}"));
            rewriter.edits.open(first.start().to_usize(), format!("{}{between}", lines.join(&between)));
        }
    }
    for decorator in &class.decorator_list {
        rewriter.visit_decorator(decorator);
    }
    for stmt in &class.body {
        match stmt {
            Stmt::FunctionDef(function) => {
                method(rewriter, function);
                let first = function.parameters.iter().next().map_or("self", |p| p.name().as_str());
                let class = rewriter.facts.classes.get(name);
                let of_class = class.is_some_and(|c| c.classmethods.contains(function.name.as_str()));
                rewriter.methods.push(Method { class: name.to_owned(), first: first.to_owned(), of_class });
                // The decorators are gone, and the rest of a function is visited as any other.
                rewriter.visit_stmt(stmt);
                rewriter.methods.pop();
            }
            other => visitor::walk_stmt(rewriter, other),
        }
    }
}

/// The name under which a member is kept.
fn stored_name(rewriter: &Rewriter, member: &str) -> String {
    if rewriter.facts.properties.contains(member) {
        format!("{OURS}prop_{member}")
    } else {
        member.to_owned()
    }
}

fn method(rewriter: &mut Rewriter, function: &StmtFunctionDef) {
    let name = function.name.as_str();
    if name.starts_with("__") && name.ends_with("__") && !SPECIAL.contains(&name) {
        return rewriter.refuse(function.name.range(), &format!("a class's {name}"));
    }
    for decorator in &function.decorator_list {
        let with = match &decorator.expression {
            Expr::Name(with) => with.id.as_str(),
            _ => "",
        };
        match with {
            "property" => rewriter.edits.replace(function.name.range(), format!("{OURS}prop_{name}")),
            "classmethod" | "staticmethod" | "abstractmethod" => {}
            _ => return rewriter.refuse(decorator.range(), "this method decorator"),
        }
        rewriter.edits.replace(decorator.range(), "");
    }
}

/// The value of `super().name`, a property, if `object` is `super()`.
pub(super) fn super_property(rewriter: &Rewriter, object: &Expr, name: &str) -> Option<String> {
    let Expr::Call(inner) = object else { return None };
    if !matches!(&*inner.func, Expr::Name(n) if n.id.as_str() == "super") {
        return None;
    }
    let Method { class, first, .. } = rewriter.methods.last()?;
    let has = |base: &&str| rewriter.facts.classes.get(base).is_some_and(|c| c.members.contains(&name));
    let owner = rewriter.facts.ancestors(class).into_iter().find(has)?;
    Some(format!("{owner}.{}({first})", stored_name(rewriter, name)))
}

/// Special methods that the interpreter calls.
const SPECIAL: &[&str] = &[
    "__init__",
    "__post_init__",
    "__repr__",
    "__str__",
    "__eq__",
    "__ne__",
    "__hash__",
    "__iter__",
    "__next__",
    "__contains__",
    "__enter__",
    "__exit__",
];

/// Is it an attribute of a class, by the class's name, that an heir has? Heirs hold what it was when they were made.
pub(super) fn is_inherited(facts: &Facts, attribute: &ExprAttribute) -> bool {
    let Expr::Name(class) = &*attribute.value else { return false };
    let (class, name) = (class.id.as_str(), attribute.attr.as_str());
    facts.classes.get(class).is_some_and(|c| c.members.contains(&name))
        && facts.classes.keys().any(|heir| facts.ancestors(heir).contains(&class))
}

/// `super().m(…)`, `Class.classmethod(…)` and `self.staticmethod(…)`.
pub(super) fn call(rewriter: &mut Rewriter, call: &ExprCall) {
    let Expr::Attribute(attribute) = &*call.func else { return };
    let method = attribute.attr.as_str();
    let after_open = call.arguments.start() + TextSize::new(1);
    let comma = if call.arguments.is_empty() { "" } else { ", " };
    match &*attribute.value {
        Expr::Call(inner) if matches!(&*inner.func, Expr::Name(n) if n.id.as_str() == "super") => {
            let Some(Method { class, first, .. }) = rewriter.methods.last().cloned() else { return };
            let owner =
                rewriter.facts.ancestors(&class).into_iter().find(|base| {
                    rewriter.facts.classes.get(base).is_some_and(|c| c.members.contains(&method))
                });
            match owner {
                Some(owner) => {
                    let target = format!("{owner}.{}({first}{comma}", stored_name(rewriter, method));
                    rewriter.edits.replace(TextRange::new(call.range().start(), after_open), target);
                }
                // `object` has an `__init__` that does nothing.
                None if method == "__init__" => {
                    let target = format!("{OURS}nothing(");
                    rewriter.edits.replace(TextRange::new(call.range().start(), after_open), target);
                }
                None => rewriter.refuse(call.range(), "super() of this class"),
            }
        }
        // Read from its class a method is a plain function.
        Expr::Name(object) if rewriter.facts.statics.contains_key(method) => {
            rewriter.edits.replace(object.range, rewriter.facts.statics[method]);
        }
        Expr::Name(object) => {
            // `self` and `cls` are of the class around.
            let around = rewriter.methods.last().filter(|m| m.first == object.id.as_str()).cloned();
            let class = around.as_ref().map_or(object.id.as_str(), |m| &m.class);
            let owners = std::iter::once(class).chain(rewriter.facts.ancestors(class));
            let is_classmethod = owners
                .filter_map(|owner| rewriter.facts.classes.get(owner))
                .any(|c| c.classmethods.contains(method));
            if is_classmethod {
                let given = match around {
                    Some(m) if !m.of_class => {
                        let given = format!("type({})", m.first);
                        rewriter.edits.replace(object.range, given.clone());
                        given
                    }
                    _ => object.id.to_string(),
                };
                rewriter.edits.open(after_open.to_usize(), format!("{given}{comma}"));
            }
        }
        _ => {}
    }
}
