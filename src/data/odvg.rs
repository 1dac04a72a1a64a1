//! Pictures with boxes, as ODVG JSON lines (method.md 5.5) or COCO's instances file.
//!
//! An ODVG file has its `label_map.json` beside it. Pictures lie beside the file, or where `subfolders` says.
//! Several records of one picture are made one. Beyond the format's `instances` a record may hold, under
//! `detection`, `ignore` (boxes where nothing is known), `crowds` (as instances), `hard_negatives` (nouns that a
//! detector finds here and should not: part of each caption) and `absent` (nouns that are not here: candidates for a
//! caption's negatives). Files are a stranger's until [`Boxes::check`] has looked at them. Not here: grounding records
//! (phrases with spans), masks.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::Hash;
use std::path::{Path, PathBuf};

use crate::sight::{BBox, Picture, bbox};
use crate::text::without_bom;
use rayon::prelude::*;

/// A line of an ODVG file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Relative to a folder of pictures ([`Boxes::picture`]).
    pub filename: String,
    pub height: u32,
    pub width: u32,
    /// Not there in records of phrases (`grounding`), which are refused: they are no pictures without boxes.
    pub detection: Detected,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Detected {
    pub instances: Vec<Instance>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<BBox>,
    /// Regions with an unknown number of things of one kind.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub crowds: Vec<Instance>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hard_negatives: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub absent: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    pub bbox: BBox,
    pub label: usize,
    pub category: String,
    /// Pixels of its mask, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub area: Option<f64>,
}

/// Names by their ids, from 0 without a gap. An id once given never moves.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelMap(Vec<String>);

impl LabelMap {
    pub fn names(&self) -> &[String] {
        &self.0
    }

    pub fn name(&self, label: usize) -> Option<&str> {
        self.0.get(label).map(String::as_str)
    }

    /// The id of a name, a new one if it has none.
    pub fn id(&mut self, name: &str) -> usize {
        self.0.iter().position(|n| n == name).unwrap_or_else(|| {
            self.0.push(name.to_owned());
            self.0.len() - 1
        })
    }

    pub fn to_json(&self) -> Value {
        self.0
            .iter()
            .enumerate()
            .map(|(i, n)| (i.to_string(), n.as_str().into()))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    /// # Errors
    /// If ids are no numbers, start elsewhere than at 0, or leave a gap; or a name stands twice.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let map: BTreeMap<String, String> = serde_json::from_str(&text)
            .with_context(|| format!("{}: expected {{\"0\": \"name\", …}}", path.display()))?;
        let mut names = vec![None; map.len()];
        for (id, name) in map {
            let slot = id.parse::<usize>().ok().and_then(|i| names.get_mut(i));
            let Some(slot) = slot else {
                bail!("{}: id {id:?}: ids count from 0 without a gap; renumber them", path.display())
            };
            *slot = Some(name);
        }
        let names: Vec<String> = names.into_iter().flatten().collect();
        for (i, name) in names.iter().enumerate() {
            ensure!(!names[..i].contains(name), "{}: {name:?} has two ids", path.display());
        }
        Ok(Self(names))
    }
}

/// Pictures with boxes.
#[derive(Clone, Debug)]
pub struct Boxes {
    pub labels: LabelMap,
    pub records: Vec<Record>,
    /// Of the file.
    pub folder: PathBuf,
    /// Where pictures may lie, below that folder or the one above it.
    pub subfolders: Vec<String>,
}

/// What is wrong with a record or with one of its boxes.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// Of [`Boxes::records`].
    pub record: usize,
    /// `None`: the record as a whole.
    pub instance: Option<usize>,
    pub kind: FaultKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    MissingPicture,
    UnreadablePicture,
    OtherSize,
    NotFinite,
    Empty,
    Outside,
    OffTheMap,
    OtherName,
    NoName,
}

impl FaultKind {
    pub fn text(self) -> &'static str {
        match self {
            Self::MissingPicture => "the picture is missing",
            Self::UnreadablePicture => "the picture cannot be read",
            Self::OtherSize => "the picture is of another size",
            Self::NotFinite => "a box is not of four finite numbers",
            Self::Empty => "a box has no area",
            Self::Outside => "a box reaches out of the picture",
            Self::OffTheMap => "a label is not on the label map",
            Self::OtherName => "a box's category is not its label's name",
            Self::NoName => "a category is no name for a thing",
        }
    }
}

/// Pixels that a box may reach out of its picture by: rounding.
const SLACK: f64 = 1.;

impl Boxes {
    /// An ODVG file (`.jsonl`, `label_map.json` beside it) or a COCO instances file (`.json`).
    pub fn open(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        let subfolders = subfolders(path);
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = without_bom(&text);
        if path.extension().is_some_and(|e| e == "json") {
            let (labels, records) = coco(text).with_context(|| path.display().to_string())?;
            return Ok(Self { labels, records: merged(records), folder, subfolders });
        }
        let labels = LabelMap::read(&folder.join("label_map.json"))?;
        let lines = text.lines().zip(1..).filter(|(l, _)| !l.trim().is_empty());
        let record = |(line, number): (&str, usize)| {
            serde_json::from_str(line).with_context(|| {
                format!("{}, line {number}: expected an ODVG record {{\"filename\", …}}", path.display())
            })
        };
        let records = merged(lines.map(record).collect::<Result<_>>()?);
        Ok(Self { labels, records, folder, subfolders })
    }

    /// A record's picture: in the first of the places that has one of that name; where none has, beside the file.
    pub fn picture(&self, record: usize) -> PathBuf {
        let name = &self.records[record].filename;
        let beside = self.folder.join(name);
        if beside.is_file() {
            return beside;
        }
        let above = self.folder.join("..");
        let of = |base: &Path| self.subfolders.iter().map(|s| base.join(s).join(name)).find(|p| p.is_file());
        of(&self.folder).or_else(|| of(&above)).unwrap_or(beside)
    }

    /// Where pictures are looked for, in words.
    pub fn places(&self) -> String {
        let named: Vec<String> =
            self.subfolders.iter().filter(|s| !s.is_empty()).map(|s| format!("{s}/")).collect();
        let folder = match self.folder.display().to_string() {
            here if here.is_empty() => ".".into(),
            folder => folder,
        };
        format!("{folder} and the folder above it, there also in {}", named.join(", "))
    }

    /// Everything that is wrong; pictures are read whole, turned as their tags say.
    pub fn check(&self) -> Vec<Fault> {
        let size = |i: usize| Picture::open(&self.picture(i)).ok().map(|p| (p.width(), p.height()));
        let sizes: Vec<Option<(u32, u32)>> = (0..self.records.len()).into_par_iter().map(size).collect();
        let mut faults = Vec::new();
        for (i, r) in self.records.iter().enumerate() {
            let mut fault = |instance, kind| faults.push(Fault { record: i, instance, kind });
            let path = self.picture(i);
            match sizes[i] {
                _ if !path.is_file() => fault(None, FaultKind::MissingPicture),
                None => fault(None, FaultKind::UnreadablePicture),
                Some(size) if size != (r.width, r.height) => fault(None, FaultKind::OtherSize),
                Some(_) => {}
            }
            for (k, b) in r.detection.instances.iter().enumerate() {
                let [x1, y1, x2, y2] = b.bbox;
                let (w, h) = (f64::from(r.width), f64::from(r.height));
                if b.bbox.iter().any(|v| !v.is_finite()) {
                    fault(Some(k), FaultKind::NotFinite);
                } else if bbox::area(b.bbox) <= 0. {
                    fault(Some(k), FaultKind::Empty);
                } else if x1 < -SLACK || y1 < -SLACK || x2 > w + SLACK || y2 > h + SLACK {
                    fault(Some(k), FaultKind::Outside);
                }
                match self.labels.name(b.label) {
                    None => fault(Some(k), FaultKind::OffTheMap),
                    Some(name) if name != b.category => fault(Some(k), FaultKind::OtherName),
                    Some(name) if !name.contains(char::is_alphanumeric) => fault(Some(k), FaultKind::NoName),
                    Some(_) => {}
                }
            }
        }
        faults
    }

    /// Leaves out what is at fault: boxes where it is a box, else the record. Such a box becomes a crowd, of
    /// which only the part within the picture counts, if any: a thing of that name is there, and where it is
    /// nothing may be called background.
    pub fn without(mut self, faults: &[Fault]) -> Self {
        let faults: HashSet<(usize, Option<usize>)> = faults.iter().map(|f| (f.record, f.instance)).collect();
        let mut records = Vec::with_capacity(self.records.len());
        for (i, mut r) in std::mem::take(&mut self.records).into_iter().enumerate() {
            if faults.contains(&(i, None)) {
                continue;
            }
            let d = &mut r.detection;
            for (k, b) in std::mem::take(&mut d.instances).into_iter().enumerate() {
                if !faults.contains(&(i, Some(k))) {
                    d.instances.push(b);
                    continue;
                }
                let bbox = match b.bbox.iter().all(|v| v.is_finite()) {
                    true => bbox::clipped(b.bbox, f64::from(r.width), f64::from(r.height)),
                    false => [0.; 4],
                };
                // By either of two names, if they differ.
                let other = self.labels.name(b.label).filter(|name| *name != b.category).map(str::to_owned);
                d.crowds.extend(other.map(|category| Instance { bbox, category, ..b }));
                d.crowds.push(Instance { bbox, ..b });
            }
            records.push(r);
        }
        Self { records, ..self }
    }
}

/// Splits by which COCO and others name folders of pictures.
const SPLITS: [&str; 11] = [
    "train2017",
    "val2017",
    "test2017",
    "unlabeled2017",
    "train2014",
    "val2014",
    "test2014",
    "test2015",
    "train",
    "val",
    "test",
];

/// Where the pictures of a file may lie, below its folder or the one above: as of COCO and Open-GroundingDino, whose
/// files stand in a folder of their own, in `images`, in the folder of a split, or in that below `images`. Splits that a
/// word of the file's name tells come alone, the most alike first: pictures of two splits may have the same name.
/// COCO's with a year never do, and are those of a file that tells none.
fn subfolders(path: &Path) -> Vec<String> {
    let file = path.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    let year = |c: char| c.is_ascii_digit();
    let words: Vec<&str> = file.split(|c: char| !c.is_alphanumeric()).collect();
    let told = |s: &str| words.iter().any(|w| w.trim_end_matches(year) == s.trim_end_matches(year));
    let mut splits: Vec<&str> = SPLITS.into_iter().filter(|s| told(s)).collect();
    if splits.is_empty() {
        splits = SPLITS.into_iter().filter(|s| s.ends_with(year)).collect();
    }
    splits.sort_by_key(|s| !words.iter().any(|w| w.starts_with(*s)));
    let of_splits = splits.iter().flat_map(|s| [(*s).to_owned(), format!("images/{s}")]);
    [String::new(), "images".into()].into_iter().chain(of_splits).collect()
}

/// One record a picture, in the order in which they first occur. Miners write one a question, as the released code
/// does, and a picture is trained on with all that is known of it. Records that differ in its size stay apart: those
/// of the wrong one are at fault.
fn merged(all: Vec<Record>) -> Vec<Record> {
    let mut places = HashMap::new();
    let mut records: Vec<(Record, Vec<Detected>)> = Vec::with_capacity(all.len());
    for r in all {
        let known = *places.entry((r.filename.clone(), r.width, r.height)).or_insert(records.len());
        match records.get_mut(known) {
            Some((_, others)) => others.push(r.detection),
            None => records.push((r, Vec::new())),
        }
    }
    let joined = |(mut r, others): (Record, Vec<Detected>)| {
        if !others.is_empty() {
            r.detection.join(others);
        }
        r
    };
    records.into_iter().map(joined).collect()
}

impl Detected {
    /// What other records say of the same picture; what several say, once.
    fn join(&mut self, others: Vec<Self>) {
        fn once<T, K: Eq + Hash>(list: &mut Vec<T>, key: impl Fn(&T) -> K) {
            let mut seen = HashSet::new();
            list.retain(|one| seen.insert(key(one)));
        }
        fn bits(bbox: &BBox) -> [u64; 4] {
            bbox.map(f64::to_bits)
        }
        for other in others {
            self.instances.extend(other.instances);
            self.crowds.extend(other.crowds);
            self.ignore.extend(other.ignore);
            self.hard_negatives.extend(other.hard_negatives);
            self.absent.extend(other.absent);
        }
        let thing = |b: &Instance| (bits(&b.bbox), b.label, b.category.clone());
        once(&mut self.instances, thing);
        once(&mut self.crowds, thing);
        once(&mut self.ignore, bits);
        once(&mut self.hard_negatives, String::clone);
        once(&mut self.absent, String::clone);
        // Of which one record has a box, that is there, whatever another did not find or does not know.
        let boxes: HashSet<[u64; 4]> = self.instances.iter().map(|b| bits(&b.bbox)).collect();
        self.ignore.retain(|b| !boxes.contains(&bits(b)));
        let things = self.instances.iter().chain(&self.crowds);
        let mut known: HashSet<&str> = things.map(|b| b.category.as_str()).collect();
        self.hard_negatives.retain(|noun| !known.contains(noun.as_str()));
        known.extend(self.hard_negatives.iter().map(String::as_str));
        self.absent.retain(|noun| !known.contains(noun.as_str()));
    }
}

/// COCO's instances. Ids of categories need not be dense, labels are.
fn coco(text: &str) -> Result<(LabelMap, Vec<Record>)> {
    #[derive(Deserialize)]
    struct File {
        images: Vec<Image>,
        annotations: Vec<Annotation>,
        categories: Vec<Category>,
    }
    #[derive(Deserialize)]
    struct Image {
        id: u64,
        file_name: String,
        width: u32,
        height: u32,
    }
    #[derive(Deserialize)]
    struct Annotation {
        image_id: u64,
        category_id: u64,
        bbox: BBox,
        area: Option<f64>,
        #[serde(default)]
        iscrowd: u8,
    }
    #[derive(Deserialize)]
    struct Category {
        id: u64,
        name: String,
    }
    let file: File =
        serde_json::from_str(text).context("expected COCO instances, or ODVG lines in a .jsonl file")?;
    let mut labels = LabelMap::default();
    let mut ids = BTreeMap::new();
    for c in &file.categories {
        ids.insert(c.id, labels.id(&c.name));
    }
    let mut places = BTreeMap::new();
    let mut records = Vec::with_capacity(file.images.len());
    for image in file.images {
        ensure!(places.insert(image.id, records.len()).is_none(), "two images have the id {}", image.id);
        let (filename, height, width) = (image.file_name, image.height, image.width);
        records.push(Record { filename, height, width, detection: Detected::default() });
    }
    for a in file.annotations {
        let Some(record) = places.get(&a.image_id).map(|&i| &mut records[i]) else {
            bail!("an annotation is of image {}, which is not listed", a.image_id)
        };
        let [x, y, w, h] = a.bbox;
        let bbox = [x, y, x + w, y + h];
        let Some(&label) = ids.get(&a.category_id) else {
            bail!("an annotation is of category {}, which is not listed", a.category_id)
        };
        let category = labels.name(label).expect("just given").to_owned();
        let d = &mut record.detection;
        let list = if a.iscrowd == 0 { &mut d.instances } else { &mut d.crowds };
        list.push(Instance { bbox, label, category, area: a.area });
    }
    Ok((labels, records))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn folder(lines: &str, map: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.jsonl"), lines).unwrap();
        std::fs::write(dir.path().join("label_map.json"), map).unwrap();
        image::RgbImage::new(40, 30).save(dir.path().join("p.png")).unwrap();
        std::fs::write(dir.path().join("q.png"), "no picture").unwrap();
        dir
    }

    fn record(file: &str, instances: Value) -> String {
        let r =
            json!({ "filename": file, "width": 40, "height": 30, "detection": { "instances": instances } });
        format!("{r}\n")
    }

    #[test]
    fn every_fault_is_named_and_left_out() {
        let ok = json!({ "bbox": [1, 2, 10, 20], "label": 0, "category": "chair" });
        let bad = |b: Value, label: usize, name: &str| json!({ "bbox": b, "label": label, "category": name });
        let lines = [
            record(
                "p.png",
                json!([
                    ok,
                    bad(json!([5, 5, 5, 9]), 0, "chair"),
                    bad(json!([5, 5, 50, 9]), 0, "chair"),
                    bad(json!([5, 5, 9, 9]), 2, "bed"),
                    bad(json!([5, 5, 9, 9]), 1, "chair"),
                ]),
            ),
            record("q.png", json!([ok])),
            record("gone.png", json!([])),
            // Of another size than the first record says, so a record of its own.
            record("p.png", json!([])).replace("40", "41"),
        ]
        .concat();
        let dir = folder(&lines, r#"{"0": "chair", "1": "sofa"}"#);
        let boxes = Boxes::open(&dir.path().join("a.jsonl")).unwrap();
        let faults = boxes.check();
        let kinds: Vec<_> = faults.iter().map(|f| (f.record, f.instance, f.kind)).collect();
        use FaultKind::*;
        assert_eq!(
            kinds,
            [
                (0, Some(1), Empty),
                (0, Some(2), Outside),
                (0, Some(3), OffTheMap),
                (0, Some(4), OtherName),
                (1, None, UnreadablePicture),
                (2, None, MissingPicture),
                (3, None, OtherSize),
            ]
        );
        let good = boxes.without(&faults);
        assert_eq!(good.records.len(), 1);
        let d = &good.records[0].detection;
        assert_eq!(d.instances.len(), 1);
        // What a box at fault names is there all the same.
        let crowds: Vec<_> = d.crowds.iter().map(|c| (c.category.as_str(), c.bbox)).collect();
        let small = [5., 5., 9., 9.];
        assert_eq!(
            crowds,
            [
                ("chair", [5., 5., 5., 9.]),
                ("chair", [5., 5., 40., 9.]),
                ("bed", small),
                ("sofa", small),
                ("chair", small),
            ]
        );
        assert_eq!(good.check(), []);
    }

    #[test]
    fn records_of_one_picture_are_one_with_each_box_once() {
        let instance = |x: i32, label: usize, name: &str| json!({ "bbox": [x, 2, 10, 20], "label": label, "category": name });
        let mut with_negatives: Value =
            serde_json::from_str(&record("p.png", json!([instance(1, 0, "chair")]))).unwrap();
        with_negatives["detection"]["hard_negatives"] = json!(["sofa", "bed"]);
        with_negatives["detection"]["absent"] = json!(["bed", "sofa", "lamp"]);
        with_negatives["detection"]["ignore"] = json!([[0, 0, 5, 5], [5, 2, 10, 20]]);
        let lines = [
            format!("{with_negatives}\n"),
            record("q.png", json!([instance(1, 0, "chair")])),
            record(
                "p.png",
                json!([instance(1, 0, "chair"), instance(5, 0, "chair"), instance(1, 1, "sofa")]),
            ),
            format!("{with_negatives}\n"),
        ]
        .concat();
        let dir = folder(&lines, r#"{"0": "chair", "1": "sofa"}"#);
        let boxes = Boxes::open(&dir.path().join("a.jsonl")).unwrap();
        let names: Vec<_> = boxes.records.iter().map(|r| r.filename.as_str()).collect();
        assert_eq!(names, ["p.png", "q.png"]);
        let d = &boxes.records[0].detection;
        let got: Vec<_> = d.instances.iter().map(|b| (b.bbox[0], b.category.as_str())).collect();
        assert_eq!(got, [(1., "chair"), (5., "chair"), (1., "sofa")]);
        assert_eq!(d.ignore, [[0., 0., 5., 5.]], "another record knows the other box");
        assert_eq!(d.hard_negatives, ["bed"], "another record has a box of the sofa");
        assert_eq!(d.absent, ["lamp"]);
        assert_eq!(boxes.records[1].detection.instances.len(), 1);
    }

    #[test]
    fn pictures_are_found_where_coco_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let text = json!({
            "images": [{ "id": 7, "file_name": "p.png", "width": 40, "height": 30 }],
            "annotations": [], "categories": [],
        })
        .to_string();
        for (file, picture, found) in [
            ("a/instances_val2017.json", "a/val2017/p.png", true),
            ("b/annotations/instances_val2017.json", "b/val2017/p.png", true),
            ("c/annotations/instances_train2014.json", "c/images/train2014/p.png", true),
            ("d/annotations/labels.json", "d/images/p.png", true),
            ("e/annotations/labels.json", "e/train2017/p.png", true),
            ("j/annotations/image_info_test2015.json", "j/test2015/p.png", true),
            ("k/annotations/image_info_test-dev2015.json", "k/images/test2015/p.png", true),
            ("l/annotations/image_info_test2014.json", "l/test2014/p.png", true),
            ("m/annotations/image_info_unlabeled2017.json", "m/unlabeled2017/p.png", true),
            ("n/annotations/labels.json", "n/test2015/p.png", true),
            ("f/annotations/labels.json", "f/p.png", true),
            // "val" and "test" are no words of these names.
            ("h/annotations/valor_boxes.json", "h/train2017/p.png", true),
            ("i/latest.json", "i/train2017/p.png", true),
            // Another split's of that name is another picture.
            ("g/annotations/instances_val2017.json", "g/train2017/p.png", false),
        ] {
            for path in [file, picture] {
                std::fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
            }
            std::fs::write(root.join(file), &text).unwrap();
            image::RgbImage::new(40, 30).save(root.join(picture)).unwrap();
            let boxes = Boxes::open(&root.join(file)).unwrap();
            assert_eq!(boxes.check().is_empty(), found, "{file} {picture}");
            let here = |p: &Path| p.canonicalize().unwrap();
            if found {
                assert_eq!(here(&boxes.picture(0)), here(&root.join(picture)));
            } else {
                assert!(boxes.places().contains("images/val2017/"), "{}", boxes.places());
                assert!(!boxes.places().contains("train2017"), "{}", boxes.places());
            }
        }
    }

    #[test]
    fn label_maps_count_from_zero() {
        let at = |map: &str| {
            let dir = folder("", map);
            Boxes::open(&dir.path().join("a.jsonl"))
                .map(|b| b.labels.names().to_vec())
                .map_err(|e| format!("{e:#}"))
        };
        assert_eq!(at(r#"{"1": "b", "0": "a"}"#).unwrap(), ["a", "b"]);
        assert!(at(r#"{"1": "a", "2": "b"}"#).unwrap_err().contains("count from 0"));
        assert!(at(r#"{"0": "a", "1": "a"}"#).unwrap_err().contains("two ids"));
        let mut labels = LabelMap(vec!["a".into()]);
        assert_eq!((labels.id("b"), labels.id("a")), (1, 0));
        assert_eq!(labels.to_json(), json!({ "0": "a", "1": "b" }));
    }

    #[test]
    fn coco_is_read_with_its_crowds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("instances.json");
        let text = json!({
            "images": [{ "id": 7, "file_name": "p.png", "width": 40, "height": 30 }],
            "annotations": [
                { "image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 9.0, "iscrowd": 0 },
                { "image_id": 7, "category_id": 90, "bbox": [0, 0, 9, 9], "iscrowd": 1 },
            ],
            "categories": [{ "id": 90, "name": "chair" }],
        });
        std::fs::write(&path, text.to_string()).unwrap();
        let boxes = Boxes::open(&path).unwrap();
        let d = &boxes.records[0].detection;
        let chair = |bbox, area| Instance { bbox, label: 0, category: "chair".into(), area };
        assert_eq!(d.instances, [chair([1., 2., 4., 6.], Some(9.))]);
        assert_eq!(d.crowds, [chair([0., 0., 9., 9.], None)]);
        std::fs::write(&path, text.to_string().replace("\"image_id\":7", "\"image_id\":8")).unwrap();
        assert!(format!("{:#}", Boxes::open(&path).unwrap_err()).contains("image 8"));
    }
}
