//! The library that rewritten programs call, in Python, in parts: a program gets the ones it names
//! and those that they name.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use super::OURS;

const FILES: [&str; 3] = [
    include_str!("../prelude/language.py"),
    include_str!("../prelude/modules.py"),
    include_str!("../prelude/arrays.py"),
];

struct Part {
    text: &'static str,
    /// Other parts that it names.
    needs: Vec<&'static str>,
}

/// By the name that each defines.
static PARTS: LazyLock<HashMap<&'static str, Part>> = LazyLock::new(|| {
    let mut parts = HashMap::new();
    for file in FILES {
        let mut starts: Vec<usize> = vec![];
        let mut at = 0;
        for line in file.split_inclusive('\n') {
            if line.starts_with("def ") || line.starts_with("class ") || line.starts_with(OURS) {
                starts.push(at);
            }
            at += line.len();
        }
        starts.push(file.len());
        for pair in starts.windows(2) {
            let text = &file[pair[0]..pair[1]];
            let mut named = names(text);
            if let Some(name) = named.next() {
                let needs = named.filter(|other| *other != name).collect();
                parts.insert(name, Part { text, needs });
            }
        }
    }
    parts
});

/// Our names in a text.
fn names(text: &str) -> impl Iterator<Item = &str> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.match_indices(OURS).filter_map(move |(at, _)| {
        if text[..at].ends_with(word) {
            return None;
        }
        let rest = &text[at..];
        Some(&rest[..rest.find(|c| !word(c)).unwrap_or(rest.len())])
    })
}

/// Our function for a module's member, `numpy.mean` say, if there is one.
pub(super) fn for_path(path: &str) -> Option<String> {
    // Dots and underscores both become underscores; no two of our names meet.
    let name = format!("{OURS}{}", path.replace('.', "_"));
    PARTS.contains_key(name.as_str()).then_some(name)
}

/// Builtins that the library calls. It keeps those that a program binds for itself under names of its own.
const BUILTINS: [&str; 31] = [
    "abs",
    "all",
    "any",
    "bool",
    "chr",
    "dict",
    "divmod",
    "enumerate",
    "float",
    "getattr",
    "hasattr",
    "int",
    "isinstance",
    "iter",
    "len",
    "list",
    "map",
    "max",
    "min",
    "next",
    "pow",
    "range",
    "repr",
    "reversed",
    "round",
    "set",
    "slice",
    "sorted",
    "str",
    "sum",
    "tuple",
];

/// Replaces `name` in Python as our library is written, without escapes in strings, where it stands for a value:
/// not in strings, not as an attribute, method or keyword.
fn renamed(text: &str, name: &str, new: &str) -> String {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut out = String::with_capacity(text.len());
    let (mut at, mut quote) = (0, None);
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let free = quote.is_none() && !out.ends_with(word) && !out.ends_with('.') && !out.ends_with("def ");
        if free && rest.starts_with(name) && !rest[name.len()..].starts_with(|c| word(c) || c == '=') {
            out.push_str(new);
            at += name.len();
            continue;
        }
        quote = match quote {
            None if c == '\'' || c == '"' => Some(c),
            Some(open) if c == open => None,
            other => other,
        };
        out.push(c);
        at += c.len_utf8();
    }
    out
}

/// Appends the parts that `program`, which binds the names `bound`, needs, in a fixed order.
pub(super) fn add(program: &str, bound: &HashSet<&str>, out: &mut String) {
    let mut wanted: Vec<(&str, Cow<'static, str>)> = vec![];
    let mut next: Vec<Cow<'static, str>> = names(program).map(|name| Cow::Owned(name.to_owned())).collect();
    while let Some(name) = next.pop() {
        let Some((name, part)) = PARTS.get_key_value(&*name) else { continue };
        if wanted.iter().any(|(known, _)| known == name) {
            continue;
        }
        if part.text.starts_with("class ") {
            // Its methods name most of the library: only those that the program may call.
            let text = used_methods(part.text, program);
            next.extend(names(&text).map(|name| Cow::Owned(name.to_owned())));
            wanted.push((name, Cow::Owned(text)));
        } else {
            next.extend(part.needs.iter().map(|name| Cow::Borrowed(*name)));
            wanted.push((name, Cow::Borrowed(part.text)));
        }
    }
    wanted.sort_unstable();
    let taken: Vec<&str> = BUILTINS.into_iter().filter(|name| bound.contains(name)).collect();
    if !wanted.is_empty() {
        taken.iter().for_each(|name| out.push_str(&format!("{OURS}own_{name} = {name}\n")));
    }
    for (_, text) in wanted {
        let own = |text: Cow<'static, str>, name: &&str| {
            Cow::Owned(renamed(&text, name, &format!("{OURS}own_{name}")))
        };
        out.push_str(&taken.iter().fold(text, own));
    }
}

/// A class without the methods whose name the program never reads.
fn used_methods(class: &str, program: &str) -> String {
    let mut keep = true;
    let kept = class.split_inclusive('\n').filter(|line| {
        if let Some(method) = line.strip_prefix("    def ") {
            let name = &method[..method.find('(').unwrap_or(0)];
            keep = name.starts_with("__") || program.contains(&format!(".{name}"));
        }
        keep || line.starts_with("class ")
    });
    kept.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_that_a_part_needs_is_defined() {
        for (name, part) in PARTS.iter() {
            for need in &part.needs {
                // Locals of rewritten programs, not of the library.
                assert!(
                    PARTS.contains_key(need) || ["_v_out", "_v_bases", "_v_prop_"].contains(need),
                    "{name}: {need}"
                );
            }
        }
    }

    #[test]
    fn a_program_gets_what_it_names() {
        let mut out = String::new();
        let none = HashSet::new();
        add("x = _v_mod(a, b)", &none, &mut out);
        assert!(out.contains("def _v_mod(") && out.contains("def _v_percent("));
        assert!(!out.contains("numpy"));
        out.clear();
        add("x = a % b", &none, &mut out);
        assert_eq!(out, "");
        add("str = _v_min(a, key=b)", &["str", "list"].into(), &mut out);
        assert!(out.starts_with("_v_own_list = list\n_v_own_str = str\n"), "{out}");
        assert!(out.contains("items = _v_own_list(args[0])") && !out.contains(" list("), "{out}");
        assert_eq!(
            renamed("def min(x, a): return x.min(min=min('min', a))", "min", "m"),
            "def min(x, a): return x.min(min=m('min', a))"
        );
        assert_eq!(for_path("numpy.linalg.norm").as_deref(), Some("_v_numpy_linalg_norm"));
        assert_eq!(for_path("numpy.fft"), None);
    }
}
