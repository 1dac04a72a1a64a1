//! Bounds on a program's text before anything recursive reads it. ruff's parser limits the nesting
//! of brackets and blocks, but `1+1+1+…` and `x.x.x.…` become trees as deep as they are long:
//! dropping or visiting one overflows the stack of whoever does it.
//!
//! The lexer is iterative, so the bound costs one pass over the tokens and no recursion.

use ruff_python_ast::token::TokenKind;
use ruff_python_parser::{Mode, lexer};

/// Longest program text, bytes.
pub const MAX_SOURCE: usize = 64 << 10;
/// How deep the syntax tree of a program may be.
const MAX_DEPTH: usize = 1000;

/// Why a program was refused before parsing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooComplex {
    #[error("the program is {0} bytes long, at most {MAX_SOURCE} are read")]
    Long(usize),
    #[error("the program is too deeply nested or has too long a chain of operators")]
    Deep,
    #[error("source code cannot contain null bytes")]
    NullByte,
}

/// Refuses text whose syntax tree could be deeper than a small stack can bear.
///
/// # Errors
/// [`TooComplex`].
pub fn check(source: &str) -> Result<(), TooComplex> {
    if source.len() > MAX_SOURCE {
        return Err(TooComplex::Long(source.len()));
    }
    if source.contains('\0') {
        return Err(TooComplex::NullByte);
    }
    let mut tokens = lexer::lex(source, Mode::Module);
    // One counter per open bracket: links of the chain that may be growing there.
    let mut open = vec![0usize];
    let mut depth = 0;
    let mut blocks = 0usize;
    loop {
        use TokenKind as T;
        let kind = tokens.next_token();
        let nested = open.len() > 1;
        let chain = open.last_mut().expect("the outermost counter is never popped");
        match kind {
            T::EndOfFile => return Ok(()),
            T::Lpar | T::Lsqb | T::Lbrace => {
                // A call or a subscript is also a link of the chain it continues.
                *chain += 1;
                depth += 1;
                open.push(0);
            }
            T::Rpar | T::Rsqb | T::Rbrace if nested => depth -= open.pop().unwrap_or(0),
            T::Indent => blocks += 1,
            T::Dedent => blocks = blocks.saturating_sub(1),
            T::Comma | T::Newline | T::Semi | T::Equal => {
                depth -= *chain;
                *chain = 0;
            }
            T::Dot
            | T::Plus
            | T::Minus
            | T::Star
            | T::DoubleStar
            | T::Slash
            | T::DoubleSlash
            | T::Percent
            | T::At
            | T::Vbar
            | T::Amper
            | T::CircumFlex
            | T::LeftShift
            | T::RightShift
            | T::Tilde
            | T::And
            | T::Or
            | T::Not
            | T::If
            | T::Else
            | T::Lambda
            | T::For
            | T::Await
            | T::Colon
            | T::ColonEqual
            | T::FStringStart
            | T::TStringStart => {
                *chain += 1;
                depth += 1;
            }
            _ => {}
        }
        if depth + 4 * blocks > MAX_DEPTH {
            return Err(TooComplex::Deep);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_chains_are_refused_long_lists_are_not() {
        let chain = |op: &str| format!("x = 1{}", op.repeat(20_000));
        for op in ["+1", ".x", "()", "[0]", " and 1", " if 1 else 1"] {
            let source = chain(op);
            let source = &source[..source.len().min(MAX_SOURCE)];
            assert!(matches!(check(source), Err(TooComplex::Deep)), "{op}");
        }
        assert_eq!(check(&"(".repeat(5000)), Err(TooComplex::Deep));
        assert_eq!(check(&format!("x = [{}]", "-1, f(2).a, ".repeat(4000))), Ok(()));
        assert_eq!(check(&"x = a.b + c * (d - e)[0]\n".repeat(2000)), Ok(()));
        assert!(check("x = '\0'").is_err());
        assert!(check(&" ".repeat(MAX_SOURCE + 1)).is_err());
    }
}
