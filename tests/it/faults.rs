//! Bad and odd files from outside: they work, or one error says which file and why.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use image::{DynamicImage, ImageFormat};
use tempfile::TempDir;
use valor::sight::Picture;
use valor::weights::Checkpoint;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn save(dir: &TempDir, name: &str, image: impl Into<DynamicImage>) -> PathBuf {
    let path = dir.path().join(name);
    image.into().save(&path).unwrap();
    path
}

fn size(path: &Path) -> (u32, u32) {
    let picture = Picture::open(path).unwrap();
    assert_eq!(picture.rgb().len(), (picture.width() * picture.height() * 3) as usize);
    (picture.width(), picture.height())
}

/// Opening fails with one line that names the file and holds `part`.
fn refused(path: &Path, part: &str) {
    let error = Picture::open(path).unwrap_err().to_string();
    let file = path.display().to_string();
    assert!(error.contains(&file) && error.contains(part) && error.lines().count() == 1, "{error}");
}

#[test]
fn pictures_of_any_size_and_depth_open() {
    let dir = folder();
    assert_eq!(size(&save(&dir, "dot.png", image::RgbImage::new(1, 1))), (1, 1));
    assert_eq!(size(&save(&dir, "wide.png", image::RgbImage::new(20_000, 100))), (20_000, 100));
    let grey = save(&dir, "grey.png", image::GrayImage::from_pixel(2, 1, image::Luma([77])));
    assert_eq!(Picture::open(&grey).unwrap().rgb(), [77; 6]);
    let deep = image::ImageBuffer::from_pixel(1, 1, image::Luma([0xffffu16]));
    assert_eq!(Picture::open(&save(&dir, "deep.png", deep)).unwrap().rgb(), [255; 3]);
}

#[test]
fn a_picture_is_known_by_its_content_not_by_its_name() {
    let dir = folder();
    let path = dir.path().join("really-a-png.jpg");
    image::RgbImage::new(7, 5).save_with_format(&path, ImageFormat::Png).unwrap();
    assert_eq!(size(&path), (7, 5));
}

#[test]
fn what_is_no_picture_is_refused_by_name() {
    let dir = folder();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    refused(&dir.path().join("missing.png"), "No such file");
    refused(dir.path(), "directory");
    refused(&write("empty.png", b""), "not a picture");
    refused(&save(&dir, "thread.png", image::RgbImage::new(20_000, 99)), "200 to 1");
    refused(&write("notes.jpg", b"Dear diary,\n"), "not a picture");
    for format in ["png", "jpg", "webp", "bmp", "tiff", "gif"] {
        let whole = save(&dir, &format!("whole.{format}"), noise());
        assert_eq!(size(&whole), (64, 48));
        let bytes = std::fs::read(&whole).unwrap();
        refused(&write(&format!("head.{format}"), &bytes[..12]), "");
        // Some decoders show what is there of a picture that ends early; none may do worse.
        match Picture::open(&write(&format!("half.{format}"), &bytes[..bytes.len() / 2])) {
            Ok(part) => assert_eq!((part.width(), part.height()), (64, 48), "{format}"),
            Err(e) => assert!(e.to_string().contains("half."), "{e}"),
        }
    }
    let bytes = std::fs::read(dir.path().join("whole.png")).unwrap();
    refused(&write("cut.png", &bytes[..bytes.len() / 2]), "not a picture");
}

fn noise() -> image::RgbImage {
    image::RgbImage::from_fn(64, 48, |x, y| {
        image::Rgb([(x * 37 + y * 91) as u8, (x * y) as u8, (x ^ y) as u8])
    })
}

#[test]
fn exif_turns_the_picture() {
    let dir = folder();
    let plain = save(&dir, "plain.jpg", image::RgbImage::new(20, 10));
    let bytes = std::fs::read(&plain).unwrap();
    // Orientation 6: turned a quarter. One APP1 segment after the start marker.
    let exif = b"\xff\xe1\0\x22Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let turned = dir.path().join("turned.jpg");
    std::fs::write(&turned, [&bytes[..2], exif, &bytes[2..]].concat()).unwrap();
    assert_eq!((size(&plain), size(&turned)), ((20, 10), (10, 20)));
}

fn weights(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("model.safetensors");
    let tensors = [("norm.weight", &[4][..]), ("proj.weight", &[3, 4])]
        .map(|(name, shape)| (name, Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()));
    candle_core::safetensors::save(&tensors.into(), &path).unwrap();
    path
}

/// Loads a network with a 4-wide norm and a 3×`width` projection.
fn load(path: &Path, width: usize) -> Result<(), String> {
    let checkpoint = Checkpoint::open(path).map_err(|e| e.to_string())?;
    let network = checkpoint.build(DType::F32, &Device::Cpu, &[], |vb| {
        vb.get(4, "norm.weight")?;
        vb.get((3, width), "proj.weight")
    });
    network.map(|_| ()).map_err(|e| e.to_string())
}

#[test]
fn weights_of_the_wrong_shape_name_tensor_and_file() {
    let dir = folder();
    let path = weights(&dir);
    load(&path, 4).unwrap();
    let error = load(&path, 5).unwrap_err();
    let file = path.display().to_string();
    for part in [&file, "proj.weight has shape [3, 4], expected [3, 5]"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!error.contains("norm.weight") && error.lines().count() == 1, "{error}");
}

#[test]
fn broken_weights_name_their_file() {
    let dir = folder();
    let path = weights(&dir);
    let whole = std::fs::read(&path).unwrap();
    let mut hostile = u64::MAX.to_le_bytes().to_vec();
    hostile.extend(&whole[8..]);
    for bytes in [&[][..], &whole[..7], &whole[..whole.len() - 1], b"no tensors, just text", &hostile] {
        std::fs::write(&path, bytes).unwrap();
        let error = load(&path, 4).unwrap_err();
        assert!(error.contains("model.safetensors") && error.lines().count() == 1, "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    let error = load(dir.path(), 4).unwrap_err();
    assert!(error.contains("holds neither model.safetensors"), "{error}");
    let error = load(&path, 4).unwrap_err();
    assert!(error.contains("no such file"), "{error}");
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index, r#"{"weight_map": {"a": "gone-1-of-2.safetensors"}}"#).unwrap();
    let error = load(dir.path(), 4).unwrap_err();
    assert!(error.contains("gone-1-of-2.safetensors is missing"), "{error}");
}
