//! Pictures from and to files, under limits.

use crate::{Error, Picture, Result};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader};
use std::{
    io::{Cursor, Read, Write},
    path::Path,
};

/// Most bytes of a file.
const MAX_BYTES: u64 = 512 << 20;
/// Most pixels a side.
const MAX_SIDE: u32 = 30_000;
/// Most pixels at all.
const MAX_PIXELS: u64 = 100_000_000;
/// Quality of written JPEG files.
const JPEG_QUALITY: u8 = 95;

fn image_error(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::Image { path: path.into(), what: what.to_string() }
}

/// Reads a PNG, JPEG or WebP of 8 or 16 bits a channel, with or without alpha; EXIF orientation is applied. Values are
/// sRGB-encoded in [-1, 1].
///
/// # Errors
/// [`Error::Image`] with the file and the cause: not there, not a picture, damaged, or beyond the limits (512 MiB, 30,000 pixels
/// a side, 100 megapixels), which are checked before anything is decoded.
pub fn load_picture(path: impl AsRef<Path>) -> Result<Picture> {
    let path = path.as_ref();
    let fail = |what: String| image_error(path, what);
    let info = std::fs::metadata(path).map_err(|e| fail(e.to_string()))?;
    if info.is_dir() {
        return Err(fail("this is a folder, not a picture".into()));
    }
    if info.len() > MAX_BYTES {
        return Err(fail(format!("{} bytes; at most {MAX_BYTES} are read", info.len())));
    }
    // A device or a pipe tells no length.
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|e| fail(e.to_string()))?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| fail(e.to_string()))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(fail(format!("endless; at most {MAX_BYTES} bytes are read")));
    }
    let reader =
        ImageReader::new(Cursor::new(&bytes)).with_guessed_format().map_err(|e| fail(e.to_string()))?;
    match reader.format() {
        Some(ImageFormat::Jpeg) if is_cut_jpeg(&bytes) => {
            return Err(fail("damaged picture: the JPEG file ends too early".into()));
        }
        Some(ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP) => {}
        _ => return Err(fail("not a PNG, JPEG or WebP picture".into())),
    }
    let mut decoder = reader.into_decoder().map_err(|e| fail(format!("damaged picture: {e}")))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(fail(format!("the picture has {width} x {height} pixels")));
    }
    if width > MAX_SIDE || height > MAX_SIDE || u64::from(width) * u64::from(height) > MAX_PIXELS {
        let what =
            format!("{width} x {height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all are read");
        return Err(fail(what));
    }
    // Some files carry no readable orientation: they are taken as they stand.
    let orientation = decoder.orientation().ok();
    let mut decoded =
        DynamicImage::from_decoder(decoder).map_err(|e| fail(format!("damaged picture: {e}")))?;
    if let Some(orientation) = orientation {
        decoded.apply_orientation(orientation);
    }
    let (height, width) = (decoded.height() as usize, decoded.width() as usize);
    let signed = |v: f32| v * 2.0 - 1.0;
    if decoded.color().has_alpha() {
        let rgba = decoded.into_rgba32f().into_raw();
        let rgb = rgba.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]].map(signed)).collect();
        let alpha = rgba.chunks_exact(4).map(|p| p[3]).collect();
        return Ok(Picture { alpha: Some(alpha), ..Picture::from_rgb(height, width, rgb) });
    }
    let rgb = decoded.into_rgb32f().into_raw().into_iter().map(signed).collect();
    Ok(Picture::from_rgb(height, width, rgb))
}

/// Does the file lack the end marker of its last scan? The decoder fills what is missing with grey.
fn is_cut_jpeg(bytes: &[u8]) -> bool {
    let last = |marker: [u8; 2]| bytes.windows(2).rposition(|w| w == marker);
    // Inside of a scan 0xff is never followed by one of these.
    last([0xff, 0xd9]) < last([0xff, 0xda])
}

/// Formats that are written.
#[derive(Clone, Copy, PartialEq)]
enum Output {
    Png,
    Jpeg,
    WebP,
}

fn output_format(path: &Path) -> Result<Output> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "png" => Ok(Output::Png),
        "jpg" | "jpeg" => Ok(Output::Jpeg),
        "webp" => Ok(Output::WebP),
        _ => Err(image_error(path, "unknown output format; use .png, .jpg, .jpeg or .webp")),
    }
}

/// Checks that a picture could be written here, before any work is done for it.
///
/// # Errors
/// [`Error::Image`]: an unknown extension, a folder that is not there, or a folder of that name.
pub fn check_output(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    output_format(path)?;
    if path.is_dir() {
        return Err(image_error(path, "this is a folder; name a file"));
    }
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    match folder {
        Some(folder) if !folder.is_dir() => {
            Err(image_error(path, format!("the folder {} does not exist", folder.display())))
        }
        _ => Ok(()),
    }
}

/// Writes a PNG, JPEG (quality 95, on white where it is transparent) or WebP (lossless) by the file's extension: whole or not at
/// all. `text` goes into text chunks of a PNG; the other formats have no place for it.
///
/// # Errors
/// [`Error::Image`] with the file and the cause.
pub fn save_picture(path: impl AsRef<Path>, picture: &Picture, text: &[(String, String)]) -> Result<()> {
    let path = path.as_ref();
    let fail = |e: &dyn std::fmt::Display| image_error(path, e);
    let format = output_format(path)?;
    let (width, height) = match (u32::try_from(picture.width), u32::try_from(picture.height)) {
        (Ok(w), Ok(h)) if picture.rgb.len() == picture.width * picture.height * 3 => (w, h),
        _ => return Err(fail(&format!("{} x {} pixels can't be written", picture.width, picture.height))),
    };
    let bytes = to_bytes(picture, format == Output::Jpeg);
    let colour = if bytes.len() == picture.rgb.len() {
        image::ExtendedColorType::Rgb8
    } else {
        image::ExtendedColorType::Rgba8
    };
    let mut file = Vec::new();
    match format {
        Output::Png => write_png(&mut file, [width, height], &bytes, text).map_err(|e| fail(&e))?,
        Output::Jpeg => {
            let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut file, JPEG_QUALITY);
            image::ImageEncoder::write_image(encoder, &bytes, width, height, colour).map_err(|e| fail(&e))?;
        }
        Output::WebP => {
            let encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut file);
            image::ImageEncoder::write_image(encoder, &bytes, width, height, colour).map_err(|e| fail(&e))?;
        }
    }
    Ok(hywu_core::write_atomic(path, |w| w.write_all(&file))?)
}

/// 8-bit RGB, or RGBA where there is alpha that is not to be put on white.
fn to_bytes(picture: &Picture, on_white: bool) -> Vec<u8> {
    let byte = |v: f32| (v.clamp(0.0, 1.0) * 255.0).round() as u8;
    let unit = |v: f32| (v + 1.0) * 0.5;
    match &picture.alpha {
        None => picture.rgb.iter().map(|v| byte(unit(*v))).collect(),
        Some(alpha) if on_white => {
            let pixels = picture.rgb.chunks_exact(3).zip(alpha);
            pixels.flat_map(|(c, a)| [0, 1, 2].map(|i| byte(unit(c[i]) * a + 1.0 - a))).collect()
        }
        Some(alpha) => {
            let pixels = picture.rgb.chunks_exact(3).zip(alpha);
            pixels
                .flat_map(|(c, a)| [byte(unit(c[0])), byte(unit(c[1])), byte(unit(c[2])), byte(*a)])
                .collect()
        }
    }
}

fn write_png(
    out: &mut dyn Write,
    [width, height]: [u32; 2],
    bytes: &[u8],
    text: &[(String, String)],
) -> std::result::Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(out, width, height);
    let alpha = bytes.len() as u64 == u64::from(width) * u64::from(height) * 4;
    encoder.set_color(if alpha { png::ColorType::Rgba } else { png::ColorType::Rgb });
    encoder.set_depth(png::BitDepth::Eight);
    for (key, value) in text {
        // iTXt takes any language.
        encoder.add_itxt_chunk(key.clone(), value.clone())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(bytes)?;
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(height: usize, width: usize) -> Picture {
        let n = height * width * 3;
        Picture::from_rgb(height, width, (0..n).map(|i| (i % 256) as f32 / 127.5 - 1.0).collect())
    }

    #[test]
    fn png_and_webp_keep_every_value_and_alpha() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for name in ["a.png", "a.webp"] {
            let mut picture = ramp(5, 7);
            picture.alpha = Some((0..35).map(|i| i as f32 * 7.0 / 255.0).collect());
            save_picture(dir.path().join(name), &picture, &[]).expect("writable");
            let read = load_picture(dir.path().join(name)).expect("readable");
            let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(
                same(&picture.rgb, &read.rgb)
                    && same(&picture.alpha.expect("set"), &read.alpha.expect("kept"))
            );
        }
    }

    #[test]
    fn sixteen_bits_are_not_cut_to_eight() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("deep.png");
        let deep = image::ImageBuffer::<image::Rgb<u16>, _>::from_raw(1, 1, vec![257u16, 300, 65535])
            .expect("three");
        DynamicImage::ImageRgb16(deep).save(&path).expect("writable");
        let rgb = load_picture(&path).expect("readable").rgb;
        assert!((rgb[1] - (300.0 / 65535.0 * 2.0 - 1.0)).abs() < 1e-6 && (rgb[1] - rgb[0]).abs() > 1e-3);
    }

    #[test]
    fn exif_orientation_turns_the_picture() {
        // A JPEG of 4 x 2 pixels with an APP1 segment that says "rotate by 90 degrees" (6).
        let mut jpeg = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new(&mut jpeg);
        let pixels: Vec<u8> = (0..8).flat_map(|i| [if i % 4 < 2 { 250 } else { 5 }; 3]).collect();
        image::ImageEncoder::write_image(encoder, &pixels, 4, 2, image::ExtendedColorType::Rgb8)
            .expect("memory");
        let mut app1 =
            b"\xff\xe1\x00\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
                .to_vec();
        app1.truncate(2 + 0x22);
        jpeg.splice(2..2, app1);
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("turned.jpg");
        std::fs::write(&path, &jpeg).expect("writable");
        let read = load_picture(&path).expect("readable");
        assert_eq!((read.height, read.width), (4, 2));
        // The left, bright half is now the upper one.
        assert!(read.rgb[0] > 0.5 && read.rgb[4 * 2 * 3 - 1] < -0.5);
    }

    #[test]
    fn transparent_jpegs_stand_on_white() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("a.jpg");
        let black = Picture::from_rgb(8, 8, vec![-1.0; 192]);
        save_picture(&path, &Picture { alpha: Some(vec![0.0; 64]), ..black }, &[]).expect("writable");
        assert!(load_picture(&path).expect("readable").rgb.iter().all(|v| *v > 0.98));
    }
}
