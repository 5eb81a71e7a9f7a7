//! What training batches cost: milliseconds of one core an instance, by skill, dearest first.
//! `cargo bench -p hywu-benches --bench data -- [FOLDER OF PHOTOS]`; without a folder the bundled samples.

use hywu_diffusion::{BatchShape, EditData, PhotoSet, TextEncoder, skills::SKILLS};
use std::{path::PathBuf, time::Instant};

/// Instances of each shape: about a hundred of every skill.
const INSTANCES: u64 = 4000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let samples = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/samples");
    // cargo adds options of its own.
    let folder = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let photos = PhotoSet::open(folder.map_or_else(|| samples.into(), PathBuf::from))?;
    let data = EditData::new(photos, &[], TextEncoder::bundled(20)?, 1)?;
    let shapes = [1, 4].map(|crops| BatchShape { instances: 1, crops, crop: 64 });
    let one_core = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    // Time and instances by skill and shape; combinations come last.
    let mut spent = vec![[(0.0, 0u32); 2]; SKILLS.len() + 1];
    for (k, shape) in shapes.into_iter().enumerate() {
        for step in 0..INSTANCES {
            let (batch, ms) = one_core.install(|| {
                let start = Instant::now();
                let batch = data.batch(step, shape);
                (batch, start.elapsed().as_secs_f64() * 1e3)
            });
            let at = &mut spent[batch?.skills[0]][k];
            *at = (at.0 + ms, at.1 + 1);
        }
    }
    let names = SKILLS.iter().map(|s| s.name).chain(["combination of two looks"]);
    let mut rows: Vec<_> = names.zip(spent).filter(|(_, at)| at[0].1 > 0).collect();
    rows.sort_by(|a, b| (b.1[0].0 / f64::from(b.1[0].1)).total_cmp(&(a.1[0].0 / f64::from(a.1[0].1))));
    println!("{:26}{:>12}{:>12}", "ms an instance of 64 x 64", "1 crop", "4 crops");
    for (name, at) in &rows {
        println!("{name:26}{:12.3}{:12.3}", at[0].0 / f64::from(at[0].1), at[1].0 / f64::from(at[1].1));
    }
    let mean = |k: usize| rows.iter().map(|(_, at)| at[k].0).sum::<f64>() / INSTANCES as f64;
    println!("{:26}{:12.3}{:12.3}", "mean", mean(0), mean(1));
    Ok(())
}
