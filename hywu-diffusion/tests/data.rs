//! Skills and training batches.

use hywu_core::Philox;
use hywu_diffusion::{
    BatchShape, EditBatch, EditData, KnownSkill, OwnSkill, PhotoSet, Picture, TextEncoder, load_picture,
    metrics::psnr,
    save_picture,
    skills::{Edit, HUES, Phrasing, Place, SKILLS, Skill, combination, filters},
};
use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples")
}

fn photo() -> Picture {
    load_picture(samples().join("astronaut.png")).expect("the sample").resize(96, 96)
}

fn data(skills: &[&str], seed: u64) -> EditData {
    let skills: Vec<String> = skills.iter().map(|s| (*s).to_owned()).collect();
    let photos = PhotoSet::open(samples()).expect("the samples");
    EditData::new(photos, &skills, TextEncoder::bundled(20).expect("bundled"), seed).expect("known skills")
}

#[test]
fn every_skill_has_enough_phrasings_and_none_is_shared() {
    let encoder = TextEncoder::bundled(20).expect("bundled");
    let mut owner: HashMap<Vec<u32>, &str> = HashMap::new();
    let mut names = HashSet::new();
    for skill in SKILLS {
        assert!(names.insert(skill.name), "{} twice", skill.name);
        assert!(skill.train.len() >= 10 && skill.held_out.len() >= 4, "{}", skill.name);
        for phrase in skill.train.iter().chain(skill.held_out) {
            let ids = encoder.encode(phrase).expect("short");
            let other = owner.insert(ids, skill.name);
            assert!(other.is_none(), "{phrase:?} of {} stands elsewhere, too: {other:?}", skill.name);
        }
    }
}

#[test]
fn every_example_is_a_picture_and_a_short_instruction() {
    let (photo, encoder) = (photo(), TextEncoder::bundled(20).expect("bundled"));
    let tiny = photo.crop(0, 0, 8, 8);
    for (i, skill) in SKILLS.iter().enumerate() {
        for j in 0..20 {
            let mut random = Philox::new(j).stream(i as u64);
            let phrasing = if j < 16 { Phrasing::Train } else { Phrasing::HeldOut(j as usize - 16) };
            let example = skill.example(&photo, phrasing, &mut random);
            for picture in [&example.source, &example.target] {
                assert_eq!((picture.height, picture.width), (96, 96), "{}", skill.name);
                assert!(picture.rgb.iter().all(|v| v.abs() <= 1.0 + 1e-5), "{}", skill.name);
            }
            assert!(!example.instruction.contains('{'), "{}", example.instruction);
            encoder.encode(&example.instruction).expect("fits");
            let same = example.source == example.target;
            assert_eq!(same, skill.name == "keep" || (same && skill.name == "recolour"), "{}", skill.name);
        }
    }
    for (i, skill) in SKILLS.iter().enumerate() {
        // `please` and a full stop don't make a phrasing another.
        let bare = |s: &str| {
            s.trim_end_matches('.').split(' ').filter(|w| *w != "please").collect::<Vec<_>>().join(" ")
        };
        let held_out: HashSet<String> = skill.held_out.iter().map(|s| bare(s)).collect();
        for j in 0..300 {
            let mut random = Philox::new(7).stream((i * 1000 + j) as u64);
            let said = skill.example(&tiny, Phrasing::Train, &mut random).instruction;
            assert!(!held_out.contains(&bare(&said)), "{}: {said:?} is held out", skill.name);
            encoder.encode(&said).expect("fits");
        }
    }
    // Two long phrasings need not fit; a batch then takes the plainest, which always do.
    for j in 0..4000 {
        let said = combination(&tiny, Phrasing::Canonical, &mut Philox::new(9).stream(j)).instruction;
        encoder.encode(&said).expect("the plainest combinations fit");
    }
}

#[test]
fn strength_words_change_the_strength() {
    let photo = photo();
    let brighter = &SKILLS[Skill::find("brighter").expect("there")];
    let mean = |p: &Picture| p.rgb.iter().sum::<f32>() / p.rgb.len() as f32;
    let mut seen = HashMap::new();
    for j in 0..200 {
        let example = brighter.example(&photo, Phrasing::Train, &mut Philox::new(1).stream(j));
        let words = &example.instruction;
        let grade = if ["slightly", "a little", "a bit", "subtly"].iter().any(|w| words.contains(w)) {
            0
        } else if ["strongly", "a lot", "heavily", "much more"].iter().any(|w| words.contains(w)) {
            2
        } else {
            1
        };
        let change = mean(&example.target) - mean(&example.source);
        assert_eq!(*seen.entry(grade).or_insert(change), change, "{words}");
    }
    assert!(seen[&0] < seen[&1] && seen[&1] < seen[&2]);
}

#[test]
fn hidden_amounts_are_those_that_damaged_the_photo() {
    let photo = photo();
    let made = |name: &str, photo: &Picture, j: u64| {
        let skill = &SKILLS[Skill::find(name).expect("there")];
        let example = skill.example(photo, Phrasing::Train, &mut Philox::new(j).stream(2));
        (example.hidden.iter().map(|h| h.1).collect::<Vec<f32>>(), example.source)
    };
    for j in 0..3 {
        let (h, source) = made("deblur", &photo, j);
        assert_eq!(source, filters::blur(&photo, h[0]));
        let (h, source) = made("restore detail", &photo, j);
        assert_eq!(source, filters::pixelate(&photo, h[0] as usize));
        let (h, source) = made("jpeg repair", &photo, j);
        assert_eq!(source, filters::jpeg(&photo, h[0] as u8));
        let (h, source) = made("restore faded", &photo, j);
        assert_eq!(source, filters::fade(&photo, h[0]));
        let (h, source) = made("dehaze", &photo, j);
        assert_eq!(
            source,
            filters::fog(&photo, Place::whole(&photo), h[2], [h[0] - h[1], h[0], h[0] + h[1]])
        );
        let (h, source) = made("auto contrast", &photo, j);
        assert_eq!(source, filters::colours(&photo, |c| c.map(|v| h[1] + h[0] * (v - 0.5))));

        // What has chance or a scale in it, on flat gray.
        let unit = |v: f32| (v + 1.0) * 0.5;
        let gray = Picture::from_rgb(64, 64, vec![0.0; 64 * 64 * 3]);
        let (h, source) = made("white balance", &gray, j);
        let c = [0, 1, 2].map(|i| unit(source.rgb[i]));
        assert!(
            ((c[0] / c[1]).ln() - h[0]).abs() < 1e-5 && ((c[2] / c[1]).ln() - h[1]).abs() < 1e-5,
            "{h:?}"
        );
        let (h, source) = made("denoise", &gray, j);
        let spread = source.rgb.iter().map(|v| (v * 0.5).abs()).sum::<f32>() / source.rgb.len() as f32;
        let expected = h[0] * (2.0 / std::f32::consts::PI).sqrt();
        // 12,288 draws: the standard error of the mean is below 1 % of it; clamping takes a few percent at the upper end.
        assert!((spread / expected - 1.0).abs() < 0.08, "{spread} for {expected}");
        let (h, source) = made("light up", &gray, j);
        let mean = source.rgb.iter().map(|v| unit(*v)).sum::<f32>() / source.rgb.len() as f32;
        assert!((mean - 0.5 * h[0].powf(1.0 / 2.2)).abs() < 1e-3, "{mean} at {h:?}");
    }
    for name in ["brighter", "grain", "tint", "recolour", "colourise"] {
        assert!(made(name, &photo, 1).0.is_empty(), "{name}");
    }
}

#[test]
fn parts_of_an_edit_are_parts_of_the_whole() {
    let photo = load_picture(samples().join("astronaut.png")).expect("the sample").resize(160, 128);
    let check = |edit: Edit, name: &str| {
        let whole = edit.target(&photo);
        for [y, x] in [[0, 0], [64, 40], [77, 51], [3, 112], [144, 112]] {
            let part = &edit.target_parts(&photo, &[[y, x]], 16)[0];
            assert!(*part == whole.crop(y, x, 16, 16), "{name} at {y}, {x}");
        }
        let many: Vec<_> = (0..20).map(|i| [i, 2 * i]).collect();
        let parts = edit.target_parts(&photo, &many, 64);
        assert!(many.iter().zip(&parts).all(|(&[y, x], p)| *p == whole.crop(y, x, 64, 64)), "{name}");
    };
    for (i, skill) in SKILLS.iter().enumerate() {
        // Often enough for every strength.
        for j in 0..12 {
            let mut random = Philox::new(j).stream(i as u64);
            check(skill.edit(&photo, Phrasing::Train, &mut random), skill.name);
        }
    }
    for j in 0..60 {
        let edit = combination(&photo, Phrasing::Train, &mut Philox::new(2).stream(j));
        let name = edit.instruction.clone();
        check(edit, &name);
    }
}

#[test]
fn filters_do_what_they_say() {
    let flat = |c: [f32; 3]| Picture::from_rgb(9, 9, c.map(|v| v * 2.0 - 1.0).repeat(81));
    let first = |p: Picture| [0, 1, 2].map(|i| (p.rgb[i] + 1.0) * 0.5);
    let near =
        |a: [f32; 3], b: [f32; 3]| assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 2e-3), "{a:?} {b:?}");
    // What has one colour everywhere stays so under every local mean.
    let colour = [0.2, 0.5, 0.8];
    for p in [
        filters::blur(&flat(colour), 1.7),
        filters::kuwahara(&flat(colour), 3),
        filters::pixelate(&flat(colour), 4),
        filters::contrast(&flat(colour), 1.0),
    ] {
        near(first(p), colour);
    }
    near(first(filters::edges(&flat(colour))), [0.0; 3]);
    near(first(filters::sketch(&flat(colour))), [1.0; 3]);
    near(first(filters::grayscale(&flat([1.0, 0.0, 0.0]))), [0.299; 3]);
    for (i, (_, hue)) in HUES.iter().enumerate() {
        let pure = filters::from_hsv([*hue, 1.0, 1.0]);
        assert!((filters::hsv(pure)[0] - hue).abs() < 1e-5);
        let other = HUES[(i + 1) % HUES.len()].1;
        near(first(filters::recolour(&flat(pure), *hue, other)), filters::from_hsv([other, 1.0, 1.0]));
        near(first(filters::recolour(&flat(pure), (hue + 0.5).fract(), other)), pure);
    }
    // A blurred picture is close to its source, a JPEG of high quality closer.
    let photo = photo();
    assert!(
        psnr(&filters::jpeg(&photo, 95), &photo) > 32.0 && psnr(&filters::jpeg(&photo, 8), &photo) < 28.0
    );
}

/// A blur's weights don't sum to exactly one, so it may leave black darker than black; what follows it still makes colours.
#[test]
fn a_look_after_a_blur_makes_numbers() {
    let black = Picture::from_rgb(9, 9, vec![-1.0; 9 * 9 * 3]);
    let blurred = (5..40).map(|i| filters::blur(&black, i as f32 * 0.1));
    let below: Vec<Picture> = blurred.filter(|p| p.rgb.iter().any(|v| *v < -1.0)).collect();
    assert!(!below.is_empty());
    for p in &below {
        for look in [filters::gamma(p, 0.6), filters::gamma(p, 1.7), filters::night(p, 1.0)] {
            assert!(look.rgb.iter().all(|v| (-1.0..=1.0).contains(v)), "{:?}", look.rgb);
        }
    }
}

fn same(a: &EditBatch, b: &EditBatch) -> bool {
    a.source.data() == b.source.data()
        && a.target.data() == b.target.data()
        && a.thumbnail.data() == b.thumbnail.data()
        && a.detail.data() == b.detail.data()
        && a.position.data() == b.position.data()
        && (&a.text, &a.skills, a.seed) == (&b.text, &b.skills, b.seed)
}

#[test]
fn a_batch_depends_on_seed_and_step_alone() {
    let shape = BatchShape { instances: 5, crops: 2, crop: 32 };
    let (a, again, other) = (data(&[], 3), data(&[], 3), data(&[], 4));
    let batch = a.batch(7, shape).expect("a good shape");
    assert_eq!(batch.source.shape(), [10, 32, 32, 3]);
    assert_eq!(batch.position.shape(), [10, 32, 32, 2]);
    assert_eq!((batch.thumbnail.shape(), batch.text.len()), (&[5, 64, 64, 3][..], 100));
    a.batch(8, shape).expect("a good shape");
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    assert!(same(&batch, &one.install(|| again.batch(7, shape)).expect("a good shape")));
    assert!(!same(&batch, &a.batch(8, shape).expect("a good shape")));
    assert!(!same(&batch, &other.batch(7, shape).expect("a good shape")));
}

#[test]
fn only_the_chosen_skills_come() {
    let chosen = data(&["invert", "sepia"], 1);
    let allowed = [Skill::find("invert").expect("there"), Skill::find("sepia").expect("there"), SKILLS.len()];
    let all = data(&[], 1);
    for step in 0..20 {
        let shape = BatchShape { instances: 8, crops: 1, crop: 8 };
        assert!(chosen.batch(step, shape).expect("good").skills.iter().all(|s| allowed.contains(s)));
        let skills = all.batch(step, shape).expect("good").skills;
        assert!(skills.iter().all(|s| SKILLS.get(*s).is_none_or(|s| !s.arrival)));
    }
}

#[test]
fn bad_shapes_and_names_are_refused() {
    let data = data(&[], 1);
    for (instances, crops, crop) in [(0, 1, 64), (1, 0, 64), (1, 1, 0), (1, 1, 12), (1, 1, 328)] {
        assert!(data.batch(0, BatchShape { instances, crops, crop }).is_err());
    }
    let photos = || PhotoSet::open(samples()).expect("the samples");
    let encoder = TextEncoder::bundled(20).expect("bundled");
    let message = match EditData::new(photos(), &["levitate".into()], encoder, 0) {
        Err(e) => e.to_string(),
        Ok(_) => panic!("accepted"),
    };
    assert!(message.contains("levitate") && message.contains("posterise"), "{message}");
}

/// Two pairs of the samples: the edit swaps red and blue.
fn own(dir: &Path) -> OwnSkill {
    for name in ["astronaut", "coffee"] {
        let photo = load_picture(samples().join(format!("{name}.png"))).expect("the sample").resize(96, 128);
        let swapped = filters::colours(&photo, |[r, g, b]| [b, g, r]);
        save_picture(dir.join(format!("{name}-before.png")), &photo, &[]).expect("writable");
        save_picture(dir.join(format!("{name}-after.png")), &swapped, &[]).expect("writable");
    }
    OwnSkill::open("swap", dir, &["swap the channels".to_owned()]).expect("two pairs")
}

#[test]
fn own_skills_stand_beside_the_table() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let encoder = || TextEncoder::bundled(20).expect("bundled");
    let shape = BatchShape { instances: 8, crops: 2, crop: 16 };
    let swapped = |batch: &EditBatch, instance: usize| {
        let crops = 2 * 16 * 16 * 3;
        let range = instance * crops..(instance + 1) * crops;
        let pixels = batch.source.data()[range.clone()].chunks(3).zip(batch.target.data()[range].chunks(3));
        pixels.into_iter().all(|(s, t)| [s[2], s[1], s[0]].iter().zip(t).all(|(s, t)| (s - t).abs() < 1e-5))
    };
    // Alone it needs no photos.
    let alone = EditData::with_own(PhotoSet::default(), vec![], vec![own(dir.path())], encoder(), 1);
    let batch = alone.expect("a skill").batch(3, shape).expect("good");
    assert!(batch.skills.iter().all(|s| *s == SKILLS.len() + 1) && (0..8).all(|i| swapped(&batch, i)));
    // Beside others it comes as often as they do.
    let photos = || PhotoSet::open(samples()).expect("the samples");
    let table = EditData::skills(&["invert".into()]).expect("known");
    let both =
        EditData::with_own(photos(), table.clone(), vec![own(dir.path())], encoder(), 1).expect("good");
    let mut count = 0;
    for step in 0..25 {
        let batch = both.batch(step, shape).expect("good");
        count += (0..8).filter(|&i| batch.skills[i] == SKILLS.len() + 1).count();
        assert!((0..8).all(|i| swapped(&batch, i) == (batch.skills[i] == SKILLS.len() + 1)));
    }
    assert!((75..125).contains(&count), "{count} of 200");
    let refused = |table: Vec<usize>, own: Vec<OwnSkill>, message: &str| {
        let error = EditData::with_own(PhotoSet::default(), table, own, encoder(), 1).err().expect("refused");
        assert!(error.to_string().contains(message), "{error}");
    };
    refused(table, vec![], "photos are needed to learn invert");
    refused(vec![], vec![], "no skill");
    let wordy = OwnSkill::open("wordy", dir.path(), &["word ".repeat(21)]).expect("two pairs");
    refused(vec![], vec![wordy], "at most 20");
}

#[test]
fn rehearsals_ask_for_old_skills_and_know_no_answer() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let encoder = TextEncoder::bundled(20).expect("bundled");
    let new = |photos| {
        let encoder = TextEncoder::bundled(20).expect("bundled");
        EditData::with_own(photos, vec![], vec![own(dir.path())], encoder, 1).expect("a skill")
    };
    let mine = KnownSkill::Own { name: "haze".into(), instructions: vec!["my haze".into()] };
    let old = || vec![KnownSkill::Table(Skill::find("recolour").expect("there")), mine.clone()];
    let data = new(PhotoSet::open(samples()).expect("the samples")).rehearsing(old(), 0.5).expect("good");
    let shape = BatchShape { instances: 6, crops: 1, crop: 32 };
    let asked = [
        "my haze",
        "please my haze",
        "my haze.",
        "my haze please",
        "can you my haze",
        "could you my haze",
        "i want you to my haze",
        "my haze for me",
        "now my haze",
    ];
    let asked = asked.map(|i| encoder.encode(i).expect("short"));
    let mut seen = [0; 2];
    for step in 0..20 {
        let batch = data.batch(step, shape).expect("good");
        assert_eq!(batch.rehearsed, 3);
        let size = 32 * 32 * 3;
        for i in 0..6 {
            let range = i * size..(i + 1) * size;
            let same = batch.source.data()[range.clone()] == batch.target.data()[range];
            assert_eq!(same, i < 3, "{i}");
            assert_eq!(batch.skills[i] == SKILLS.len() + 1, i >= 3);
            if i < 3 {
                let own = asked.iter().any(|a| *a == batch.text[i * 20..(i + 1) * 20]);
                assert_eq!(own, batch.skills[i] == SKILLS.len());
                seen[usize::from(own)] += 1;
            }
        }
    }
    assert!(seen.iter().all(|n| (15..45).contains(n)), "{seen:?}");
    // The pairs' own pictures do, too.
    new(PhotoSet::default()).rehearsing(old(), 1.0).expect("good").batch(0, shape).expect("good");
    assert!(new(PhotoSet::default()).rehearsing(old(), 1.5).is_err());
    assert!(new(PhotoSet::default()).rehearsing(vec![], 0.5).is_err());
    let endless = KnownSkill::Own { name: "endless".into(), instructions: vec!["haze ".repeat(21)] };
    assert!(new(PhotoSet::default()).rehearsing(vec![endless], 0.5).is_err());
}
