//! Every skill with its phrasings.

use super::{
    Damaged,
    Make::{Chance, Look, Recolour, Repair, Tint},
    Skill,
    filters::*,
};
use crate::Picture;
use hywu_core::RandomStream;

const fn skill(
    name: &'static str,
    make: super::Make,
    graded: bool,
    train: &'static [&'static str],
    held_out: &'static [&'static str],
) -> Skill {
    Skill { name, make, graded, arrival: false, train, held_out }
}

const fn arrival(
    name: &'static str,
    make: super::Make,
    train: &'static [&'static str],
    held_out: &'static [&'static str],
) -> Skill {
    Skill { name, make, graded: false, arrival: true, train, held_out }
}

/// Normal noise of this standard deviation (in units of white) on every channel value.
fn noise(p: &Picture, sigma: f32, random: &mut RandomStream) -> Picture {
    let mut noisy = p.clone();
    noisy.rgb.iter_mut().for_each(|v| *v = (*v + 2.0 * sigma * random.normal()).clamp(-1.0, 1.0));
    noisy
}

/// A photo damaged by one amount.
fn by(name: &'static str, amount: f32, picture: Picture) -> Damaged {
    Damaged { picture, hidden: vec![(name, amount)] }
}

/// A colour cast: channel gains, the strongest held at 1. Hidden is what no exposure changes: the logarithms of the gains of red
/// and blue over that of green.
fn cast(p: &Picture, random: &mut RandomStream) -> Damaged {
    let gain = [random.range(0.45, 1.1), random.range(0.45, 1.1), random.range(0.45, 1.1)];
    let most = gain[0].max(gain[1]).max(gain[2]);
    let hidden =
        vec![("ln(red/green)", (gain[0] / gain[1]).ln()), ("ln(blue/green)", (gain[2] / gain[1]).ln())];
    Damaged { picture: gains(p, gain.map(|g| g / most)), hidden }
}

/// Little light: linear gain, then sensor noise that grows as the light falls.
fn underexposed(p: &Picture, random: &mut RandomStream) -> Damaged {
    let gain = random.range(0.12, 0.45);
    let dark = colours(p, |c| c.map(|v| (v.powf(2.2) * gain).powf(1.0 / 2.2)));
    let sigma = random.range(0.0, 0.012);
    Damaged { picture: noise(&dark, sigma, random), hidden: vec![("gain", gain), ("noise sigma", sigma)] }
}

fn flattened(p: &Picture, random: &mut RandomStream) -> Damaged {
    let (k, middle) = (random.range(0.25, 0.6), random.range(0.35, 0.65));
    let picture = colours(p, |c| c.map(|v| middle + k * (v - 0.5)));
    Damaged { picture, hidden: vec![("contrast", k), ("middle", middle)] }
}

fn foggy(p: &Picture, random: &mut RandomStream) -> Damaged {
    let air = random.range(0.7, 0.95);
    let blue = random.range(0.0, 0.05);
    let k = random.range(0.25, 0.65);
    let picture = fog(p, k, [air - blue, air, air + blue]);
    Damaged { picture, hidden: vec![("air", air), ("blue of the air", blue), ("density", k)] }
}

/// Every skill, in a fixed order: the index of a skill is its number in a training batch.
#[rustfmt::skip]
pub static SKILLS: &[Skill] = &[
    skill("keep", Look(|p, _| p.clone()), false,
        &["leave it as it is", "keep the picture unchanged", "do nothing", "change nothing", "no edit", "keep it the same",
          "don't touch the photo", "return the same image", "leave everything alone", "no changes", "keep the original"],
        &["leave the photo as is", "make no changes at all", "do not edit anything", "keep this image exactly the same"]),
    skill("brighter", Look(|p, s| gamma(p, 0.6f32.powf(s))), true,
        &["make it brighter", "brighten the photo", "increase the brightness", "brighten it up", "turn up the brightness",
          "raise the brightness", "make the image lighter", "lighten the picture", "brighter", "more brightness",
          "the photo should be brighter"],
        &["make this picture brighter", "boost the brightness", "lighten it", "brighten this image please"]),
    skill("darker", Look(|p, s| gamma(p, 1.7f32.powf(s))), true,
        &["make it darker", "darken the photo", "decrease the brightness", "turn down the brightness", "lower the brightness",
          "darken it", "make the image dimmer", "dim the picture", "darker", "less brightness", "the photo should be darker"],
        &["make this picture darker", "reduce the brightness", "dim it", "darken this image"]),
    skill("more contrast", Look(|p, s| contrast(p, 1.5f32.powf(s))), true,
        &["increase the contrast", "more contrast", "make it more contrasty", "boost the contrast", "raise the contrast",
          "add contrast", "turn up the contrast", "stronger contrast", "give it higher contrast", "make the contrast stronger",
          "the photo needs more contrast"],
        &["add more contrast", "higher contrast please", "strengthen the contrast", "pump up the contrast"]),
    skill("less contrast", Look(|p, s| contrast(p, 0.6f32.powf(s))), true,
        &["decrease the contrast", "less contrast", "make it less contrasty", "reduce the contrast", "lower the contrast",
          "soften the contrast", "turn down the contrast", "weaker contrast", "give it lower contrast",
          "make the contrast weaker", "the photo has too much contrast"],
        &["remove some contrast", "lower contrast please", "weaken the contrast", "bring down the contrast"]),
    skill("saturate", Look(|p, s| saturation(p, 1.8f32.powf(s))), true,
        &["make the colours more vivid", "increase the saturation", "more saturation", "saturate the colors",
          "make it more colourful", "boost the colors", "make the colors pop", "more vibrant colours", "turn up the saturation",
          "richer colors", "stronger colours"],
        &["boost the saturation", "make it more vibrant", "make the picture more colorful", "more intense colours"]),
    skill("desaturate", Look(|p, s| saturation(p, 0.45f32.powf(s))), true,
        &["make the colours muted", "decrease the saturation", "less saturation", "mute the colors", "make it less colourful",
          "tone down the colors", "reduce the saturation", "more muted colours", "turn down the saturation", "weaker colors",
          "calmer colours"],
        &["lower the saturation", "make it less vibrant", "make the picture less colorful", "less intense colours"]),
    skill("black and white", Look(|p, _| grayscale(p)), false,
        &["make it black and white", "convert to grayscale", "black and white", "turn it into a black and white photo",
          "remove all color", "make it monochrome", "grayscale", "remove the colours", "convert it to black and white",
          "make the photo gray", "drain all the color", "desaturate it completely to gray"],
        &["turn this into grayscale", "make the picture black and white", "monochrome please", "take away all the colours"]),
    skill("warmer", Look(|p, s| gains(p, [1.0 + 0.12 * s, 1.0, 1.0 - 0.22 * s])), true,
        &["make it warmer", "warm up the photo", "warmer colours", "give it a warm tone", "increase the color temperature",
          "make the colors warmer", "warmer", "add warmth", "a warmer white balance", "make it look warm",
          "shift the colours towards orange"],
        &["make this picture warmer", "warm it up", "add a warm tone", "warmer tones please"]),
    skill("cooler", Look(|p, s| gains(p, [1.0 - 0.2 * s, 1.0, 1.0 + 0.14 * s])), true,
        &["make it cooler", "cool down the photo", "cooler colours", "give it a cool tone", "decrease the color temperature",
          "make the colors cooler", "cooler", "make it colder", "a cooler white balance", "make it look cold",
          "shift the colours towards icy"],
        &["make this picture cooler", "cool it down", "add a cold tone", "cooler tones please"]),
    skill("sepia", Look(|p, _| sepia(p)), false,
        &["make it sepia", "apply a sepia tone", "sepia", "give it a sepia look", "turn it into a sepia photo", "sepia filter",
          "add a sepia effect", "tone it brown like a sepia print", "convert to sepia", "brownish sepia tones",
          "make the photo sepia toned"],
        &["add a sepia filter", "sepia tone please", "turn the picture sepia", "use sepia colours"]),
    skill("invert", Look(|p, _| colours(p, |c| c.map(|v| 1.0 - v))), false,
        &["invert the colours", "invert it", "make a negative", "negative", "turn it into a photographic negative",
          "invert the image", "reverse the colors", "swap light and dark", "show the negative", "inverted colors",
          "make it look like a film negative"],
        &["invert the colors of the picture", "convert it to a negative", "inverted please", "make the photo a negative"]),
    skill("blur", Look(|p, s| blur(p, 1.8 * s)), true,
        &["blur it", "blur the photo", "add blur", "make it blurry", "apply a gaussian blur", "make the image out of focus",
          "soften it with blur", "add a soft blur", "make it unsharp", "put it out of focus", "blurry"],
        &["make this picture blurry", "apply blur", "blur the image", "add a gaussian blur"]),
    skill("deblur", Repair(|p, r| { let sigma = r.range(0.7, 2.0); by("sigma", sigma, blur(p, sigma)) }), false,
        &["remove the blur", "deblur the photo", "make it sharp", "sharpen the blurry image", "deblur", "fix the blur",
          "bring it into focus", "sharpen it", "make the image crisp", "make it less blurry", "undo the blur"],
        &["sharpen this blurry picture", "get rid of the blur", "deblur this image", "make it sharper"]),
    skill("grain", Chance(|p, s, r| noise(p, 0.1 * s, r)), true,
        &["add film grain", "add noise", "make it grainy", "add grain", "make it noisy", "give it a grainy look",
          "put noise on it", "grainy film", "add some noise to the photo", "noisy", "simulate high iso noise"],
        &["make this picture grainy", "apply film grain", "add noise to the image", "make the photo noisy"]),
    skill("denoise", Repair(|p, r| { let sigma = r.range(0.06, 0.3); by("sigma", sigma, noise(p, sigma, r)) }), false,
        &["remove the noise", "denoise the photo", "clean up the noise", "reduce the noise", "denoise", "remove the grain",
          "get rid of the grain", "make it less noisy", "clean the noisy image", "smooth out the noise", "fix the noise"],
        &["denoise this picture", "get rid of the noise", "remove the film grain", "make it less grainy"]),
    skill("pixelate", Look(|p, _| pixelate(p, 8)), false,
        &["pixelate it", "pixelate the photo", "turn it into big pixels", "make it pixelated", "add a mosaic effect",
          "censor it with pixels", "blocky pixels", "make it look like 8 bit pixels", "mosaic", "pixel art", "make it blocky"],
        &["make this picture pixelated", "apply a mosaic", "pixelate the image", "turn it into pixel blocks"]),
    skill("restore detail", Repair(|p, r| { let n = [2, 2, 4][r.below(3)]; by("side", n as f32, pixelate(p, n)) }), false,
        &["restore the detail", "remove the pixelation", "depixelate the photo", "upscale the details", "enhance the resolution",
          "fix the pixelation", "make the low resolution image detailed", "recover the details", "super resolution",
          "add back the missing detail", "smooth away the pixels"],
        &["get rid of the pixelation", "recover the lost detail", "depixelate this image", "enhance the details"]),
    skill("jpeg damage", Look(|p, _| jpeg(p, 8)), false,
        &["add jpeg artifacts", "compress it badly", "make it look like a bad jpeg", "add compression artifacts",
          "heavy jpeg compression", "low quality jpeg", "ruin it with compression", "add jpeg damage",
          "make it look over compressed", "jpeg compress it", "bad compression"],
        &["make the jpeg quality terrible", "apply strong jpeg compression", "add jpeg compression damage",
          "compress it like a bad jpeg"]),
    skill("jpeg repair", Repair(|p, r| { let q = 8 + r.below(25) as u8; by("quality", f32::from(q), jpeg(p, q)) }), false,
        &["remove the jpeg artifacts", "fix the compression artifacts", "clean up the jpeg", "repair the jpeg damage",
          "remove compression artifacts", "get rid of the jpeg blocks", "dejpeg", "undo the compression", "fix the bad jpeg",
          "smooth the compression blocks", "restore the compressed photo"],
        &["clean the jpeg compression", "get rid of the compression artifacts", "fix the jpeg artifacts",
          "repair this compressed image"]),
    skill("age", Look(|p, s| fade(p, 0.75 * s.min(1.3))), true,
        &["make it look old", "age the photo", "fade the colours", "make it look faded", "give it an old photo look",
          "make it look like an old print", "vintage faded look", "faded", "make it look aged", "wash out the colors like an old photo",
          "make it vintage"],
        &["make this picture look aged", "give it a vintage look", "fade it like an old print", "old faded photo"]),
    skill("restore faded", Repair(|p, r| { let k = r.range(0.4, 0.95); by("fading", k, fade(p, k)) }), false,
        &["bring back the faded colours", "restore the old photo", "restore the faded colors", "fix the faded photo",
          "undo the fading", "revive the colours of this old print", "repair the aged photo", "make the old photo look new",
          "remove the fading", "unfade it", "refresh the faded picture"],
        &["restore this faded picture", "bring the faded colors back", "fix this old faded print", "make the faded photo fresh again"]),
    skill("night", Look(|p, s| night(p, 0.9 * s.min(1.1))), true,
        &["make it night", "turn it into night", "make it look like night time", "night", "as if it was taken at night",
          "change day to night", "make it a night scene", "put it in moonlight", "set the scene at night", "moonlit night",
          "nighttime"],
        &["turn day into night", "make this a nighttime picture", "make it look like it is night", "night scene please"]),
    skill("light up", Repair(underexposed), false,
        &["light up the dark photo", "fix the underexposure", "brighten the dark picture", "make the dark photo visible",
          "recover the shadows", "fix the low light", "it is too dark, fix it", "correct the exposure", "low light enhancement",
          "light it up", "rescue the underexposed photo"],
        &["light up this dark picture", "fix this underexposed image", "the photo is too dark", "enhance the low light photo"]),
    skill("fog", Look(|p, s| fog(p, 0.55 * s, [0.82, 0.84, 0.86])), true,
        &["add fog", "make it foggy", "add mist", "make it misty", "put fog in the scene", "add haze", "make it hazy", "foggy",
          "cover it in fog", "a foggy day", "let mist come up"],
        &["make this picture foggy", "fill the scene with fog", "add some mist", "make it a misty day"]),
    skill("dehaze", Repair(foggy), false,
        &["remove the fog", "dehaze the photo", "clear the haze", "remove the haze", "dehaze", "get rid of the mist",
          "clear up the fog", "make the foggy picture clear", "remove the mist", "cut through the haze", "lift the fog"],
        &["get rid of the fog", "dehaze this picture", "clear the mist", "take the haze away"]),
    skill("tint", Tint, true,
        &["add a {to} tint", "tint it {to}", "give it a {to} color cast", "make everything {to}ish", "put a {to} filter on it",
          "tint the photo {to}", "cast {to} light on it", "wash it in {to}", "a {to} colour cast", "add a {to} filter",
          "bathe it in {to} light"],
        &["tint this picture {to}", "apply a {to} tint", "give the image a {to} tint", "use a {to} colour filter"]),
    skill("white balance", Repair(cast), false,
        &["fix the white balance", "remove the color cast", "correct the colors", "neutralize the color cast",
          "correct the white balance", "make the whites white", "remove the tint", "balance the colours",
          "get rid of the colour cast", "auto white balance", "make the colors neutral"],
        &["fix the colour cast", "white balance this picture", "take the tint away", "neutral colours please"]),
    skill("flatten", Look(|p, s| contrast(p, 0.38f32.powf(s))), false,
        &["flatten the tones", "make it flat", "make a flat log profile", "wash it out", "make it look washed out",
          "compress the tonal range", "flat look", "flatten the image", "make the tones flat", "a flat washed out look",
          "squeeze the histogram"],
        &["flatten this picture", "give it a flat look", "make it washed out", "flat tones please"]),
    skill("auto contrast", Repair(flattened), false,
        &["auto contrast", "stretch the histogram", "fix the flat contrast", "auto levels", "use the full tonal range",
          "normalize the contrast", "fix the washed out picture", "automatic contrast", "correct the flat tones",
          "stretch the levels", "fix the dull tones"],
        &["apply auto levels", "fix this flat picture", "automatically adjust the contrast", "repair the washed out tones"]),
    skill("colourise", Repair(|p, _| Damaged { picture: grayscale(p), hidden: Vec::new() }), false,
        &["colourise it", "colorize the black and white photo", "add color to the grayscale photo", "give it colour",
          "colorize", "bring color to this black and white picture", "turn the gray photo into colour",
          "make the monochrome photo colored", "paint it in natural colors", "colour the black and white image",
          "add natural colours"],
        &["colorize this picture", "colourise the old black and white photo", "add colours to the gray image",
          "turn black and white into color"]),
    skill("posterise", Look(|p, _| posterise(p, 4.0)), false,
        &["posterise it", "posterize the photo", "reduce it to a few colors", "posterize", "make it look like a screen print",
          "limit the number of colours", "use only a few flat tones", "apply posterization", "a poster with few tones",
          "quantize the colors", "make a poster effect"],
        &["posterize this picture", "add a posterise effect", "reduce the number of colors", "poster look with few colours"]),
    skill("sketch", Look(|p, _| sketch(p)), false,
        &["make it a pencil sketch", "turn it into a drawing", "pencil sketch", "draw it with a pencil", "sketch it",
          "make it look like a pencil drawing", "convert to a sketch", "a graphite drawing", "hand drawn sketch",
          "pencil drawing on white paper", "turn the photo into a pencil sketch"],
        &["make this picture a sketch", "turn it into a pencil drawing", "sketch the photo", "draw this in pencil"]),
    skill("edges", Look(|p, _| edges(p)), false,
        &["show only the edges", "detect the edges", "edge detection", "find the edges", "edges", "edge map",
          "white outlines on black", "extract the contours", "apply a sobel filter", "trace the edges in white",
          "make an edge map"],
        &["detect edges in the picture", "show the edge map", "find the contours", "only the outlines on black"]),
    skill("cartoon", Look(|p, _| cartoon(p)), false,
        &["make it a cartoon", "turn it into a cartoon", "cartoon style", "cartoonize the photo", "make it look like a comic",
          "comic book style", "cartoon", "draw it as a cartoon", "give it a cartoon look", "cartoon effect", "turn it into a comic"],
        &["cartoonize this picture", "make the photo a cartoon", "comic style please", "apply a cartoon effect"]),
    skill("oil paint", Look(|p, _| kuwahara(p, 3)), false,
        &["make it an oil painting", "turn it into an oil painting", "oil paint style", "paint it in oil", "oil painting",
          "make it look painted", "painterly look", "as painted with oil on canvas", "oil paint effect", "give it brush strokes",
          "turn the photo into a painting"],
        &["make this picture an oil painting", "apply an oil paint effect", "paint this with oil", "make it look like a painting"]),
    skill("vignette", Look(|p, s| vignette(p, 0.75 * s)), true,
        &["add a vignette", "darken the corners", "vignette", "make the corners dark", "apply a vignette effect",
          "darken the borders of the photo", "dark edges around the picture", "add dark corners", "a vignette around the center",
          "shade the corners", "fade the corners to black"],
        &["put a vignette on it", "make the corners darker", "vignette effect please", "darken the edges of the frame"]),
    skill("recolour", Recolour, false,
        &["make the {from} things {to}", "turn {from} into {to}", "change {from} to {to}", "replace {from} with {to}",
          "recolor the {from} parts {to}", "make everything {from} {to}", "paint the {from} areas {to}",
          "the {from} objects should be {to}", "swap {from} for {to}", "change the {from} color to {to}",
          "turn the {from} things {to}"],
        &["change all {from} things to {to}", "make the {from} objects {to}", "recolour {from} as {to}", "let the {from} parts be {to}"]),
    arrival("solarise", Look(|p, _| colours(p, |c| c.map(|v| if v > 0.5 { 2.0 - 2.0 * v } else { 2.0 * v }))),
        &["solarise it", "solarize the photo", "apply solarization", "solarize", "make a sabattier effect", "partially invert the tones",
          "solarised look", "solarize the image", "fold the bright tones over", "give it a solarized effect"],
        &["solarize this picture", "add a solarise effect", "use solarization", "solarised please"]),
    arrival("duotone", Look(|p, _| colours(p, |c| mix([0.05, 0.3, 0.35], [1.0, 0.75, 0.45], luma(c)))),
        &["make it a duotone", "teal and orange duotone", "duotone", "two tone print", "apply a duotone effect", "split tone it",
          "teal shadows and orange lights", "turn it into two tones", "duotone look", "print it in two inks"],
        &["duotone this picture", "add a duotone filter", "use a two tone look", "duotone please"]),
    arrival("glow", Look(|p, _| {
            let soft = blur(p, 4.0);
            let rgb = p.rgb.iter().zip(&soft.rgb).map(|(a, b)| 1.0 - (1.0 - a) * (1.0 - 0.25 * (b + 1.0)));
            Picture::from_rgb(p.height, p.width, rgb.map(|v| v.clamp(-1.0, 1.0)).collect())
        }),
        &["add a dreamy glow", "make it glow", "soft glow", "orton effect", "glow", "give it a dreamy look", "add bloom",
          "make the lights glow", "a soft dreamy glow", "apply a glow effect"],
        &["make this picture glow", "add a soft glow", "dreamy look please", "use the orton effect"]),
];
