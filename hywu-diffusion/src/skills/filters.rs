//! Classical image filters: the true edits that the skills are learnt from. Values in [0, 1] inside, pictures outside.

use super::Place;
use crate::{Picture, picture::TASK, tiles::reflect};
use hywu_core::Philox;
use rayon::prelude::*;

/// Weights of R, G, B in luma (ITU-R BT.601).
const LUMA: [f32; 3] = [0.299, 0.587, 0.114];

/// [`reflect`] for places before the first pixel, too.
fn mirror(i: isize, n: usize) -> usize {
    reflect(i.unsigned_abs(), n)
}

/// Luma of a colour.
pub fn luma(c: [f32; 3]) -> f32 {
    LUMA[0] * c[0] + LUMA[1] * c[1] + LUMA[2] * c[2]
}

/// a + k * (b - a), per channel.
pub fn mix(a: [f32; 3], b: [f32; 3], k: f32) -> [f32; 3] {
    [0, 1, 2].map(|i| a[i] + k * (b[i] - a[i]))
}

/// A picture as large as `p` whose rows, zeros first, `f` writes by their number; several at once where the picture is large.
fn rows(p: &Picture, f: impl Fn(usize, &mut [f32]) + Sync) -> Picture {
    let mut rgb = vec![0.0; p.rgb.len()];
    let row = (p.width * 3).max(1);
    rgb.par_chunks_mut(row).enumerate().with_min_len(TASK.div_ceil(row)).for_each(|(y, row)| f(y, row));
    Picture::from_rgb(p.height, p.width, rgb)
}

/// Row `y` of a picture.
fn row(p: &Picture, y: usize) -> &[f32] {
    &p.rgb[y * p.width * 3..(y + 1) * p.width * 3]
}

/// A colour of a picture in [0, 1]. A mean of black pixels may have been rounded to just below black, of which no power is a number.
fn unit(c: &[f32]) -> [f32; 3] {
    [0, 1, 2].map(|i| ((c[i] + 1.0) * 0.5).clamp(0.0, 1.0))
}

/// Every pixel by a function of its colour, clamped.
pub fn colours(p: &Picture, f: impl Fn([f32; 3]) -> [f32; 3] + Sync) -> Picture {
    rows(p, |y, out| {
        for (out, c) in out.chunks_exact_mut(3).zip(row(p, y).chunks_exact(3)) {
            out.copy_from_slice(&f(unit(c)).map(|v| v.clamp(0.0, 1.0) * 2.0 - 1.0));
        }
    })
}

/// Every pixel by a function of its colour and place (y, x in -1..1 of the whole that `p` is a part of), clamped.
pub fn placed(p: &Picture, at: Place, f: impl Fn([f32; 3], f32, f32) -> [f32; 3] + Sync) -> Picture {
    rows(p, |y, out| {
        let across = (at.x..).map(|x| crate::pixel_position(x, at.width));
        let down = crate::pixel_position(at.y + y, at.height);
        for ((out, c), x) in out.chunks_exact_mut(3).zip(row(p, y).chunks_exact(3)).zip(across) {
            out.copy_from_slice(&f(unit(c), down, x).map(|v| v.clamp(0.0, 1.0) * 2.0 - 1.0));
        }
    })
}

/// Normal noise of this standard deviation (in units of white) on every channel value; that of a value depends on `seed` and on its
/// place in the whole picture.
pub fn noise(p: &Picture, at: Place, sigma: f32, seed: u64) -> Picture {
    let philox = Philox::new(seed);
    rows(p, |y, out| {
        philox.fill_normal(0, (((at.y + y) * at.width + at.x) * 3) as u64, out);
        out.iter_mut().zip(row(p, y)).for_each(|(o, v)| *o = (v + 2.0 * sigma * *o).clamp(-1.0, 1.0));
    })
}

/// v^g: brighter below 1, darker above.
pub fn gamma(p: &Picture, g: f32) -> Picture {
    colours(p, |c| c.map(|v| v.powf(g)))
}

/// Distances from middle gray times `k`.
pub fn contrast(p: &Picture, k: f32) -> Picture {
    colours(p, |c| c.map(|v| 0.5 + k * (v - 0.5)))
}

/// Distances from the luma times `k`.
pub fn saturation(p: &Picture, k: f32) -> Picture {
    colours(p, |c| mix([luma(c); 3], c, k))
}

/// The luma in every channel.
pub fn grayscale(p: &Picture) -> Picture {
    saturation(p, 0.0)
}

/// Channel gains.
pub fn gains(p: &Picture, gain: [f32; 3]) -> Picture {
    colours(p, |c| [0, 1, 2].map(|i| c[i] * gain[i]))
}

/// The luma in shades of brown.
pub fn sepia(p: &Picture) -> Picture {
    colours(p, |c| {
        let l = luma(c);
        [l * 1.07 + 0.05, l * 0.93 + 0.02, l * 0.72]
    })
}

/// So many levels a channel.
pub fn posterise(p: &Picture, levels: f32) -> Picture {
    colours(p, |c| c.map(|v| (v * levels).floor().min(levels - 1.0) / (levels - 1.0)))
}

/// Lifted blacks, weak colours, a yellow cast: an old print.
pub fn fade(p: &Picture, k: f32) -> Picture {
    colours(p, |c| {
        let pale = mix([luma(c); 3], c, 0.35);
        let old = [pale[0] * 0.62 + 0.34, pale[1] * 0.58 + 0.30, pale[2] * 0.48 + 0.24];
        mix(c, old, k)
    })
}

/// Moonlight instead of daylight; `k` is how much of it.
pub fn night(p: &Picture, k: f32) -> Picture {
    colours(p, |c| {
        let dark = mix([luma(c); 3], c, 0.5).map(|v| v * v.sqrt());
        mix(c, [dark[0] * 0.34, dark[1] * 0.42, dark[2] * 0.72 + 0.03], k)
    })
}

/// Veil of `air`, thicker towards the top: density (1 - 0.3 * y) * k.
pub fn fog(p: &Picture, at: Place, k: f32, air: [f32; 3]) -> Picture {
    placed(p, at, |c, y, _| mix(c, air, (k * (1.0 - 0.3 * y)).min(0.95)))
}

/// Darker towards the corners: there by the factor 1 - `k`.
pub fn vignette(p: &Picture, at: Place, k: f32) -> Picture {
    placed(p, at, |c, y, x| c.map(|v| v * (1.0 - k * ((x * x + y * y) * 0.5).powf(1.2)).max(0.0)))
}

/// Gaussian blur with reflected borders; sigma in pixels.
pub fn blur(p: &Picture, sigma: f32) -> Picture {
    let radius = (3.0 * sigma).ceil() as isize;
    let mut kernel: Vec<f32> =
        (-radius..=radius).map(|i| (-0.5 * (i as f32 / sigma).powi(2)).exp()).collect();
    let sum: f32 = kernel.iter().sum();
    kernel.iter_mut().for_each(|k| *k /= sum);
    let columns: Vec<usize> = (-radius..p.width as isize + radius).map(|x| mirror(x, p.width) * 3).collect();
    let across = rows(p, |y, out| {
        let source = row(p, y);
        let wide: Vec<f32> =
            columns.iter().flat_map(|&x| [source[x], source[x + 1], source[x + 2]]).collect();
        for (i, k) in kernel.iter().enumerate() {
            out.iter_mut().zip(&wide[i * 3..]).for_each(|(o, v)| *o += k * v);
        }
    });
    rows(p, |y, out| {
        for (k, i) in kernel.iter().zip(-radius..) {
            let source = row(&across, mirror(y as isize + i, p.height));
            out.iter_mut().zip(source).for_each(|(o, v)| *o += k * v);
        }
    })
}

/// Mean of every `n` x `n` block, counted from the upper left corner.
pub fn pixelate(p: &Picture, n: usize) -> Picture {
    let (h, w) = (p.height, p.width);
    let mut rgb = vec![0.0; p.rgb.len()];
    for (y, x) in (0..h).step_by(n).flat_map(|y| (0..w).step_by(n).map(move |x| (y, x))) {
        let (bottom, right) = ((y + n).min(h), (x + n).min(w));
        let pixels = || (y..bottom).flat_map(|y| (x..right).map(move |x| (y * w + x) * 3));
        let count = pixels().count() as f32;
        for c in 0..3 {
            let mean = pixels().map(|i| p.rgb[i + c]).sum::<f32>() / count;
            pixels().for_each(|i| rgb[i + c] = mean);
        }
    }
    Picture::from_rgb(h, w, rgb)
}

/// Through a JPEG file of this quality (1..=100) and back.
pub fn jpeg(p: &Picture, quality: u8) -> Picture {
    let bytes: Vec<u8> = p.rgb.iter().map(|v| ((v + 1.0) * 127.5).round() as u8).collect();
    let mut file = Vec::new();
    let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut file, quality);
    let written = image::ImageEncoder::write_image(
        encoder,
        &bytes,
        p.width as u32,
        p.height as u32,
        image::ExtendedColorType::Rgb8,
    );
    let read = written.and_then(|()| image::load_from_memory_with_format(&file, image::ImageFormat::Jpeg));
    // Encoding to memory and decoding it again has nothing to fail on; the clean picture is a harmless answer.
    let Ok(read) = read else { return p.clone() };
    let rgb = read.into_rgb8().into_raw().into_iter().map(|v| f32::from(v) / 127.5 - 1.0).collect();
    Picture::from_rgb(p.height, p.width, rgb)
}

/// Gradient magnitude of the luma (Sobel), in [0, 1].
fn sobel(p: &Picture) -> Vec<f32> {
    let (h, w) = (p.height, p.width);
    // The first and the last column stand twice, so that every pixel has neighbours.
    let wide = w + 2;
    let mut gray = Vec::with_capacity(h * wide);
    for pixels in p.rgb.chunks_exact((w * 3).max(1)) {
        let start = gray.len();
        gray.push(0.0);
        gray.extend(pixels.chunks_exact(3).map(|c| luma(unit(c))));
        gray.push(gray[start + w]);
        gray[start] = gray[start + 1];
    }
    let mut magnitude = Vec::with_capacity(h * w);
    for y in 0..h {
        let at = |y: usize| &gray[y * wide..(y + 1) * wide];
        let (above, here, below) = (at(y.saturating_sub(1)), at(y), at((y + 1).min(h - 1)));
        for x in 0..w {
            let across = |row: &[f32]| row[x] + 2.0 * row[x + 1] + row[x + 2];
            let down = |x: usize| above[x] + 2.0 * here[x] + below[x];
            let (dy, dx) = (across(below) - across(above), down(x + 2) - down(x));
            magnitude.push(((dy * dy + dx * dx).sqrt() * 0.6).min(1.0));
        }
    }
    magnitude
}

/// White lines on black.
pub fn edges(p: &Picture) -> Picture {
    let rgb = sobel(&blur(p, 0.8)).iter().flat_map(|m| [m * 2.0 - 1.0; 3]).collect();
    Picture::from_rgb(p.height, p.width, rgb)
}

/// Pencil on white paper: gray divided by its own blur.
pub fn sketch(p: &Picture) -> Picture {
    let gray = grayscale(p);
    let soft = blur(&gray, 2.5);
    let pencil = |(g, s): (&f32, &f32)| {
        let (g, s) = ((g + 1.0) * 0.5, (s + 1.0) * 0.5);
        let share = ((g + 0.02) / (s + 0.02)).min(1.0);
        share * share * 2.0 - 1.0
    };
    Picture::from_rgb(p.height, p.width, gray.rgb.iter().zip(&soft.rgb).map(pencil).collect())
}

/// Flat colours with dark outlines.
pub fn cartoon(p: &Picture) -> Picture {
    let flat = saturation(&kuwahara(p, 2), 1.5);
    let lines = sobel(&blur(p, 1.0));
    let mut drawn = colours(&flat, |c| {
        let l = luma(c).max(1e-3);
        let level = ((l * 6.0).floor() + 0.5) / 6.0;
        c.map(|v| v * level / l)
    });
    drawn.rgb.chunks_exact_mut(3).zip(lines).for_each(|(c, m)| {
        let ink = 1.0 - ((m - 0.25) * 3.0).clamp(0.0, 0.9);
        c.iter_mut().for_each(|v| *v = (*v + 1.0) * ink - 1.0);
    });
    drawn
}

/// Sum of every `n` values that are `stride` apart, from each value on that has as many after it.
fn sums<T: Copy + std::ops::Add<Output = T>>(values: &[T], n: usize, stride: usize) -> Vec<T> {
    let mut sums = values[..values.len() - (n - 1) * stride].to_vec();
    for i in 1..n {
        sums.iter_mut().zip(&values[i * stride..]).for_each(|(s, v)| *s = *s + *v);
    }
    sums
}

/// Kuwahara filter: the mean of that quarter of the neighbourhood which varies least; looks like oil paint.
pub fn kuwahara(p: &Picture, radius: usize) -> Picture {
    let (r, side) = (radius as isize, radius + 1);
    let places = |n: usize| (-r..n as isize + r).map(move |i| mirror(i, n));
    // With a border of the radius: the three channels, and the luma and its square, whose difference of means needs f64.
    let wide = p.width + 2 * radius;
    let colours: Vec<f32> = places(p.height)
        .flat_map(|y| places(p.width).map(move |x| (y * p.width + x) * 3))
        .flat_map(|i| [p.rgb[i], p.rgb[i + 1], p.rgb[i + 2]])
        .collect();
    let lumas: Vec<f64> = colours.chunks_exact(3).map(|c| luma([c[0], c[1], c[2]]).into()).collect();
    let squares: Vec<f64> = lumas.iter().map(|l| l * l).collect();
    // Of the square of `side` pixels that starts at each pixel. Those that run over the end of a row are never asked for.
    let squared = |values: &[f64]| sums(&sums(values, side, 1), side, wide);
    let (lumas, squares) = (squared(&lumas), squared(&squares));
    let colours = sums(&sums(&colours, side, 3), side, wide * 3);
    let count = (side * side) as f64;
    let varies = |i: usize| squares[i] - lumas[i] * lumas[i] / count;
    rows(p, |y, out| {
        for (x, out) in out.chunks_exact_mut(3).enumerate() {
            let first = y * wide + x;
            let quarters = [first + radius, first + radius * wide, first + radius * wide + radius];
            let mut best = (varies(first), first);
            for i in quarters {
                let v = varies(i);
                if v < best.0 {
                    best = (v, i);
                }
            }
            (0..3).for_each(|c| out[c] = colours[best.1 * 3 + c] / count as f32);
        }
    })
}

/// `x` plus so many periods that it lies in 0..period. (`rem_euclid` gives the same by a slow division.)
fn wrap(x: f32, period: f32) -> f32 {
    x - period * (x / period).floor()
}

/// Hue in turns (0 red, 1/3 green, 2/3 blue), saturation and value of a colour.
pub fn hsv(c: [f32; 3]) -> [f32; 3] {
    let (max, min) = (c[0].max(c[1]).max(c[2]), c[0].min(c[1]).min(c[2]));
    let range = max - min;
    if range <= 1e-6 {
        return [0.0, 0.0, max];
    }
    let sixth = if max == c[0] {
        wrap((c[1] - c[2]) / range, 6.0)
    } else if max == c[1] {
        (c[2] - c[0]) / range + 2.0
    } else {
        (c[0] - c[1]) / range + 4.0
    };
    [sixth / 6.0, range / max, max]
}

/// The inverse of [`hsv`].
pub fn from_hsv([h, s, v]: [f32; 3]) -> [f32; 3] {
    [5.0, 3.0, 1.0].map(|n| {
        let k = wrap(n + h * 6.0, 6.0);
        v - v * s * k.min(4.0 - k).clamp(0.0, 1.0)
    })
}

/// How much a colour, as [`hsv`] gives it, belongs to `hue` (in turns): 1 within 1/24 turn, falling to 0 at 1/9; pale and dark
/// colours count less.
pub fn belongs([h, s, v]: [f32; 3], hue: f32) -> f32 {
    let distance = wrap(h - hue + 0.5, 1.0) - 0.5;
    let near = ((1.0 / 9.0 - distance.abs()) / (1.0 / 9.0 - 1.0 / 24.0)).clamp(0.0, 1.0);
    near * ((s - 0.2) / 0.2).clamp(0.0, 1.0) * ((v - 0.1) / 0.15).clamp(0.0, 1.0)
}

/// Turns what is of hue `from` to hue `to`, in turns.
pub fn recolour(p: &Picture, from: f32, to: f32) -> Picture {
    colours(p, |c| {
        let [h, s, v] = hsv(c);
        mix(c, from_hsv([h + to - from, s, v]), belongs([h, s, v], from))
    })
}
