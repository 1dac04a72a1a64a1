//! Between the interpreter's values and those that may leave the worker.

use monty_types::{MontyObject, MontyType};

use super::wire::Plain;

/// What may still cross, counted down.
pub(super) struct Budget {
    pub depth: u32,
    pub nodes: usize,
    pub text: usize,
}

/// A copy of `value` that can leave the worker. Tuples and sets become lists, an array of the numpy
/// shim its nested list.
///
/// # Errors
/// Why it cannot: what it is, or that it is too large.
pub(super) fn to_plain(value: &MontyObject, budget: &mut Budget) -> Result<Plain, String> {
    budget.nodes = budget.nodes.checked_sub(1).ok_or("a value with too many parts")?;
    Ok(match value {
        MontyObject::None => Plain::None,
        MontyObject::Bool(b) => Plain::Bool(*b),
        MontyObject::Int(i) => Plain::Int(*i),
        MontyObject::Float(f) => Plain::Float(*f),
        MontyObject::String(s) => Plain::Str(text(s, budget)?),
        MontyObject::BigInt(_) => return Err("an int of more than 64 bits".to_owned()),
        MontyObject::List(items)
        | MontyObject::Tuple(items)
        | MontyObject::Set(items)
        | MontyObject::FrozenSet(items)
        | MontyObject::NamedTuple { values: items, .. } => {
            enter(budget)?;
            let items = items.iter().map(|item| to_plain(item, budget)).collect::<Result<_, _>>()?;
            budget.depth += 1;
            Plain::List(items)
        }
        MontyObject::Dict(pairs) => {
            enter(budget)?;
            let mut items = Vec::new();
            for (key, value) in pairs {
                items.push((key_text(key, budget)?, to_plain(value, budget)?));
            }
            budget.depth += 1;
            Plain::Dict(items)
        }
        MontyObject::ClassInstance(instance) if instance.class_type.name == "_v_ndarray" => {
            let mut attrs = (&instance.attrs).into_iter();
            let data = attrs.find(|(name, _)| matches!(name, MontyObject::String(s) if s == "data"));
            return to_plain(data.map(|(_, data)| data).ok_or("an array without data")?, budget);
        }
        MontyObject::ClassInstance(instance) => {
            return Err(format!("a '{}' object", instance.class_type.name));
        }
        MontyObject::Cycle(..) => return Err("a value that holds itself".to_owned()),
        MontyObject::Repr(_) => return Err("a value nested too deeply, or not data".to_owned()),
        MontyObject::Type(MontyType::Instance(_)) | MontyObject::Type(_) => return Err("a type".to_owned()),
        MontyObject::Function { .. } | MontyObject::BuiltinFunction(_) => return Err("a function".to_owned()),
        _ => return Err("a value that JSON does not have".to_owned()),
    })
}

fn enter(budget: &mut Budget) -> Result<(), String> {
    budget.depth = budget.depth.checked_sub(1).ok_or("a value nested too deeply")?;
    Ok(())
}

fn text(text: &str, budget: &mut Budget) -> Result<String, String> {
    budget.text = budget.text.checked_sub(text.len()).ok_or("a value with too much text")?;
    Ok(text.to_owned())
}

/// The key as `json.dumps` would write it.
fn key_text(key: &MontyObject, budget: &mut Budget) -> Result<String, String> {
    match key {
        MontyObject::String(s) => text(s, budget),
        MontyObject::Int(i) => Ok(i.to_string()),
        MontyObject::Bool(b) => Ok(b.to_string()),
        MontyObject::None => Ok("null".to_owned()),
        MontyObject::Float(f) if f.is_finite() => Ok(format!("{f:?}")),
        _ => Err("a dict whose keys are not strings".to_owned()),
    }
}

/// A tool's answer as the program gets it.
pub(super) fn from_plain(value: Plain) -> MontyObject {
    match value {
        Plain::None => MontyObject::None,
        Plain::Bool(b) => MontyObject::Bool(b),
        Plain::Int(i) => MontyObject::Int(i),
        Plain::Float(f) => MontyObject::Float(f),
        Plain::Str(s) => MontyObject::String(s),
        Plain::List(items) => MontyObject::List(items.into_iter().map(from_plain).collect()),
        Plain::Dict(items) => MontyObject::dict(
            items.into_iter().map(|(k, v)| (MontyObject::String(k), from_plain(v))).collect::<Vec<_>>(),
        ),
    }
}
