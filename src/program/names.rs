//! Who binds which name where: one walk over a program, used by the checks and by the rewriting.

use ruff_python_ast::visitor::{self, Visitor};
use ruff_python_ast::{Comprehension, ExceptHandler, Expr, ExprContext, Parameters, Pattern, Stmt};
use ruff_text_size::{Ranged, TextRange};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// Assignment of any form, `for`, `with`, `except … as`, `def`, `class`, `import`, `match`, `:=`.
    Assign,
    Delete,
    /// A parameter of a function or lambda.
    Parameter,
    /// The variable of a comprehension, which is the comprehension's own.
    Comprehension,
    /// `global name`: what the function assigns is the module's.
    Global,
    Nonlocal,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Binding<'a> {
    pub name: &'a str,
    pub range: TextRange,
    pub how: How,
    /// Functions, lambdas and classes around it; 0 is the program itself.
    pub depth: u32,
}

/// All bindings of a program, in the order of evaluation.
pub(super) fn bindings(body: &[Stmt]) -> Vec<Binding<'_>> {
    let mut walk = Walk { found: vec![], depth: 0, comprehension: false };
    walk.visit_body(body);
    walk.found
}

struct Walk<'a> {
    found: Vec<Binding<'a>>,
    depth: u32,
    comprehension: bool,
}

impl<'a> Walk<'a> {
    fn add(&mut self, name: &'a str, range: TextRange, how: How) {
        self.found.push(Binding { name, range, how, depth: self.depth });
    }

    fn parameters(&mut self, parameters: &'a Parameters) {
        for parameter in parameters {
            let name = parameter.name();
            self.add(name.as_str(), name.range(), How::Parameter);
        }
    }
}

impl<'a> Visitor<'a> for Walk<'a> {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        match stmt {
            Stmt::FunctionDef(f) => {
                for decorator in &f.decorator_list {
                    self.visit_decorator(decorator);
                }
                for default in f.parameters.iter_non_variadic_params().filter_map(|p| p.default()) {
                    self.visit_expr(default);
                }
                self.add(f.name.as_str(), f.name.range(), How::Assign);
                self.depth += 1;
                self.parameters(&f.parameters);
                self.visit_body(&f.body);
                self.depth -= 1;
                return;
            }
            Stmt::ClassDef(c) => {
                for decorator in &c.decorator_list {
                    self.visit_decorator(decorator);
                }
                if let Some(arguments) = &c.arguments {
                    self.visit_arguments(arguments);
                }
                self.add(c.name.as_str(), c.name.range(), How::Assign);
                self.depth += 1;
                self.visit_body(&c.body);
                self.depth -= 1;
                return;
            }
            Stmt::Import(import) => {
                for alias in &import.names {
                    let dotted = alias.asname.as_ref().unwrap_or(&alias.name).as_str();
                    self.add(dotted.split('.').next().unwrap_or(dotted), alias.range(), How::Assign);
                }
            }
            Stmt::ImportFrom(import) => {
                for alias in &import.names {
                    let name = alias.asname.as_ref().unwrap_or(&alias.name);
                    self.add(name.as_str(), alias.range(), How::Assign);
                }
            }
            // `x: int` alone binds nothing.
            Stmt::AnnAssign(a) if a.value.is_none() => return,
            Stmt::Global(g) => g.names.iter().for_each(|n| self.add(n.as_str(), n.range(), How::Global)),
            Stmt::Nonlocal(g) => g.names.iter().for_each(|n| self.add(n.as_str(), n.range(), How::Nonlocal)),
            _ => {}
        }
        visitor::walk_stmt(self, stmt);
    }

    fn visit_annotation(&mut self, _: &'a Expr) {}

    fn visit_expr(&mut self, expr: &'a Expr) {
        match expr {
            Expr::Name(name) => match name.ctx {
                ExprContext::Store if self.comprehension => {
                    self.add(name.id.as_str(), name.range, How::Comprehension)
                }
                ExprContext::Store => self.add(name.id.as_str(), name.range, How::Assign),
                ExprContext::Del => self.add(name.id.as_str(), name.range, How::Delete),
                _ => {}
            },
            Expr::Lambda(lambda) => {
                self.depth += 1;
                if let Some(parameters) = &lambda.parameters {
                    self.parameters(parameters);
                }
                self.visit_expr(&lambda.body);
                self.depth -= 1;
            }
            _ => visitor::walk_expr(self, expr),
        }
    }

    fn visit_comprehension(&mut self, comprehension: &'a Comprehension) {
        self.visit_expr(&comprehension.iter);
        self.comprehension = true;
        self.visit_expr(&comprehension.target);
        self.comprehension = false;
        comprehension.ifs.iter().for_each(|test| self.visit_expr(test));
    }

    fn visit_except_handler(&mut self, handler: &'a ExceptHandler) {
        let ExceptHandler::ExceptHandler(h) = handler;
        if let Some(name) = &h.name {
            self.add(name.as_str(), name.range(), How::Assign);
        }
        visitor::walk_except_handler(self, handler);
    }

    fn visit_pattern(&mut self, pattern: &'a Pattern) {
        let name = match pattern {
            Pattern::MatchAs(p) => p.name.as_ref(),
            Pattern::MatchStar(p) => p.name.as_ref(),
            Pattern::MatchMapping(p) => p.rest.as_ref(),
            _ => None,
        };
        if let Some(name) = name {
            self.add(name.as_str(), name.range(), How::Assign);
        }
        visitor::walk_pattern(self, pattern);
    }
}
