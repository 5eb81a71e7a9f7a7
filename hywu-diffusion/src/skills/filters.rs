//! Classical image filters: the true edits that the skills are learnt from. Values in [0, 1] inside, pictures outside.

use crate::{Picture, tiles::reflect};
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

/// Every pixel by a function of its colour, clamped.
pub fn colours(p: &Picture, f: impl Fn([f32; 3]) -> [f32; 3] + Sync) -> Picture {
    placed(p, |c, _, _| f(c))
}

/// Every pixel by a function of its colour and place (y, x in -1..1), clamped.
pub fn placed(p: &Picture, f: impl Fn([f32; 3], f32, f32) -> [f32; 3] + Sync) -> Picture {
    let mut rgb = p.rgb.clone();
    rgb.par_chunks_mut(p.width * 3).enumerate().for_each(|(y, row)| {
        let y = crate::pixel_position(y, p.height);
        for (x, c) in row.chunks_exact_mut(3).enumerate() {
            let new = f([0, 1, 2].map(|i| (c[i] + 1.0) * 0.5), y, crate::pixel_position(x, p.width));
            (0..3).for_each(|i| c[i] = new[i].clamp(0.0, 1.0) * 2.0 - 1.0);
        }
    });
    Picture::from_rgb(p.height, p.width, rgb)
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
        let dark = mix([luma(c); 3], c, 0.5).map(|v| v.powf(1.5));
        mix(c, [dark[0] * 0.34, dark[1] * 0.42, dark[2] * 0.72 + 0.03], k)
    })
}

/// Veil of `air`, thicker towards the top: density (1 - 0.3 * y) * k.
pub fn fog(p: &Picture, k: f32, air: [f32; 3]) -> Picture {
    placed(p, |c, y, _| mix(c, air, (k * (1.0 - 0.3 * y)).min(0.95)))
}

/// Darker towards the corners: there by the factor 1 - `k`.
pub fn vignette(p: &Picture, k: f32) -> Picture {
    placed(p, |c, y, x| c.map(|v| v * (1.0 - k * ((x * x + y * y) * 0.5).powf(1.2)).max(0.0)))
}

/// Gaussian blur with reflected borders; sigma in pixels.
pub fn blur(p: &Picture, sigma: f32) -> Picture {
    let radius = (3.0 * sigma).ceil() as isize;
    let mut kernel: Vec<f32> =
        (-radius..=radius).map(|i| (-0.5 * (i as f32 / sigma).powi(2)).exp()).collect();
    let sum: f32 = kernel.iter().sum();
    kernel.iter_mut().for_each(|k| *k /= sum);
    let (h, w) = (p.height, p.width);
    let mut across = vec![0.0; p.rgb.len()];
    across.par_chunks_mut(w * 3).zip(p.rgb.par_chunks(w * 3)).for_each(|(out, row)| {
        for (x, out) in out.chunks_exact_mut(3).enumerate() {
            for (k, i) in kernel.iter().zip(-radius..) {
                let from = mirror(x as isize + i, w) * 3;
                (0..3).for_each(|c| out[c] += k * row[from + c]);
            }
        }
    });
    let mut down = vec![0.0; p.rgb.len()];
    down.par_chunks_mut(w * 3).enumerate().for_each(|(y, out)| {
        for (k, i) in kernel.iter().zip(-radius..) {
            let row = mirror(y as isize + i, h) * w * 3;
            out.iter_mut().zip(&across[row..row + w * 3]).for_each(|(o, v)| *o += k * v);
        }
    });
    Picture::from_rgb(h, w, down)
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
    let (h, w) = (p.height as isize, p.width as isize);
    let gray: Vec<f32> = p.rgb.chunks_exact(3).map(|c| (luma([c[0], c[1], c[2]]) + 1.0) * 0.5).collect();
    let at = |y: isize, x: isize| gray[y.clamp(0, h - 1) as usize * p.width + x.clamp(0, w - 1) as usize];
    let magnitude = |i: usize| {
        let (y, x) = ((i / p.width) as isize, (i % p.width) as isize);
        let row = |dy: isize| at(y + dy, x - 1) + 2.0 * at(y + dy, x) + at(y + dy, x + 1);
        let column = |dx: isize| at(y - 1, x + dx) + 2.0 * at(y, x + dx) + at(y + 1, x + dx);
        ((row(1) - row(-1)).hypot(column(1) - column(-1)) * 0.6).min(1.0)
    };
    (0..gray.len()).into_par_iter().map(magnitude).collect()
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
        (((g + 0.02) / (s + 0.02)).min(1.0).powf(2.0)) * 2.0 - 1.0
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

/// Kuwahara filter: the mean of that quarter of the neighbourhood which varies least; looks like oil paint.
pub fn kuwahara(p: &Picture, radius: usize) -> Picture {
    let (h, w, r) = (p.height, p.width, radius as isize);
    // Integral images of the three channels and of the squared luma, with a border of the radius.
    let (ph, pw) = (h + 2 * radius, w + 2 * radius);
    let mut sums = vec![[0.0f64; 5]; (ph + 1) * (pw + 1)];
    for y in 0..ph {
        let from_y = mirror(y as isize - r, h);
        let mut row = [0.0f64; 5];
        for x in 0..pw {
            let i = (from_y * w + mirror(x as isize - r, w)) * 3;
            let c = [p.rgb[i], p.rgb[i + 1], p.rgb[i + 2]];
            let l = f64::from(luma(c));
            let values = [c[0].into(), c[1].into(), c[2].into(), l, l * l];
            for k in 0..5 {
                row[k] += values[k];
                sums[(y + 1) * (pw + 1) + x + 1][k] = sums[y * (pw + 1) + x + 1][k] + row[k];
            }
        }
    }
    let side = radius + 1;
    let mut rgb = vec![0.0; p.rgb.len()];
    rgb.par_chunks_mut(w * 3).enumerate().for_each(|(y, row)| {
        for (x, out) in row.chunks_exact_mut(3).enumerate() {
            let mut best = (f64::INFINITY, [0.0; 3]);
            for (y, x) in [(y, x), (y, x + radius), (y + radius, x), (y + radius, x + radius)] {
                let at = |y: usize, x: usize| sums[y * (pw + 1) + x];
                let (a, b, c, d) = (at(y, x), at(y, x + side), at(y + side, x), at(y + side, x + side));
                let mean: Vec<f64> =
                    (0..5).map(|k| (d[k] - b[k] - c[k] + a[k]) / (side * side) as f64).collect();
                let variance = mean[4] - mean[3] * mean[3];
                if variance < best.0 {
                    best = (variance, [mean[0] as f32, mean[1] as f32, mean[2] as f32]);
                }
            }
            out.copy_from_slice(&best.1);
        }
    });
    Picture::from_rgb(h, w, rgb)
}

/// Hue in turns (0 red, 1/3 green, 2/3 blue), saturation and value of a colour.
pub fn hsv(c: [f32; 3]) -> [f32; 3] {
    let (max, min) = (c[0].max(c[1]).max(c[2]), c[0].min(c[1]).min(c[2]));
    let range = max - min;
    if range <= 1e-6 {
        return [0.0, 0.0, max];
    }
    let sixth = if max == c[0] {
        ((c[1] - c[2]) / range).rem_euclid(6.0)
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
        let k = (n + h * 6.0).rem_euclid(6.0);
        v - v * s * k.min(4.0 - k).clamp(0.0, 1.0)
    })
}

/// How much a colour belongs to `hue` (in turns): 1 within 1/24 turn, falling to 0 at 1/9; pale and dark colours count less.
pub fn belongs(c: [f32; 3], hue: f32) -> f32 {
    let [h, s, v] = hsv(c);
    let distance = (h - hue + 0.5).rem_euclid(1.0) - 0.5;
    let near = ((1.0 / 9.0 - distance.abs()) / (1.0 / 9.0 - 1.0 / 24.0)).clamp(0.0, 1.0);
    near * ((s - 0.2) / 0.2).clamp(0.0, 1.0) * ((v - 0.1) / 0.15).clamp(0.0, 1.0)
}

/// Turns what is of hue `from` to hue `to`, in turns.
pub fn recolour(p: &Picture, from: f32, to: f32) -> Picture {
    colours(p, |c| {
        let [h, s, v] = hsv(c);
        mix(c, from_hsv([(h + to - from).rem_euclid(1.0), s, v]), belongs(c, from))
    })
}
