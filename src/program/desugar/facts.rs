//! What the rewriting has to know of a whole program before it touches any line of it.

use std::collections::{HashMap, HashSet};

use ruff_python_ast::visitor::{self, Visitor};
use ruff_python_ast::{Expr, ExprContext, Stmt, StmtClassDef, StringLiteral};
use ruff_text_size::TextSize;

use super::line_of;
use crate::program::names::{self, How};

/// A class of the program.
#[derive(Debug, Default)]
pub(super) struct Class<'a> {
    /// Its own bases that are classes of the program too.
    pub bases: Vec<&'a str>,
    pub members: Vec<&'a str>,
    pub classmethods: HashSet<&'a str>,
}

#[derive(Debug, Default)]
pub(super) struct Facts<'a> {
    /// Every name that is bound anywhere.
    pub bound: HashSet<&'a str>,
    /// Names bound by the program's own statements, not inside functions.
    pub top: Vec<&'a str>,
    pub nonlocals: HashSet<&'a str>,
    /// Names that functions declare to be the module's.
    pub globals: HashSet<&'a str>,
    /// There is a bare `return`, or one of `exits`.
    pub returns: bool,
    /// Where statements begin by which the program ends itself, with the answer that it has by then. (Not inside
    /// functions, nor where something would be done on the way out: there they are refused.)
    pub exits: HashSet<TextSize>,
    /// Names that stand for modules, with the module's full name.
    pub modules: HashMap<&'a str, String>,
    pub refused: HashSet<&'a str>,
    pub numpy: bool,
    /// `math` is used without an import: programs are given it.
    pub implicit_math: bool,
    pub classes: HashMap<&'a str, Class<'a>>,
    pub properties: HashSet<&'a str>,
    /// Attributes that hold what the program puts there, `self.count = 0` say.
    pub fields: HashSet<&'a str>,
    /// Static methods, each with a class that has it.
    pub statics: HashMap<&'a str, &'a str>,
    /// The program's own exception classes, each with the builtin that stands for it.
    pub exceptions: HashMap<&'a str, &'static str>,
    pub raises: HashSet<u32>,
}

/// Modules that reach for the machine: importing one is harmless, using it ends the program.
pub(in crate::program) const REFUSED_MODULES: &[&str] = &[
    "asyncio",
    "atexit",
    "builtins",
    "concurrent",
    "cffi",
    "code",
    "codecs",
    "contextvars",
    "ctypes",
    "datetime",
    "dis",
    "fcntl",
    "gc",
    "glob",
    "http",
    "imp",
    "importlib",
    "inspect",
    "io",
    "linecache",
    "logging",
    "marshal",
    "mmap",
    "multiprocessing",
    "os",
    "pathlib",
    "pickle",
    "pkgutil",
    "platform",
    "posix",
    "pty",
    "random",
    "requests",
    "resource",
    "runpy",
    "secrets",
    "select",
    "shelve",
    "shutil",
    "signal",
    "site",
    "socket",
    "sqlite3",
    "ssl",
    "subprocess",
    "sys",
    "sysconfig",
    "tempfile",
    "threading",
    "time",
    "traceback",
    "types",
    "urllib",
    "uuid",
    "warnings",
    "weakref",
    "zipfile",
];

/// Builtins that no program gets to see raised otherwise: each can stand for one exception class
/// of the program, which `except` then tells from the rest.
const STAND_INS: [&str; 3] = ["NotADirectoryError", "IsADirectoryError", "FileExistsError"];

impl<'a> Facts<'a> {
    pub fn collect(source: &str, body: &'a [Stmt]) -> Self {
        let mut facts = Self::default();
        for binding in names::bindings(body) {
            facts.bound.insert(binding.name);
            match binding.how {
                How::Nonlocal => {
                    facts.nonlocals.insert(binding.name);
                }
                How::Global => {
                    facts.globals.insert(binding.name);
                }
                How::Assign | How::Delete if binding.depth == 0 => facts.top.push(binding.name),
                _ => {}
            }
        }
        let mut walk = Walk { source, facts: &mut facts, functions: 0, tries: 0 };
        walk.visit_body(body);
        for (name, module) in [("np", "numpy"), ("math", "math")] {
            if !facts.bound.contains(name) {
                facts.modules.insert(name, module.to_owned());
            }
        }
        facts
    }

    /// The dotted name of what an expression like `np.linalg.norm` stands for.
    pub fn path(&self, expr: &Expr) -> Option<String> {
        match expr {
            Expr::Name(name) => self.modules.get(name.id.as_str()).cloned(),
            Expr::Attribute(a) => Some(format!("{}.{}", self.path(&a.value)?, a.attr.as_str())),
            _ => None,
        }
    }

    /// Does the whole program become a function, one blank further in?
    pub fn wrapped(&self) -> bool {
        self.returns || !self.nonlocals.is_empty()
    }

    /// Is `name` still the builtin of that name?
    pub fn builtin(&self, name: &str) -> bool {
        !self.bound.contains(name)
    }

    /// All bases of a class, nearest first.
    pub fn ancestors(&self, class: &str) -> Vec<&'a str> {
        let mut found: Vec<&str> = vec![];
        let mut next: Vec<&str> = self.classes.get(class).map_or_else(Vec::new, |c| c.bases.clone());
        while !next.is_empty() && found.len() < 32 {
            let base = next.remove(0);
            if !found.contains(&base) {
                found.push(base);
                next.extend(self.classes.get(base).into_iter().flat_map(|c| c.bases.iter().copied()));
            }
        }
        found
    }
}

struct Walk<'s, 'f, 'a> {
    source: &'s str,
    facts: &'f mut Facts<'a>,
    functions: u32,
    tries: u32,
}

impl<'a> Walk<'_, '_, 'a> {
    /// `exit()`, `quit()`, `sys.exit()`, whatever code they give.
    fn is_exit(&self, expr: &Expr) -> bool {
        let Expr::Call(call) = expr else { return false };
        if !self.facts.bound.contains("final_answer") {
            return false;
        }
        match &*call.func {
            Expr::Name(name) => {
                matches!(name.id.as_str(), "exit" | "quit") && self.facts.builtin(name.id.as_str())
            }
            Expr::Attribute(a) => {
                let sys = |e: &Expr| matches!(e, Expr::Name(n) if n.id.as_str() == "sys");
                a.attr.as_str() == "exit" && sys(&a.value) && self.facts.refused.contains("sys")
            }
            _ => false,
        }
    }

    fn import(&mut self, name: &'a str, module: &str) {
        let root = module.split('.').next().unwrap_or(module);
        if REFUSED_MODULES.contains(&root) {
            self.facts.refused.insert(name);
        } else {
            self.facts.modules.insert(name, module.to_owned());
            self.facts.numpy |= root == "numpy";
        }
    }

    fn class(&mut self, class: &'a StmtClassDef) {
        let mut entry = Class::default();
        let bases = class.arguments.as_ref().map_or(&[][..], |a| &a.args);
        for base in bases {
            if let Expr::Name(base) = base {
                let base = base.id.as_str();
                if self.facts.classes.contains_key(base) {
                    entry.bases.push(base);
                } else if base == "Exception"
                    && bases.len() == 1
                    && is_empty(&class.body)
                    && let Some(stand_in) = STAND_INS.get(self.facts.exceptions.len())
                {
                    self.facts.exceptions.insert(class.name.as_str(), stand_in);
                }
            }
        }
        for stmt in &class.body {
            let targets = match stmt {
                Stmt::Assign(a) => &a.targets[..],
                Stmt::AnnAssign(a) => std::slice::from_ref(&*a.target),
                _ => &[],
            };
            self.facts.fields.extend(targets.iter().filter_map(|t| Some(t.as_name_expr()?.id.as_str())));
            match stmt {
                Stmt::FunctionDef(f) => {
                    let name = f.name.as_str();
                    let decorated = |with: &str| {
                        f.decorator_list
                            .iter()
                            .any(|d| matches!(&d.expression, Expr::Name(n) if n.id.as_str() == with))
                    };
                    if decorated("property") {
                        self.facts.properties.insert(name);
                    }
                    if decorated("staticmethod") {
                        self.facts.statics.insert(name, class.name.as_str());
                    }
                    if decorated("classmethod") {
                        entry.classmethods.insert(name);
                    }
                    entry.members.push(name);
                }
                Stmt::Assign(a) => {
                    entry.members.extend(a.targets.iter().filter_map(|t| Some(t.as_name_expr()?.id.as_str())))
                }
                Stmt::AnnAssign(a) if a.value.is_some() => {
                    entry.members.extend(a.target.as_name_expr().map(|name| name.id.as_str()));
                }
                _ => {}
            }
        }
        self.facts.classes.insert(class.name.as_str(), entry);
    }
}

/// A class body of nothing but `pass`, `...` and a docstring.
fn is_empty(body: &[Stmt]) -> bool {
    body.iter().all(|stmt| match stmt {
        Stmt::Pass(_) => true,
        Stmt::Expr(e) => e.value.is_string_literal_expr() || e.value.is_ellipsis_literal_expr(),
        _ => false,
    })
}

fn is_namedtuple(function: &Expr) -> bool {
    match function {
        Expr::Name(name) => name.id.as_str() == "namedtuple",
        Expr::Attribute(a) => a.attr.as_str() == "namedtuple",
        _ => false,
    }
}

/// The strings in an expression, each part of a joined one for itself.
struct Words<'a>(Vec<&'a str>);

impl<'a> Visitor<'a> for Words<'a> {
    fn visit_string_literal(&mut self, literal: &'a StringLiteral) {
        self.0.push(&literal.value);
    }
}

impl<'a> Visitor<'a> for Walk<'_, '_, 'a> {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        match stmt {
            Stmt::Return(_) => self.facts.returns |= self.functions == 0,
            Stmt::Expr(e) if self.functions + self.tries == 0 && self.is_exit(&e.value) => {
                self.facts.returns = true;
                self.facts.exits.insert(e.range.start());
            }
            Stmt::Raise(raise) if raise.exc.is_some() => {
                let line = |at: TextSize| line_of(self.source, at.to_usize());
                self.facts.raises.extend(line(raise.range.start())..=line(raise.range.end()));
            }
            Stmt::Import(import) => {
                for alias in &import.names {
                    match &alias.asname {
                        Some(name) => self.import(name.as_str(), alias.name.as_str()),
                        None => {
                            let root = alias.name.as_str().split('.').next().unwrap_or_default();
                            self.import(root, root);
                        }
                    }
                }
            }
            Stmt::ImportFrom(import) => {
                let module = import.module.as_ref().map_or("", |m| m.as_str());
                for alias in &import.names {
                    let name = alias.asname.as_ref().unwrap_or(&alias.name).as_str();
                    self.import(name, &format!("{module}.{}", alias.name.as_str()));
                }
            }
            Stmt::ClassDef(class) => self.class(class),
            _ => {}
        }
        let function = matches!(stmt, Stmt::FunctionDef(_) | Stmt::ClassDef(_));
        let tries = matches!(stmt, Stmt::Try(_) | Stmt::With(_));
        self.functions += u32::from(function);
        self.tries += u32::from(tries);
        visitor::walk_stmt(self, stmt);
        self.functions -= u32::from(function);
        self.tries -= u32::from(tries);
    }

    fn visit_expr(&mut self, expr: &'a Expr) {
        match expr {
            Expr::Name(name) => {
                let name = name.id.as_str();
                self.facts.numpy |= name == "np" && !self.facts.bound.contains("np");
                self.facts.implicit_math |= name == "math" && !self.facts.bound.contains("math");
            }
            Expr::Attribute(a) if a.ctx == ExprContext::Store => {
                self.facts.fields.insert(a.attr.as_str());
            }
            Expr::Call(call) if is_namedtuple(&call.func) => {
                let mut words = Words(vec![]);
                words.visit_arguments(&call.arguments);
                let names = words.0.into_iter().flat_map(|text| text.split([' ', ',']));
                self.facts.fields.extend(names.filter(|name| !name.is_empty()));
            }
            _ => {}
        }
        visitor::walk_expr(self, expr);
    }

    fn visit_annotation(&mut self, _: &'a Expr) {}
}
