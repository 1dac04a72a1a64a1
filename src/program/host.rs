//! The main process's end of a tool call: bind the arguments as Python would, check their types,
//! refuse any other picture, ask the tool, record what it said.
//!
//! Arguments come from a worker that may be under a program's control: nothing in them is trusted.

use std::time::Instant;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Limits, wire::Plain};
use crate::sight::{BBox, Detection, ToolError, Tools};

/// One call of a tool by a program, as it went: an entry of the trace.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ToolCall {
    pub tool: String,
    /// By parameter name, without the picture.
    pub args: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<Value>,
    /// The exception that the program saw instead, `Type: message`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Line of the call in the program, where the call names the tool directly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    pub seconds: f64,
}

/// A Python exception for the program.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Raised {
    pub type_name: &'static str,
    pub message: String,
}

fn raised(type_name: &'static str, message: impl Into<String>) -> Raised {
    Raised { type_name, message: message.into() }
}

/// What the worker said that the program wants.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Request {
    pub tool: String,
    pub args: Vec<Plain>,
    pub kwargs: Vec<(String, Plain)>,
    pub line: Option<u32>,
}

/// The tools' names and parameters, the same for stub, mock, oracle and real (method.md 10.12).
pub(super) const SIGNATURES: [(&str, &[&str]); 5] = [
    ("gd_detect", &["img_pth", "prompt"]),
    ("depth", &["img_pth", "bbox"]),
    ("vqa", &["img_pth", "bbox", "prompt"]),
    ("point3d", &["img_pth", "bbox"]),
    ("size3d", &["img_pth", "bbox"]),
];

/// Of [`SIGNATURES`] those that a program has on request only.
const EXTENDED: [&str; 2] = ["point3d", "size3d"];

/// Answers one call. The second part is the entry for the trace.
pub(super) fn call(
    request: &Request,
    img_pth: &str,
    limits: &Limits,
    tools: &mut dyn Tools,
) -> (Result<Plain, Raised>, ToolCall) {
    let started = Instant::now();
    let mut shown = Map::new();
    let result = answer(request, img_pth, limits, tools, &mut shown);
    let entry = ToolCall {
        tool: request.tool.clone(),
        args: Value::Object(shown),
        value: result.as_ref().ok().and_then(Plain::to_json),
        error: result.as_ref().err().map(|e| format!("{}: {}", e.type_name, e.message)),
        line: request.line,
        seconds: started.elapsed().as_secs_f64(),
    };
    (result, entry)
}

fn answer(
    request: &Request,
    img_pth: &str,
    limits: &Limits,
    tools: &mut dyn Tools,
    shown: &mut Map<String, Value>,
) -> Result<Plain, Raised> {
    let offered = |name: &str| name == request.tool && (limits.extended_tools || !EXTENDED.contains(&name));
    let Some((tool, params)) = SIGNATURES.into_iter().find(|(name, _)| offered(name)) else {
        return Err(raised("NameError", format!("name '{}' is not defined", request.tool)));
    };
    let bound = bind(tool, params, request)?;
    let arg = |name: &str| bound[params.iter().position(|p| *p == name).expect("a parameter of this tool")];
    match arg("img_pth") {
        Plain::Str(path) if path == img_pth => {}
        Plain::Str(path) => {
            shown.insert("img_pth".into(), json!(shorten(path)));
            return Err(raised(
                "FileNotFoundError",
                format!("no picture '{}': a program sees only img_pth", shorten(path)),
            ));
        }
        other => {
            return Err(raised(
                "TypeError",
                format!("{tool}() needs img_pth as str, not {}", other.type_name()),
            ));
        }
    }
    let prompt = |shown: &mut Map<String, Value>| match arg("prompt") {
        Plain::Str(text) if text.len() > limits.prompt_bytes => Err(raised(
            "ValueError",
            format!("{tool}() takes a prompt of at most {} bytes", limits.prompt_bytes),
        )),
        Plain::Str(text) => {
            shown.insert("prompt".into(), json!(text));
            Ok(text.as_str())
        }
        other => Err(raised("TypeError", format!("{tool}() needs prompt as str, not {}", other.type_name()))),
    };
    match tool {
        "gd_detect" => {
            let found = tools.gd_detect(prompt(shown)?).map_err(of_tool)?;
            Ok(Plain::List(found.iter().map(detection).collect()))
        }
        "depth" => {
            let bbox = bbox(tool, arg("bbox"))?;
            shown.insert("bbox".into(), json!(bbox));
            let metres = tools.depth(bbox).map_err(of_tool)?;
            if metres.is_finite() {
                Ok(Plain::Float(metres))
            } else {
                Err(raised("RuntimeError", "no depth is known there"))
            }
        }
        "point3d" | "size3d" => {
            let bbox = bbox(tool, arg("bbox"))?;
            shown.insert("bbox".into(), json!(bbox));
            let metres = if tool == "point3d" { tools.point3d(bbox) } else { tools.size3d(bbox) };
            Ok(Plain::List(metres.map_err(of_tool)?.map(Plain::Float).to_vec()))
        }
        _ => {
            // "The whole image if the box is None or empty" (method.md 7).
            let bbox = match arg("bbox") {
                Plain::None => None,
                Plain::List(items) if items.is_empty() => None,
                other => Some(bbox(tool, other)?),
            };
            shown.insert("bbox".into(), json!(bbox));
            let prompt = prompt(shown)?;
            Ok(Plain::Str(tools.vqa(bbox, prompt).map_err(of_tool)?))
        }
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

fn of_tool(error: ToolError) -> Raised {
    use crate::sight::ToolErrorKind as Kind;
    let type_name = match error.kind {
        Kind::FileNotFound => "FileNotFoundError",
        Kind::Value => "ValueError",
        Kind::Runtime => "RuntimeError",
    };
    raised(type_name, error.message)
}

/// One value per parameter, in the signature's order.
fn bind<'a>(tool: &str, params: &[&str], request: &'a Request) -> Result<Vec<&'a Plain>, Raised> {
    if request.args.len() > params.len() {
        let (takes, given) = (params.len(), request.args.len());
        return Err(raised(
            "TypeError",
            format!("{tool}() takes {takes} positional arguments but {given} were given"),
        ));
    }
    let mut bound: Vec<Option<&Plain>> = request.args.iter().map(Some).collect();
    bound.resize(params.len(), None);
    for (name, value) in &request.kwargs {
        // The released stub and tool disagree on this name; programs use both (method.md 10.12).
        let known = if name == "box" { "bbox" } else { name.as_str() };
        let Some(at) = params.iter().position(|p| *p == known) else {
            let name = shorten(name);
            return Err(raised("TypeError", format!("{tool}() got an unexpected keyword argument '{name}'")));
        };
        if bound[at].replace(value).is_some() {
            return Err(raised("TypeError", format!("{tool}() got multiple values for argument '{known}'")));
        }
    }
    let missing =
        |at: usize| raised("TypeError", format!("{tool}() missing required argument: '{}'", params[at]));
    bound.into_iter().enumerate().map(|(at, value)| value.ok_or_else(|| missing(at))).collect()
}

fn bbox(tool: &str, value: &Plain) -> Result<BBox, Raised> {
    let wrong =
        |what: String| raised("TypeError", format!("{tool}() needs bbox as four numbers, not {what}"));
    let Plain::List(items) = value else { return Err(wrong(value.type_name().to_owned())) };
    let sides: Vec<f64> = items
        .iter()
        .map(|side| side.as_number().ok_or_else(|| wrong(format!("a list with {}", side.type_name()))))
        .collect::<Result<_, _>>()?;
    let sides: BBox =
        sides.try_into().map_err(|sides: Vec<f64>| wrong(format!("{} of them", sides.len())))?;
    if sides.iter().all(|side| side.is_finite()) {
        Ok(sides)
    } else {
        Err(raised("ValueError", format!("{tool}() needs a bbox of finite numbers")))
    }
}

/// As the program sees it: no score, and whole sides as ints.
fn detection(found: &Detection) -> Plain {
    let side =
        |x: &f64| if x.fract() == 0. && x.abs() < 1e15 { Plain::Int(*x as i64) } else { Plain::Float(*x) };
    Plain::Dict(vec![
        ("bbox".into(), Plain::List(found.bbox.iter().map(side).collect())),
        ("label".into(), Plain::str(&found.label)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::stub::StubTools;

    fn ask(tool: &str, args: Vec<Plain>, kwargs: Vec<(&str, Plain)>) -> Result<Plain, &'static str> {
        let kwargs = kwargs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        let request = Request { tool: tool.to_owned(), args, kwargs, line: None };
        call(&request, "a.png", &Limits::default(), &mut StubTools).0.map_err(|e| e.type_name)
    }

    fn sides(sides: [f64; 4]) -> Plain {
        Plain::List(sides.map(Plain::Float).to_vec())
    }

    #[test]
    fn arguments_are_bound_and_checked() {
        let img = || Plain::str("a.png");
        assert_eq!(ask("depth", vec![img(), sides([0., 0., 1., 1.])], vec![]), Ok(Plain::Float(0.5)));
        assert_eq!(ask("depth", vec![img()], vec![("bbox", sides([0., 0., 1., 1.]))]), Ok(Plain::Float(0.5)));
        assert_eq!(ask("depth", vec![img(), Plain::List(vec![Plain::Int(1)])], vec![]), Err("TypeError"));
        assert_eq!(ask("depth", vec![img(), Plain::None], vec![]), Err("TypeError"));
        assert_eq!(ask("depth", vec![img(), sides([0., f64::NAN, 1., 1.])], vec![]), Err("ValueError"));
        assert_eq!(ask("depth", vec![img()], vec![]), Err("TypeError"));
        assert_eq!(ask("depth", vec![img(), Plain::None, Plain::None], vec![]), Err("TypeError"));
        assert_eq!(
            ask("gd_detect", vec![Plain::str("b.png"), Plain::str("x")], vec![]),
            Err("FileNotFoundError")
        );
        assert_eq!(ask("gd_detect", vec![img(), Plain::str("x".repeat(5000))], vec![]), Err("ValueError"));
        assert_eq!(ask("gd_detect", vec![img(), Plain::Int(3)], vec![]), Err("TypeError"));
        assert_eq!(ask("system", vec![], vec![]), Err("NameError"));
    }

    #[test]
    fn the_extended_tools_are_there_on_request_only() {
        let args = vec![Plain::str("a.png"), sides([0., 0., 1., 1.])];
        for (tool, want) in [("point3d", [0.1, 0.2, 0.5]), ("size3d", [0.3, 0.4, 0.2])] {
            assert_eq!(ask(tool, args.clone(), vec![]), Err("NameError"));
            let request = Request { tool: tool.into(), args: args.clone(), kwargs: vec![], line: None };
            let limits = Limits { extended_tools: true, ..Limits::default() };
            let want = Plain::List(want.map(Plain::Float).to_vec());
            assert_eq!(call(&request, "a.png", &limits, &mut StubTools).0, Ok(want));
        }
    }

    /// Both names of the box work with every implementation.
    #[test]
    fn defect_10_12_box_and_bbox_are_one() {
        for name in ["box", "bbox"] {
            for value in [Plain::None, Plain::List(vec![]), sides([0., 0., 9., 9.])] {
                let kwargs = vec![(name, value), ("prompt", Plain::str("what colour?"))];
                assert!(ask("vqa", vec![Plain::str("a.png")], kwargs).is_ok(), "{name}");
            }
        }
        let both = vec![("box", Plain::None), ("bbox", Plain::None), ("prompt", Plain::str("?"))];
        assert_eq!(ask("vqa", vec![Plain::str("a.png")], both), Err("TypeError"));
    }
}
