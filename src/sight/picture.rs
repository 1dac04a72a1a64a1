//! A picture file as the tools see it: upright 8-bit RGB.
//!
//! EXIF orientation is applied (Pillow's `convert("RGB")` ignores it), transparency is laid over
//! white (Pillow drops it and shows whatever colour lies beneath), 16-bit and float pictures are
//! scaled to 8 bits, grey becomes RGB. Of an animation the first frame counts. Files are hostile
//! until decoded: dimensions are checked before any pixel is allocated.

use image::{DynamicImage, ImageDecoder, ImageReader, Limits, RgbImage};
use std::io::{BufRead, Cursor, Seek};
use std::path::Path;

/// More pixels than this are refused: about what the largest cameras write.
pub const MAX_PIXELS: u64 = 120_000_000;

/// Longer pictures than this, long side by short side, are refused, as HF's preprocessing for Qwen3-VL does.
pub const MAX_ASPECT: u32 = 200;

/// Row-major sRGB, 3 bytes a pixel, top left first.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

/// What becomes of transparency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Alpha {
    #[default]
    OverWhite,
    /// As Pillow's `convert("RGB")`: the colour channels as they are stored.
    Drop,
}

#[derive(Clone, Copy, Debug)]
pub struct DecodeOptions {
    /// Turn the picture as its EXIF orientation says.
    pub exif: bool,
    pub alpha: Alpha,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self { exif: true, alpha: Alpha::default() }
    }
}

impl DecodeOptions {
    /// What `PIL.Image.open(…).convert("RGB")` gives.
    pub const PILLOW: Self = Self { exif: false, alpha: Alpha::Drop };
}

#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    #[error("cannot open picture {name}: {source}")]
    Open { name: String, source: std::io::Error },
    #[error("{name} is not a picture that can be read (PNG, JPEG, WebP, BMP, TIFF or GIF): {source}")]
    Decode { name: String, source: image::ImageError },
    #[error(
        "{name} is {width}×{height} pixels; at most {MAX_PIXELS} pixels are accepted: scale it down first"
    )]
    TooLarge { name: String, width: u32, height: u32 },
    #[error(
        "{name} is {width}×{height} pixels; at most {MAX_ASPECT} to 1 is accepted: cut it into parts first"
    )]
    TooLong { name: String, width: u32, height: u32 },
    #[error("{name} has no pixels ({width}×{height})")]
    Empty { name: String, width: u32, height: u32 },
}

impl Picture {
    /// # Panics
    /// If `rgb` is not `3·width·height` bytes or the picture is empty.
    pub fn new(width: u32, height: u32, rgb: Vec<u8>) -> Self {
        assert!(width > 0 && height > 0, "empty picture");
        assert_eq!(rgb.len(), width as usize * height as usize * 3, "RGB data does not fit {width}×{height}");
        Self { width, height, rgb }
    }

    pub fn open(path: &Path) -> Result<Self, PictureError> {
        Self::open_with(path, DecodeOptions::default())
    }

    pub fn open_with(path: &Path, options: DecodeOptions) -> Result<Self, PictureError> {
        let name = path.display().to_string();
        let open = |source| PictureError::Open { name: name.clone(), source };
        let file = std::fs::File::open(path).map_err(open)?;
        if file.metadata().map_err(open)?.is_dir() {
            return Err(open(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
        }
        Self::read(std::io::BufReader::new(file), &name, options)
    }

    /// From the bytes of a file; `name` is for error messages.
    pub fn decode(bytes: &[u8], name: &str, options: DecodeOptions) -> Result<Self, PictureError> {
        Self::read(Cursor::new(bytes), name, options)
    }

    fn read(input: impl BufRead + Seek, name: &str, options: DecodeOptions) -> Result<Self, PictureError> {
        let bad = |source| PictureError::Decode { name: name.to_string(), source };
        let mut reader =
            ImageReader::new(input).with_guessed_format().map_err(|e| bad(image::ImageError::IoError(e)))?;
        let mut limits = Limits::default();
        // Four channels of f32 at the largest size, and as much again for the decoder's own use.
        limits.max_alloc = Some(MAX_PIXELS * 32);
        reader.limits(limits);
        let mut decoder = reader.into_decoder().map_err(bad)?;
        let (width, height) = decoder.dimensions();
        if width == 0 || height == 0 {
            return Err(PictureError::Empty { name: name.to_string(), width, height });
        }
        if width as u64 * height as u64 > MAX_PIXELS {
            return Err(PictureError::TooLarge { name: name.to_string(), width, height });
        }
        if width.max(height) as u64 > width.min(height) as u64 * MAX_ASPECT as u64 {
            return Err(PictureError::TooLong { name: name.to_string(), width, height });
        }
        // An unreadable orientation tag is no reason to refuse the picture.
        let turn = if options.exif { decoder.orientation().ok() } else { None };
        let mut image = DynamicImage::from_decoder(decoder).map_err(bad)?;
        if let Some(turn) = turn {
            image.apply_orientation(turn);
        }
        let rgb = match options.alpha {
            Alpha::OverWhite if image.color().has_alpha() => over_white(&image),
            _ => image.to_rgb8(),
        };
        Ok(Self { width: rgb.width(), height: rgb.height(), rgb: rgb.into_raw() })
    }

    pub fn width(&self) -> u32 {
        self.width
    }

    pub fn height(&self) -> u32 {
        self.height
    }

    /// `[height, width, 3]`, row-major.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// As the `image` crate has it.
    pub fn to_image(&self) -> RgbImage {
        RgbImage::from_raw(self.width, self.height, self.rgb.clone()).expect("three bytes a pixel")
    }

    /// The pixels inside `[x1, y1, x2, y2]` (pixels), clipped to the picture and never empty.
    pub fn crop(&self, bbox: super::BBox) -> Self {
        let span = |a: f64, b: f64, n: u32| {
            let first = (a.min(b).floor().max(0.) as u32).min(n - 1);
            let end = (a.max(b).ceil().max(0.) as u32).clamp(first + 1, n);
            (first as usize, end as usize)
        };
        let (x1, x2) = span(bbox[0], bbox[2], self.width);
        let (y1, y2) = span(bbox[1], bbox[3], self.height);
        let row = self.width as usize * 3;
        let rgb =
            (y1..y2).flat_map(|y| self.rgb[y * row + x1 * 3..y * row + x2 * 3].iter().copied()).collect();
        Self::new((x2 - x1) as u32, (y2 - y1) as u32, rgb)
    }
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({}×{})", self.width, self.height)
    }
}

fn over_white(image: &DynamicImage) -> image::RgbImage {
    let rgba = image.to_rgba8();
    let mut out = image::RgbImage::new(rgba.width(), rgba.height());
    for (o, p) in out.pixels_mut().zip(rgba.pixels()) {
        let a = p.0[3] as u32;
        for c in 0..3 {
            o.0[c] = ((p.0[c] as u32 * a + 255 * (255 - a) + 127) / 255) as u8;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ImageBuffer, ImageFormat, LumaA, Rgba};

    fn png(image: DynamicImage) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn transparent_pixels_are_white_unless_dropped() {
        let image = ImageBuffer::from_fn(2, 1, |x, _| Rgba([200u8, 10, 0, if x == 0 { 0 } else { 255 }]));
        let bytes = png(image.into());
        let seen = Picture::decode(&bytes, "x", DecodeOptions::default()).unwrap();
        assert_eq!(seen.rgb(), [255, 255, 255, 200, 10, 0]);
        let raw = Picture::decode(&bytes, "x", DecodeOptions::PILLOW).unwrap();
        assert_eq!(raw.rgb(), [200, 10, 0, 200, 10, 0]);
    }

    #[test]
    fn sixteen_bits_are_scaled_not_cut() {
        let image = ImageBuffer::from_fn(3, 1, |x, _| LumaA([[0u16, 0x8000, 0xffff][x as usize], 0xffff]));
        let seen = Picture::decode(&png(image.into()), "x", DecodeOptions::default()).unwrap();
        assert_eq!(seen.rgb(), [0, 0, 0, 128, 128, 128, 255, 255, 255]);
    }

    #[test]
    fn bad_files_name_themselves() {
        let text = Picture::decode(b"not a picture", "notes.jpg", DecodeOptions::default());
        assert!(text.unwrap_err().to_string().contains("notes.jpg"));
        let whole = png(image::RgbImage::new(20, 20).into());
        let cut = Picture::decode(&whole[..whole.len() - 30], "cut.png", DecodeOptions::default());
        assert!(matches!(cut, Err(PictureError::Decode { .. })), "{cut:?}");
        assert!(matches!(Picture::open(Path::new("/no/such.png")), Err(PictureError::Open { .. })));
    }

    #[test]
    fn a_header_that_promises_too_much_is_refused_before_decoding() {
        let mut bytes = png(image::RgbImage::new(1, 1).into());
        bytes[16..24].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
        // The header's checksum must fit for the decoder to believe it.
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        let got = Picture::decode(&bytes, "bomb.png", DecodeOptions::default());
        assert!(matches!(got, Err(PictureError::TooLarge { width: 65535, .. })), "{got:?}");
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, &b| {
            (0..8).fold(crc ^ b as u32, |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
        })
    }

    #[test]
    fn crops_are_clipped_and_never_empty() {
        let p = Picture::new(3, 2, (0..18).collect());
        assert_eq!(p.crop([1., 0., 2., 1.]).rgb(), [3, 4, 5]);
        assert_eq!(p.crop([-5., -5., 50., 50.]), p);
        let c = p.crop([7., 7., 7., 7.]);
        assert_eq!((c.width(), c.height()), (1, 1));
    }
}
