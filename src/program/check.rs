//! What a program's text tells without running it: whether it parses, whether it leaves `img_pth`
//! alone, whether it ever sets `final_answer`, and which prompts it gives to the detector.
//!
//! The text is untrusted; [`super::guard`] bounds it before anything recursive reads it. The prompts
//! found are a lower bound: what a program computes at run time is in its trace.

use std::cell::Cell;
use std::collections::HashMap;

use ruff_python_ast::visitor::{self, Visitor};
use ruff_python_ast::{
    Comprehension, ConversionFlag, Expr, ExprCall, ExprContext, ExprFString, InterpolatedStringElement,
    Operator, Stmt,
};

use super::ProgramError;
use super::desugar::{line_of, parse};
use super::guard;
use super::names::{self, How};

/// What static checks found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Lines on which the program itself rebinds or deletes `img_pth` (method.md 10.14).
    pub img_pth_changed: Vec<u32>,
    /// Somewhere `final_answer` is assigned.
    pub sets_answer: bool,
    /// Prompts that `gd_detect` is given, in order of first use, without repetition.
    pub prompts: Vec<String>,
    /// Some call's prompt could not be told from the text.
    pub computed_prompts: bool,
}

/// Most values that a name is taken to have, and most prompts that are collected.
const MAX_VALUES: usize = 64;
/// Most bytes that are handled for one program; then nothing more is told.
const MAX_WORK: usize = 4 << 20;
/// Longest text that is put together, bytes.
const MAX_TEXT: usize = 4096;

/// Checks a program.
///
/// # Errors
/// If it cannot be parsed: a [`ProgramError`] of type `SyntaxError` with its line.
pub fn check(source: &str) -> Result<Checked, ProgramError> {
    guard::check(source).map_err(|e| ProgramError::syntax(None, e.to_string()))?;
    let parsed = parse(source)?;
    let body = parsed.suite();
    let mut checked = Checked::default();
    // Which functions' `img_pth` is the program's is not told apart by name: a `global` anywhere
    // makes every assignment count.
    let bindings = names::bindings(body);
    let shared =
        |name: &str| bindings.iter().any(|b| b.name == name && matches!(b.how, How::Global | How::Nonlocal));
    for binding in &bindings {
        let binds = match binding.how {
            How::Assign | How::Delete => binding.depth == 0 || shared(binding.name),
            _ => false,
        };
        match binding.name {
            "img_pth" if binds => {
                checked.img_pth_changed.push(line_of(source, binding.range.start().to_usize()))
            }
            "final_answer" if binds && binding.how == How::Assign => checked.sets_answer = true,
            _ => {}
        }
    }
    let mut values = Values::default();
    // Twice: a function above may be given what is assigned below.
    values.visit_body(body);
    values.visit_body(body);
    let mut prompts = Prompts { values: &values, checked: &mut checked };
    prompts.visit_body(body);
    Ok(checked)
}

/// Texts that an expression may have, or that its items may have; `None` if that cannot be told.
type Texts = Option<Vec<String>>;

/// What names may stand for, over all their assignments: no flow is followed.
#[derive(Default)]
struct Values<'a> {
    texts: HashMap<&'a str, Vec<String>>,
    /// Texts of the items of lists, tuples, sets, and of the keys of dicts.
    items: HashMap<&'a str, Vec<String>>,
    parameters: HashMap<&'a str, Vec<&'a str>>,
    /// Bytes put together so far, against [`MAX_WORK`].
    work: Cell<usize>,
}

fn merge(into: &mut Vec<String>, more: Vec<String>) {
    for text in more {
        if into.len() < MAX_VALUES && !into.contains(&text) {
            into.push(text);
        }
    }
}

/// Every text of one with every text of the other.
fn join(a: Texts, b: Texts) -> Texts {
    let (a, b) = (a?, b?);
    let mut out = vec![];
    for x in &a {
        let longer = b.iter().filter(|y| x.len() + y.len() <= MAX_TEXT).map(|y| format!("{x}{y}")).collect();
        merge(&mut out, longer);
    }
    (!out.is_empty()).then_some(out)
}

impl<'a> Values<'a> {
    /// Lets a result through while there is work left to pay for it.
    fn charged(&self, texts: Texts) -> Texts {
        let texts = texts?;
        let bytes: usize = texts.iter().map(|text| text.len() + 32).sum();
        self.work.set(self.work.get() + bytes + 32);
        (self.work.get() <= MAX_WORK).then_some(texts)
    }

    fn texts(&self, expr: &Expr) -> Texts {
        if self.work.get() > MAX_WORK {
            return None;
        }
        self.charged(self.texts_of(expr))
    }

    fn texts_of(&self, expr: &Expr) -> Texts {
        match expr {
            Expr::StringLiteral(s) => Some(vec![s.value.to_str().to_owned()]),
            Expr::NumberLiteral(n) => match &n.value {
                ruff_python_ast::Number::Int(i) => Some(vec![i.to_string()]),
                _ => None,
            },
            Expr::FString(f) => self.interpolated(f),
            Expr::Name(name) => self.texts.get(name.id.as_str()).cloned(),
            Expr::Named(named) => self.texts(&named.value),
            Expr::BinOp(b) if b.op == Operator::Add => join(self.texts(&b.left), self.texts(&b.right)),
            Expr::If(i) => {
                let mut both = self.texts(&i.body)?;
                merge(&mut both, self.texts(&i.orelse)?);
                Some(both)
            }
            Expr::BoolOp(b) => {
                let mut all = vec![];
                for value in &b.values {
                    merge(&mut all, self.texts(value)?);
                }
                Some(all)
            }
            // One item of a known list: any of them.
            Expr::Subscript(s) if !s.slice.is_slice_expr() => self.items(&s.value),
            Expr::Call(call) => self.method(call),
            _ => None,
        }
    }

    fn interpolated(&self, f: &ExprFString) -> Texts {
        let mut out = Some(vec![String::new()]);
        for element in f.value.elements() {
            let part = match element {
                InterpolatedStringElement::Literal(literal) => Some(vec![literal.to_string()]),
                InterpolatedStringElement::Interpolation(i) => {
                    let plain = i.format_spec.is_none()
                        && i.debug_text.is_none()
                        && i.conversion == ConversionFlag::None;
                    if plain { self.texts(&i.expression) } else { None }
                }
            };
            out = join(out, part);
        }
        // Literals between f-strings are no elements of them: rare, and then nothing is claimed.
        if f.value.iter().any(|part| part.is_literal()) { None } else { out }
    }

    /// `", ".join(names)`, `name.lower()` and the like, `"{} chair".format(colour)`.
    fn method(&self, call: &ExprCall) -> Texts {
        let Expr::Attribute(attribute) = &*call.func else { return None };
        let each =
            |f: &dyn Fn(&str) -> String| Some(self.texts(&attribute.value)?.iter().map(|t| f(t)).collect());
        match (attribute.attr.as_str(), &*call.arguments.args) {
            ("lower", []) => each(&|t| t.to_lowercase()),
            ("upper", []) => each(&|t| t.to_uppercase()),
            ("strip", []) => each(&|t| t.trim().to_owned()),
            ("join", [list]) => {
                let separators = self.texts(&attribute.value)?;
                let [separator] = separators.as_slice() else { return None };
                // The whole list, in the order of the text: only of one that is written out.
                let joined = self.items(list)?.join(separator);
                (joined.len() <= MAX_TEXT).then(|| vec![joined])
            }
            ("format", [value]) => {
                let values = self.texts(value)?;
                let forms = self.texts(&attribute.value)?;
                let filled =
                    |form: &String| values.iter().map(|v| form.replacen("{}", v, 1)).collect::<Vec<_>>();
                forms
                    .iter()
                    .all(|form| form.matches(['{', '}']).count() == 2 && form.contains("{}"))
                    .then(|| forms.iter().flat_map(filled).take(MAX_VALUES).collect())
            }
            _ => None,
        }
    }

    /// The texts that going through an expression may give.
    fn items(&self, expr: &Expr) -> Texts {
        if self.work.get() > MAX_WORK {
            return None;
        }
        self.charged(self.items_of(expr))
    }

    fn items_of(&self, expr: &Expr) -> Texts {
        let all = |elements: &[Expr]| {
            let mut out = vec![];
            for element in elements {
                merge(&mut out, self.texts(element)?);
            }
            Some(out)
        };
        match expr {
            Expr::List(l) => all(&l.elts),
            Expr::Tuple(t) => all(&t.elts),
            Expr::Set(s) => all(&s.elts),
            Expr::Dict(d) => {
                let mut out = vec![];
                for item in &d.items {
                    merge(&mut out, self.texts(item.key.as_ref()?)?);
                }
                Some(out)
            }
            Expr::Name(name) => self.items.get(name.id.as_str()).cloned(),
            Expr::ListComp(c) => self.texts(&c.elt),
            Expr::Generator(g) => self.texts(&g.elt),
            Expr::BinOp(b) if b.op == Operator::Add => {
                let mut both = self.items(&b.left)?;
                merge(&mut both, self.items(&b.right)?);
                Some(both)
            }
            Expr::Call(call) => match (&*call.func, &*call.arguments.args) {
                (Expr::Name(f), [inner])
                    if ["list", "tuple", "set", "sorted", "reversed"].contains(&f.id.as_str()) =>
                {
                    self.items(inner)
                }
                (Expr::Attribute(a), []) if a.attr.as_str() == "keys" => self.items(&a.value),
                (Expr::Attribute(a), [separator]) if a.attr.as_str() == "split" => {
                    let separators = self.texts(separator)?;
                    let mut out = vec![];
                    for text in self.texts(&a.value)? {
                        merge(
                            &mut out,
                            text.split(separators.first()?.as_str()).map(str::to_owned).collect(),
                        );
                    }
                    Some(out)
                }
                _ => None,
            },
            _ => None,
        }
    }

    fn assign(&mut self, target: &'a Expr, value: &Expr) {
        match target {
            Expr::Name(name) => {
                if let Some(texts) = self.texts(value) {
                    merge(self.texts.entry(name.id.as_str()).or_default(), texts);
                }
                if let Some(items) = self.items(value) {
                    merge(self.items.entry(name.id.as_str()).or_default(), items);
                }
            }
            Expr::Tuple(targets) => {
                if let Expr::Tuple(values) = value
                    && values.elts.len() == targets.elts.len()
                {
                    targets.elts.iter().zip(&values.elts).for_each(|(t, v)| self.assign(t, v));
                }
            }
            _ => {}
        }
    }

    /// The loop variable takes each item; of pairs, each part is taken alike.
    fn iterate(&mut self, target: &'a Expr, iter: &Expr) {
        let inner = match iter {
            Expr::Call(call) => match (&*call.func, &*call.arguments.args) {
                (Expr::Name(f), [inner, ..]) if f.id.as_str() == "enumerate" => match target {
                    Expr::Tuple(t) if t.elts.len() == 2 => return self.iterate(&t.elts[1], inner),
                    _ => inner,
                },
                (Expr::Name(f), lists) if f.id.as_str() == "zip" => {
                    if let Expr::Tuple(t) = target {
                        t.elts.iter().zip(lists).for_each(|(t, list)| self.iterate(t, list));
                    }
                    return;
                }
                (Expr::Attribute(a), []) if a.attr.as_str() == "items" => {
                    if let Expr::Tuple(t) = target
                        && let Some(key) = t.elts.first()
                    {
                        self.iterate(key, &a.value);
                    }
                    return;
                }
                _ => iter,
            },
            _ => iter,
        };
        // `for name, side in [("chair", "left"), …]`
        if let (Expr::Tuple(t), Expr::List(rows)) = (target, inner) {
            for row in &rows.elts {
                if let Expr::Tuple(row) = row {
                    t.elts.iter().zip(&row.elts).for_each(|(t, v)| self.assign(t, v));
                }
            }
            return;
        }
        if let (Expr::Name(name), Some(items)) = (target, self.items(inner)) {
            merge(self.texts.entry(name.id.as_str()).or_default(), items);
        }
    }
}

impl<'a> Visitor<'a> for Values<'a> {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        match stmt {
            Stmt::Assign(a) => a.targets.iter().for_each(|target| self.assign(target, &a.value)),
            Stmt::AnnAssign(a) => {
                if let Some(value) = &a.value {
                    self.assign(&a.target, value);
                }
            }
            Stmt::For(f) => self.iterate(&f.target, &f.iter),
            Stmt::FunctionDef(f) => {
                let names = f.parameters.iter_non_variadic_params().map(|p| p.name().as_str()).collect();
                self.parameters.insert(f.name.as_str(), names);
                for parameter in f.parameters.iter_non_variadic_params() {
                    if let Some(texts) = parameter.default().and_then(|default| self.texts(default)) {
                        merge(self.texts.entry(parameter.name().as_str()).or_default(), texts);
                    }
                }
            }
            _ => {}
        }
        visitor::walk_stmt(self, stmt);
    }

    fn visit_expr(&mut self, expr: &'a Expr) {
        match expr {
            Expr::Named(named) => self.assign(&named.target, &named.value),
            // What the program's own functions are called with.
            Expr::Call(call) => {
                if let Expr::Name(function) = &*call.func
                    && let Some(names) = self.parameters.get(function.id.as_str()).cloned()
                {
                    let given = names.iter().copied().zip(&*call.arguments.args);
                    let named = call.arguments.keywords.iter().filter_map(|keyword| {
                        let name = keyword.arg.as_ref()?.as_str();
                        Some((*names.iter().find(|n| **n == name)?, &keyword.value))
                    });
                    for (name, value) in given.chain(named).collect::<Vec<_>>() {
                        if let Some(texts) = self.texts(value) {
                            merge(self.texts.entry(name).or_default(), texts);
                        }
                        if let Some(items) = self.items(value) {
                            merge(self.items.entry(name).or_default(), items);
                        }
                    }
                }
            }
            _ => {}
        }
        visitor::walk_expr(self, expr);
    }

    fn visit_comprehension(&mut self, comprehension: &'a Comprehension) {
        self.iterate(&comprehension.target, &comprehension.iter);
        visitor::walk_comprehension(self, comprehension);
    }

    fn visit_annotation(&mut self, _: &'a Expr) {}
}

struct Prompts<'v, 'a, 'c> {
    values: &'v Values<'a>,
    checked: &'c mut Checked,
}

impl<'a> Visitor<'a> for Prompts<'_, 'a, '_> {
    fn visit_expr(&mut self, expr: &'a Expr) {
        if let Expr::Call(call) = expr
            && matches!(&*call.func, Expr::Name(f) if f.id.as_str() == "gd_detect" && f.ctx == ExprContext::Load)
            && let Some(prompt) = call.arguments.find_argument_value("prompt", 1)
        {
            match self.values.texts(prompt) {
                Some(texts) => merge(&mut self.checked.prompts, texts),
                None => self.checked.computed_prompts = true,
            }
        }
        visitor::walk_expr(self, expr);
    }

    fn visit_annotation(&mut self, _: &'a Expr) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(source: &str) -> Vec<String> {
        check(source).unwrap().prompts
    }

    /// Prompts in f-strings, variables and lists are found, not only literals in the call.
    #[test]
    fn defect_10_7_prompts_are_found_by_parsing() {
        for (source, wanted) in [
            ("gd_detect(img_pth, 'chair')", &["chair"][..]),
            ("gd_detect(img_pth=img_pth, prompt=\"red chair\")", &["red chair"]),
            ("n = 'sofa'\ngd_detect(img_pth, n)", &["sofa"]),
            ("c = 'red'\ngd_detect(img_pth, f'{c} chair')", &["red chair"]),
            ("for n in ['tv', 'lamp']:\n    gd_detect(img_pth, n)", &["tv", "lamp"]),
            ("x = [gd_detect(img_pth, n + 's') for n in ('tv', 'lamp')]", &["tvs", "lamps"]),
            ("ns = ['a', 'b']\nx = {n: gd_detect(img_pth, n) for n in ns}", &["a", "b"]),
            ("gd_detect(img_pth, ', '.join(['cup', 'bowl']))", &["cup, bowl"]),
            ("def f(name):\n    return gd_detect(img_pth, name)\nf('bed')\nf(name='box')", &["bed", "box"]),
            ("for i, (a, b) in enumerate([('x', 1)]):\n    gd_detect(img_pth, a)", &["x"]),
            ("for a, b in [('x', 'left'), ('y', 'right')]:\n    gd_detect(img_pth, a)", &["x", "y"]),
            ("for k, v in {'cat': 1}.items():\n    gd_detect(img_pth, k)", &["cat"]),
            ("gd_detect(img_pth, 'a' if x else 'b')", &["a", "b"]),
            ("gd_detect(img_pth, '{} ball'.format('red'))", &["red ball"]),
            ("gd_detect(img_pth, 'A').extend(gd_detect(img_pth, 'A'))", &["A"]),
            ("gd_detect(img_pth, 'Chair, Table'.lower())", &["chair, table"]),
            ("# gd_detect(img_pth, 'no')\ns = \"gd_detect(img_pth, 'no')\"", &[]),
        ] {
            assert_eq!(prompts(source), wanted, "{source}");
        }
        let computed = check("gd_detect(img_pth, vqa(img_pth, None, 'what?'))").unwrap();
        assert!(computed.computed_prompts && computed.prompts.is_empty());
    }

    /// An assignment to `img_pth` inside the program is seen, in whatever form.
    #[test]
    fn defect_10_14_assignments_to_the_picture_are_seen() {
        for (source, line) in [
            ("img_pth = 'x'", 1),
            ("x = 1\nimg_pth += 'x'", 2),
            ("if (img_pth := 'x'): pass", 1),
            ("y = [img_pth := 'x' for _ in 'a']", 1),
            ("for img_pth in 'ab': pass", 1),
            ("with open('x') as img_pth: pass", 1),
            ("(a, [b, *img_pth]) = c", 1),
            ("del img_pth", 1),
            ("import os as img_pth", 1),
            ("from os import path as img_pth", 1),
            ("def img_pth(): pass", 1),
            ("class img_pth: pass", 1),
            ("try: pass\nexcept E as img_pth: pass", 2),
            ("def f():\n    global img_pth\n    img_pth = 'x'", 3),
            ("img_pth: str = 'x'", 1),
            ("match x:\n    case img_pth: pass", 2),
        ] {
            assert_eq!(check(source).unwrap().img_pth_changed, [line], "{source}");
        }
        for source in [
            "x = img_pth",
            "def f(img_pth):\n    img_pth = 1",
            "g = lambda img_pth: img_pth",
            "y = [img_pth for img_pth in 'ab']",
            "img_pth: str",
            "x.img_pth = 1",
            "f(img_pth=img_pth)",
        ] {
            assert!(check(source).unwrap().img_pth_changed.is_empty(), "{source}");
        }
    }

    #[test]
    fn whether_an_answer_is_ever_set() {
        for (source, sets) in [
            ("final_answer = 1", true),
            ("if x:\n    for final_answer in y: pass", true),
            ("def f():\n    global final_answer\n    final_answer = 2\nf()", true),
            ("answer = 1", false),
            ("def f():\n    final_answer = 2\nf()", false),
            ("final_answer == 1", false),
        ] {
            assert_eq!(check(source).unwrap().sets_answer, sets, "{source}");
        }
    }

    #[test]
    fn syntax_errors_carry_their_line_and_hostile_text_is_refused() {
        let error = check("x = 1\nfinal_answer = (x +\n").unwrap_err();
        assert_eq!((error.type_name.as_deref(), error.line), (Some("SyntaxError"), Some(2)));
        for hostile in [
            "x = 1".to_owned() + &"+1".repeat(30_000),
            "x".to_owned() + &".x".repeat(30_000),
            "(".repeat(60_000),
        ] {
            assert!(check(&hostile).is_err());
        }
        let blocks: String = (0..300).map(|depth| format!("{}if x:\n", " ".repeat(depth))).collect();
        assert!(check(&blocks).is_err());
    }

    /// A thousand names that each hold what the one before holds twice over stay small.
    #[test]
    fn folding_is_bounded() {
        let mut source = "a0 = 'xx'\nb0 = ['p', 'q']\n".to_owned();
        for i in 0..500 {
            source.push_str(&format!(
                "a{} = a{i} + a{i}\nb{} = [x + y for x in b{i} for y in b{i}]\n",
                i + 1,
                i + 1
            ));
        }
        source.push_str("gd_detect(img_pth, a500)\nfor z in b500: gd_detect(img_pth, z)\n");
        assert!(check(&source).unwrap().prompts.len() <= MAX_VALUES);
    }
}
