//! Sentences with `{slots}`: filling them, and reading them back.

/// Puts values into the slots of a template.
///
/// # Panics
/// On an unclosed slot: templates are part of the source.
pub fn fill(template: &str, mut value: impl FnMut(&str) -> String) -> String {
    let mut out = String::with_capacity(template.len() + 32);
    let mut rest = template;
    while let Some(open) = rest.find('{') {
        let close = rest[open..].find('}').expect("a closed slot") + open;
        out.push_str(&rest[..open]);
        out.push_str(&value(&rest[open + 1..close]));
        rest = &rest[close + 1..];
    }
    out.push_str(rest);
    out
}

/// What stands in the slots of `template` if all of `text` follows it, in the slots' order.
/// `accept` says what a slot may hold, which settles where it ends.
pub fn read<'t>(
    template: &'t str,
    text: &'t str,
    accept: &impl Fn(&str, &str) -> bool,
) -> Option<Vec<(&'t str, &'t str)>> {
    let mut slots = Vec::new();
    follow(template, text, accept, &mut slots).then_some(slots)
}

fn follow<'t>(
    template: &'t str,
    text: &'t str,
    accept: &impl Fn(&str, &str) -> bool,
    slots: &mut Vec<(&'t str, &'t str)>,
) -> bool {
    let Some(open) = template.find('{') else { return template == text };
    let Some(text) = text.strip_prefix(&template[..open]) else { return false };
    let close = template[open..].find('}').expect("a closed slot") + open;
    let (slot, rest) = (&template[open + 1..close], &template[close + 1..]);
    let literal = &rest[..rest.find('{').unwrap_or(rest.len())];
    let ends: Vec<usize> = match literal {
        "" => vec![text.len()],
        _ => text.match_indices(literal).map(|(at, _)| at).collect(),
    };
    for end in ends {
        if end > 0 && accept(slot, &text[..end]) {
            slots.push((slot, &text[..end]));
            if follow(rest, &text[end..], accept, slots) {
                return true;
            }
            slots.pop();
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_filled() {
        let template = "Is the {a} {side} the {b}?";
        let text = fill(template, |slot| match slot {
            "a" => "red chair".into(),
            "side" => "to the left of".into(),
            _ => "sofa".into(),
        });
        assert_eq!(text, "Is the red chair to the left of the sofa?");
        let accept = |slot: &str, held: &str| slot != "side" || held == "to the left of";
        assert_eq!(
            read(template, &text, &accept).unwrap(),
            [("a", "red chair"), ("side", "to the left of"), ("b", "sofa")]
        );
        assert_eq!(read(template, "Is the lamp on the sofa?", &accept), None);
        assert_eq!(read("It is {c}", "It is ", &|_, _| true), None);
    }
}
