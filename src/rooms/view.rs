//! What is exactly known of one rendered picture.

use serde::{Deserialize, Serialize};

/// The two looks: base detectors are trained on [`Look::Studio`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Look {
    Studio,
    LivedIn,
}

macro_rules! words {
    ($(#[$m:meta])* $name:ident { $($variant:ident => $word:literal),* $(,)? }) => {
        $(#[$m])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($variant),* }
        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            /// The word that questions, captions and labels use.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)* _ => None }
            }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(self.word()) }
        }
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> { s.serialize_str(self.word()) }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let word = String::deserialize(d)?;
                Self::from_word(&word).ok_or_else(|| serde::de::Error::custom(format!(
                    concat!("unknown ", stringify!($name), " {:?}"), word)))
            }
        }
    };
}

words! {
    /// Kinds of things; stool/chair/table, tv/picture and box/fridge are confusable on purpose.
    Kind {
        Chair => "chair", Stool => "stool", Table => "table", Sofa => "sofa", Lamp => "lamp",
        Shelf => "shelf", Bed => "bed", Tv => "tv", Picture => "picture", Plant => "plant",
        Fridge => "fridge", Box => "box", Ball => "ball", Vase => "vase",
    }
}

words! {
    Colour {
        Red => "red", Orange => "orange", Yellow => "yellow", Green => "green", Blue => "blue",
        Purple => "purple", White => "white", Gray => "gray", Black => "black", Brown => "brown",
    }
}

/// A pinhole camera with square pixels and its principal point in the middle of the picture.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Camera {
    /// Horizontal field of view, degrees.
    pub fov_x: f64,
    /// Metres above the floor.
    pub height: f64,
    /// Degrees downwards from the horizon.
    pub tilt: f64,
}

/// One thing that is visible in the picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Thing {
    /// Its value in [`View::ids`], from 1.
    pub id: u16,
    pub kind: Kind,
    pub colour: Colour,
    /// True extent in metres: width (across its front), height, length (front to back).
    pub size: [f64; 3],
    /// Centre of its 3-D box in camera coordinates (x right, y down, z forward), metres.
    pub centre: [f64; 3],
    /// Tight box around its visible pixels, `[x1, y1, x2, y2]`, x2 and y2 exclusive.
    pub bbox: [f64; 4],
    /// Tight box around its pixels if nothing stood before it, clipped to the picture.
    pub full_bbox: [f64; 4],
    pub visible_pixels: u32,
    /// Visible pixels over the pixels it would have in the picture if nothing stood before it.
    pub visible_fraction: f64,
    /// Parts of it lie outside the picture.
    pub truncated: bool,
}

impl Thing {
    /// Enough of it is seen for a careful person to name it. What is not clear is neither asked
    /// about nor counted against a detector (an `ignore` region), and no question may hang on it.
    pub fn is_clear(&self) -> bool {
        self.visible_fraction >= 0.25 && self.visible_pixels >= 48
    }
}

/// A rendered picture with its exact truth. Row-major, top left first.
#[derive(Clone, Debug)]
pub struct View {
    pub seed: u64,
    pub look: Look,
    pub width: u32,
    pub height: u32,
    pub camera: Camera,
    /// sRGB, 3 bytes a pixel.
    pub rgb: Vec<u8>,
    /// Metres along the optical axis (z), one a pixel; every pixel hits something.
    pub depth: Vec<f32>,
    /// The [`Thing::id`] seen at each pixel, 0 for walls, floor and fixtures.
    pub ids: Vec<u16>,
    pub things: Vec<Thing>,
}

impl View {
    /// Exact depth at the centre of a box, as the `depth` tool samples it (method.md 7); the box
    /// is clipped to the picture.
    pub fn depth_at(&self, bbox: [f64; 4]) -> f64 {
        let at = |a: f64, b: f64, n: u32| (((a + b) / 2.).floor().max(0.) as u32).min(n - 1);
        let (x, y) = (at(bbox[0], bbox[2], self.width), at(bbox[1], bbox[3], self.height));
        self.depth[(y * self.width + x) as usize] as f64
    }
}
