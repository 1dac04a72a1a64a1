//! Tools that answer from a written scene: objects with box, depth and attributes. For trying
//! programs by hand and for the executor's tests; `valor program run` uses them.

use std::collections::HashMap;

use serde::Deserialize;

use crate::sight::bbox::iou;
use crate::sight::{BBox, Detection, ToolError, ToolErrorKind, Tools};

/// A scene file (JSON).
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scene {
    /// What `img_pth` is in the program.
    pub image: String,
    /// Width and height in pixels.
    #[serde(default)]
    pub size: Option<[u32; 2]>,
    pub objects: Vec<Object>,
    /// Answers about the whole picture, by a phrase that the question holds.
    #[serde(default)]
    pub whole_image: indexed::Pairs,
}

/// One thing of a scene.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    pub label: String,
    pub bbox: BBox,
    /// Metres.
    pub depth: f64,
    #[serde(default)]
    pub color: Option<String>,
    #[serde(default)]
    pub material: Option<String>,
}

/// A JSON object whose order counts.
pub mod indexed {
    use serde::Deserialize;

    #[derive(Clone, Debug, Default)]
    pub struct Pairs(pub Vec<(String, String)>);

    impl<'de> Deserialize<'de> for Pairs {
        fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
            struct InOrder;
            impl<'de> serde::de::Visitor<'de> for InOrder {
                type Value = Pairs;
                fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                    f.write_str("an object of strings")
                }
                fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                    let mut pairs = Vec::new();
                    while let Some(pair) = map.next_entry()? {
                        pairs.push(pair);
                    }
                    Ok(Pairs(pairs))
                }
            }
            d.deserialize_map(InOrder)
        }
    }
}

/// [`Tools`] on a [`Scene`].
#[derive(Clone, Debug)]
pub struct MockTools {
    scene: Scene,
    by_label: HashMap<String, Vec<usize>>,
}

/// Depth where there is no object, metres.
const BACKGROUND: f64 = 10.;

impl MockTools {
    pub fn new(scene: Scene) -> Self {
        let mut by_label: HashMap<String, Vec<usize>> = HashMap::new();
        for (at, object) in scene.objects.iter().enumerate() {
            by_label.entry(object.label.clone()).or_default().push(at);
        }
        Self { scene, by_label }
    }

    pub fn image(&self) -> &str {
        &self.scene.image
    }

    fn best(&self, bbox: BBox) -> Option<&Object> {
        let mut best: Option<(f64, &Object)> = None;
        for object in &self.scene.objects {
            let overlap = iou(bbox, object.bbox);
            if overlap > best.map_or(0., |(score, _)| score) {
                best = Some((overlap, object));
            }
        }
        best.map(|(_, object)| object)
    }
}

fn flat(tool: &str) -> ToolError {
    let message = format!("{tool}: a written scene has boxes and depths, but no camera");
    ToolError { kind: ToolErrorKind::Runtime, message }
}

impl Tools for MockTools {
    fn gd_detect(&mut self, prompt: &str) -> Result<Vec<Detection>, ToolError> {
        let lower = prompt.to_lowercase();
        let noun = lower.trim_matches(|c: char| c.is_whitespace() || c == '.');
        let found = self.by_label.get(noun).or_else(|| self.by_label.get(noun.strip_suffix('s')?));
        let detection = |&at: &usize| {
            let object = &self.scene.objects[at];
            Detection { bbox: object.bbox, label: object.label.clone(), score: None }
        };
        Ok(found.map_or_else(Vec::new, |found| found.iter().map(detection).collect()))
    }

    fn depth(&mut self, bbox: BBox) -> Result<f64, ToolError> {
        Ok(self.best(bbox).map_or(BACKGROUND, |object| object.depth))
    }

    fn vqa(&mut self, bbox: Option<BBox>, prompt: &str) -> Result<String, ToolError> {
        let prompt = prompt.to_lowercase();
        let answer = match bbox.map(|bbox| self.best(bbox)) {
            Some(None) => None,
            Some(Some(object)) => {
                if prompt.contains("color") {
                    object.color.clone()
                } else if prompt.contains("material") {
                    object.material.clone()
                } else {
                    prompt.contains("what is").then(|| object.label.clone())
                }
            }
            None => {
                let known = &self.scene.whole_image.0;
                known
                    .iter()
                    .find(|(phrase, _)| prompt.contains(phrase.as_str()))
                    .map(|(_, said)| said.clone())
            }
        };
        Ok(answer.unwrap_or_else(|| "unknown".to_owned()))
    }

    fn point3d(&mut self, _bbox: BBox) -> Result<[f64; 3], ToolError> {
        Err(flat("point3d"))
    }

    fn size3d(&mut self, _bbox: BBox) -> Result<[f64; 3], ToolError> {
        Err(flat("size3d"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scene() -> MockTools {
        let text = r#"{"image":"a.png","objects":[
            {"label":"chair","bbox":[0,0,10,10],"depth":2.0,"color":"red","material":"wood"},
            {"label":"glass","bbox":[20,0,30,10],"depth":3.0}],"whole_image":{"room":"kitchen","main color":"gray"}}"#;
        MockTools::new(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn follows_the_written_rules() {
        let mut tools = scene();
        for prompt in ["chair", " Chairs. ", "CHAIR"] {
            assert_eq!(tools.gd_detect(prompt).unwrap().len(), 1, "{prompt}");
        }
        assert_eq!(tools.gd_detect("glass").unwrap().len(), 1, "only a plural s goes");
        assert!(tools.gd_detect("stool").unwrap().is_empty());
        assert_eq!(tools.depth([1., 1., 9., 9.]), Ok(2.));
        assert_eq!(tools.depth([50., 50., 60., 60.]), Ok(BACKGROUND));
        let at = Some([1., 1., 9., 9.]);
        assert_eq!(tools.vqa(at, "What COLOR?").unwrap(), "red");
        assert_eq!(tools.vqa(at, "what material is it").unwrap(), "wood");
        assert_eq!(tools.vqa(at, "What is this?").unwrap(), "chair");
        assert_eq!(tools.vqa(Some([20., 0., 30., 10.]), "color").unwrap(), "unknown");
        assert_eq!(tools.vqa(None, "Which room?").unwrap(), "kitchen");
        assert_eq!(tools.vqa(None, "who?").unwrap(), "unknown");
    }
}
